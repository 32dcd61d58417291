"""The loss's gradient at every layer's output, by one backward pass that goes block by block from the end."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lrcompress.calibration.collect import InputCollector
from lrcompress.calibration.hidden import HiddenStates
from lrcompress.errors import InputError
from lrcompress.finite import all_finite
from lrcompress.grams import add, add_gram, no_rest, symmetric
from lrcompress.model.blocks import BlockWalker
from lrcompress.model.samples import UNSCORED, Sample, sample_of
from lrcompress.parallel.processes import processes
from lrcompress.precision import wide, widened
from lrcompress.protocols import InputStatistics, Site

CHUNK = 256
"""Tokens whose logits are held at a time."""


class GradientCollector:
    """Context manager: while open, the gradient rows g at every site's output are added up during a backward pass.

    `gram`: sums of g gᵀ (out, out), otherwise of the squares (out,) only, as always for rows that are tokens; products
    in float32 within a call.
    `whole`: everything between the sites and the loss is differentiated, so that a layer without a gradient has none,
    as one that only chooses tokens; otherwise it is an InputError. Rows are counted as they go forward: those that no
    gradient comes back to have one of zero.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], *, gram: bool, whole: bool = True) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._counts: dict[str, int] = {}
        self._model, self._sites, self._gram, self._whole = model, sites, gram, whole
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "GradientCollector":
        for site in self._sites:
            layer = self._model.get_submodule(site.name)
            self._handles.append(layer.register_forward_hook(self._hook(site)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def moments(self, device: torch.device) -> dict[str, Tensor]:
        """Site name to the second moment per row, or its diagonal, wide; over the rows of all processes. Once."""
        found = {}
        for site in self._sites:
            known = site.name in self._sums
            total, rest = self._sums.pop(site.name) if known else self._zeros(site, device)
            if rest is not None:
                total.add_(rest)
            if known and self._compares(site):
                total = symmetric(total)
            count = total.new_tensor(float(self._counts.get(site.name, 0)))
            processes().add_up([total, count])
            if count > 0:
                found[site.name] = total.div_(count)
        return found

    def _compares(self, site: Site) -> bool:
        return self._gram and not site.of_tokens

    def _zeros(self, site: Site, device: torch.device) -> tuple[Tensor, Tensor | None]:
        total = torch.zeros([site.shape[0]] * (2 if self._compares(site) else 1), dtype=wide(device), device=device)
        return total, no_rest(total)

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def gather(gradient: Tensor) -> None:
            rows = gradient.detach().flatten(0, -2).float()
            if site.name not in self._sums:
                self._sums[site.name] = self._zeros(site, rows.device)
            total, rest = self._sums[site.name]
            if self._compares(site):
                add_gram(total, rows, rest)
            else:
                add(total, rows.square().sum(0), rest)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._counts[site.name] = self._counts.get(site.name, 0) + output[..., 0].numel()
            if output.requires_grad:
                output.register_hook(gather)
            elif not self._whole:
                raise InputError(
                    f"{site.name} comes before the blocks, where the loss's gradient is not known: leave it out of the "
                    "targets, or use metric=input"
                )

        return hook


def loss_gradients(
    walker: BlockWalker,
    ids: Tensor | Sequence[Sample],
    last: HiddenStates,
    out: HiddenStates,
    sites: Sequence[Site],
    *,
    gram: bool,
    sample_seed: int | None = None,
    numbers: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Write the gradient of the summed next-token loss with respect to the hidden states that leave the last block.

    With a `sample_seed` the labels are drawn from the model's own predictions, so that the gradients' second moment
    is the Fisher information and not its empirical stand-in (arXiv 1905.12558); otherwise they are the text's tokens.
    What keeps an image's place is no label.
    `numbers` are those of the samples among all processes' (0, 1, ... where None), which the draws depend on.
    Returns the gradients' moments at `sites`, those outside the blocks; `gram` as for GradientCollector.
    """
    generator = torch.Generator()
    with GradientCollector(walker.model, sites, gram=gram, whole=False) as collector:
        for sample in range(len(last)):
            hidden = last.read(sample).to(walker.device, walker.dtype).requires_grad_(True)
            text = sample_of(ids[sample])
            tokens, targets = text.words.to(walker.device), text.labels.to(walker.device)
            generator.manual_seed((sample_seed or 0) + (sample if numbers is None else numbers[sample]))
            for start in range(0, len(tokens) - 1, CHUNK):
                stop = min(start + CHUNK, len(tokens) - 1)
                with torch.enable_grad():
                    logits = walker.logits(tokens[start:stop], hidden[:, start:stop])[0].float()
                    labels = targets[start + 1 : stop + 1]
                    if sample_seed is not None:
                        labels = drawn(logits.detach(), generator).where(labels != UNSCORED, labels)
                    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
                    loss.backward()
            assert hidden.grad is not None
            out.write(sample, hidden.grad)
    return collector.moments(walker.device)


def lookup_gradients(
    walker: BlockWalker, ids: Tensor | Sequence[Sample], entering: HiddenStates, embeddings: nn.Embedding
) -> tuple[Tensor, Tensor]:
    """(width, width) wide second moment, per token, of the loss's gradients at what module `embeddings` puts out.

    entering: the gradients at the hidden states that enter the first block for samples ids (samples, length); over the
    rows of all processes. And (vocabulary,) wide: how often each token was looked up, a time with a gradient of
    mean squared size being one.
    """
    reached: list[Tensor] = []

    def start(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        reached.append(output.detach().requires_grad_(True))
        return reached[-1]

    total, rest, count = None, None, 0
    energies = torch.zeros(embeddings.num_embeddings, dtype=wide(walker.device), device=walker.device)
    handle = embeddings.register_forward_hook(start)
    try:
        for sample in range(len(entering)):
            reached.clear()
            text = sample_of(ids[sample])
            with torch.enable_grad():
                hidden = walker.embed(text, whole=True)
                hidden.backward(entering.read(sample).to(walker.device, hidden.dtype))
            rows = torch.cat([part.grad.flatten(0, -2).float() for part in reached if part.grad is not None])
            if total is None:
                total = widened(rows.new_zeros(rows.shape[1], rows.shape[1]))
                rest = no_rest(total)
            add_gram(total, rows, rest)
            looked_up = text.words.to(rows.device).repeat(len(rows) // len(text))
            energies.index_add_(0, looked_up, widened(rows).square().sum(1))
            count += len(text.written)
    finally:
        handle.remove()
    assert total is not None
    if rest is not None:
        total.add_(rest)
    total, counted = symmetric(total), total.new_tensor(float(count))
    processes().add_up([total, energies, counted])
    return total / counted, energies * counted / energies.sum().clamp_min(torch.finfo(energies.dtype).tiny)


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """(rows,) a token per row of logits (rows, vocabulary), drawn on the CPU so that every device gives the same."""
    return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)


def backward_block(
    walker: BlockWalker,
    index: int,
    module: nn.Module,
    before: HiddenStates,
    gradient_after: HiddenStates,
    gradient_before: HiddenStates,
    sites: Sequence[Site],
    weights: Tensor | None,
    tick: Callable[[], None],
    *,
    gram: bool,
) -> dict[str, InputStatistics]:
    """Run block `index` forward and backward on every sample of `gradient_after`, from file to file.

    Returns statistics per site: those of its input (shared by its group), with the second moment of the gradients at
    its own output, or its diagonal without `gram`.
    """
    inputs = InputCollector(walker.model, sites, weights)
    gradients = GradientCollector(walker.model, sites, gram=gram)
    with inputs, gradients:
        for sample in range(len(gradient_after)):
            inputs.weigh(before.length(sample))
            hidden = before.read(sample).to(walker.device, walker.dtype).requires_grad_(True)
            with torch.enable_grad():
                output = walker.run(index, module, hidden, before.sample(sample))
                output.backward(gradient_after.read(sample).to(walker.device, output.dtype))
            assert hidden.grad is not None
            if not all_finite(hidden.grad):
                raise InputError(
                    f"the gradient at {walker.blocks[index]} is not finite on calibration sample {sample}: "
                    "use metric=input or another --dtype"
                )
            gradient_before.write(sample, hidden.grad)
            tick()
    return with_gradients(inputs.summed(walker.device), gradients.moments(walker.device), sites)


def with_gradients(
    inputs: dict[str, InputStatistics], gradients: dict[str, Tensor], sites: Sequence[Site]
) -> dict[str, InputStatistics]:
    """Statistics per site name from those of its group and the moments of its own gradients."""
    return {
        site.name: replace(inputs[site.group], gradients=gradients[site.name])
        for site in sites
        if site.group in inputs and site.name in gradients
    }
