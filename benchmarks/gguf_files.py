#!/usr/bin/env python3
"""GGUF files of one type and one size: llama.cpp's own rounding with an importance matrix, and lrcompress's.

Both get the same calibration text. Both files are run by llama.cpp, and so is the converter's float32 file that they are
compared with: mean KL divergence of the next token's distribution, top-1 agreement, perplexity, on windows of --text.
Prints a Markdown table; files stay in --work. --llama-python is the Python of an environment with llama-cpp-py-sync, gguf
and numpy (see llama_cpp.py), --converter llama.cpp's. A model whose weights once were blocks of 4 bits flatters plain
rounding at 4 bits: `--perturb STEPS` trains it on the calibration text first, and takes that as the dense model.

usage: gguf_files.py --model FOLDER --calibration FILE [FILE ...] --text FILE --work DIR --llama-python PYTHON
                     [--converter FILE] [--types Q4_0 Q2_K ...] [--samples 48] [--seqlen 1024] [--windows 8] [--length 512]
"""

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WORKER = Path(__file__).with_name("llama_cpp.py")


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[:3]} failed: {done.stderr.strip().splitlines()[-1:]}")


def lrcompress(*arguments: object) -> None:
    run(sys.executable, "-m", "lrcompress", *arguments)


def perturb(model: str, texts: list[str], steps: int, folder: Path) -> None:
    """The model after some steps of training, so that no weight lies on a grid any more."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    ids = torch.tensor(tokenizer("\n".join(Path(text).read_text()[:400000] for text in texts)).input_ids)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-5, weight_decay=0.0)
    for _ in range(steps):
        start = int(torch.randint(len(ids) - 256, (1,)))
        rows = ids[None, start : start + 256]
        trained(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def importance(file: Path, output: Path) -> None:
    """What llama-quantize makes of an imatrix file."""
    from lrcompress.ggml.imatrix import read_imatrix

    np.savez(output, **{name: one.means().numpy().reshape(-1) for name, one in read_imatrix(file).items()})


class Judge:
    """Windows of a text, and what the dense file predicts on them."""

    def __init__(self, python: Path, work: Path, ids: np.ndarray, dense: Path) -> None:
        self.python, self.work, self.ids = python, work, ids
        np.save(work / "tokens.npy", ids)
        self.dense = self._logits(dense, work / "dense.npy")

    def _logits(self, file: Path, output: Path) -> np.ndarray:
        run(self.python, WORKER, "logits", file, self.work / "tokens.npy", output)
        return np.load(output, mmap_mode="r")

    def measure(self, file: Path | None) -> tuple[float, float, float]:
        """KL divergence from the dense file, top-1 agreement, perplexity."""
        other = self.dense if file is None else self._logits(file, self.work / "other.npy")
        divergence, same, loss, count = 0.0, 0, 0.0, 0
        for window, dense, found in zip(self.ids, self.dense, other, strict=True):
            before, after = (torch.from_numpy(part[:-1].copy()).log_softmax(-1) for part in (dense, found))
            divergence += float((before.exp() * (before - after)).sum())
            same += int((before.argmax(-1) == after.argmax(-1)).sum())
            following = torch.from_numpy(window[1:].astype(np.int64))
            loss -= float(after.gather(1, following[:, None]).sum())
            count += len(following)
        return divergence / count, same / count, math.exp(loss / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llama-python", type=Path, required=True)
    parser.add_argument("--converter", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q4_0", "IQ4_NL", "Q2_K", "Q3_K_M", "Q4_K_M"])
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--perturb", type=int, default=0, metavar="STEPS")
    parser.add_argument("--set", nargs="*", default=[], help="options of method ggml")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.model
    if args.perturb:
        model = str(args.work / "perturbed")
        if not Path(model, "config.json").exists():
            perturb(args.model, args.calibration, args.perturb, Path(model))
    converter = [] if args.converter is None else ["--converter", args.converter]
    texts = [part for text in args.calibration for part in ("--calibration", text)]
    text_options = [*texts, "--samples", args.samples, "--seqlen", args.seqlen, *converter]
    dense, imatrix = args.work / "dense.gguf", args.work / "imatrix.gguf"
    if not dense.exists():
        from lrcompress.foreign.converter import convert, converter_command

        convert(converter_command(args.converter), Path(model), dense, "f32", model)
    if not imatrix.exists():
        lrcompress("calibrate", model, "--imatrix", imatrix, *text_options, "--quiet")
    importance(imatrix, args.work / "imatrix.npz")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = np.array(tokenizer(args.text.read_text(encoding="utf8")[: 40 * args.windows * args.length]).input_ids)
    ids = ids[: args.windows * args.length].reshape(-1, args.length)
    judge = Judge(args.llama_python, args.work, ids, dense)
    print(f"`{' '.join(sys.argv)}`; dense perplexity {judge.measure(None)[2]:.2f}\n")
    print("| type | MB | KL llama.cpp | KL ours | of theirs | top-1 theirs | ours | perplexity theirs | ours | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kind in args.types:
        theirs, ours = args.work / f"llama-{kind}.gguf", args.work / f"ours-{kind}.gguf"
        if not theirs.exists():
            run(args.llama_python, WORKER, "quantize", dense, theirs, kind, args.work / "imatrix.npz")
        start = time.perf_counter()
        settings = [part for text in args.set for part in ("--set", text)]
        cache = ["--cache", args.work / "cache"]
        lrcompress(
            "compress", model, "-o", ours, "--type", kind, *text_options, *settings, *cache, "--overwrite", "--quiet"
        )
        seconds = time.perf_counter() - start
        (kl, same, ppl), (our_kl, our_same, our_ppl) = judge.measure(theirs), judge.measure(ours)
        sizes = [file.stat().st_size for file in (theirs, ours)]
        size = (
            f"{sizes[0] / 1e6:.2f}" if abs(sizes[0] - sizes[1]) < 1000 else f"{sizes[0] / 1e6:.2f} {sizes[1] / 1e6:.2f}"
        )
        print(
            f"| {kind} | {size} | {kl:.5f} | {our_kl:.5f} | {our_kl / kl:.3f} | {same:.4f} | {our_same:.4f} | "
            f"{ppl:.3f} | {our_ppl:.3f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
