"""Load time and resident memory of one model, measured in a process of its own."""

import gc
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import psutil
import torch

from lrcompress.checkpoint.folder import read_sound_config
from lrcompress.errors import InputError, LrcompressError, ResourceError
from lrcompress.evaluation.loading import load_network
from lrcompress.foreign.opening import open_model
from lrcompress.model.device import memory_errors
from lrcompress.model.skeleton import empty_model

TOKENS = 8
CHUNK = 2**20


@dataclass(frozen=True)
class Footprint:
    """load_seconds: from files that the system has cached to a model on its device; rss_bytes: what this process's
    resident memory grew by while it was loaded, read a few tokens and one, so that what is mapped or decoded late
    counts."""

    load_seconds: float
    rss_bytes: int


def footprint(label: str, *, device: str, dtype: str, trust_remote_code: bool) -> Footprint:
    """Measured in a fresh process: what another model left in memory counts for nothing."""
    options = {"label": label, "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    command = [sys.executable, "-m", "lrcompress.evaluation.footprint", json.dumps(options)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Footprint(**json.loads(done.stdout.splitlines()[-1]))
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
    if done.returncode == InputError.exit_code:
        raise InputError(reason)
    hint = "killed, probably for its memory" if done.returncode < 0 else reason
    raise ResourceError(f"loading {label} in a process of its own failed ({hint})")


def measured(label: str, *, device: str, dtype: str, trust_remote_code: bool) -> Footprint:
    """The footprint in this process, which should have loaded nothing yet."""
    folder = open_model(label).folder
    # The architecture's code is imported before memory is read, and the files come from the system's cache.
    empty_model(read_sound_config(folder, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK):
                pass
    before, start = _resident(), time.perf_counter()
    _, model = load_network(label, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    seconds = time.perf_counter() - start
    device_of = next(model.parameters()).device
    with torch.inference_mode():
        for tokens in (TOKENS, 1):  # one row and several may be multiplied by different kernels
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=device_of))
    return Footprint(seconds, _resident() - before)


def _resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    """JSON of the arguments of `measured` in, its result out; errors as the command line's."""
    try:
        with memory_errors("out of memory"):
            found = measured(**json.loads(sys.argv[1]))
    except LrcompressError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(error.exit_code)
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main()
