"""From what cospadi made of weights to the sparse dictionaries that are stored: solved, fitted, rounded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lrcompress.finite import all_finite
from lrcompress.formats.sparse_dictionary import SparseDictionary, dequantised, quantised
from lrcompress.formats.transposed_dictionary import TransposedDictionary
from lrcompress.kernels.pursuit import pursuit_for
from lrcompress.linalg.coupled import coupled_htp
from lrcompress.linalg.dictionary import SparseCode, fitted_dictionary, refitted_codes
from lrcompress.linalg.joint import FINAL_STEPS, SharedDictionary, joint_htp
from lrcompress.linalg.pursuit import Alternation
from lrcompress.linalg.sparse_coding import SOLVERS
from lrcompress.linalg.whitening import upper_root
from lrcompress.methods.dictionary_options import CospadiOptions
from lrcompress.precision import exact, widened
from lrcompress.protocols import Spec

Artefact = dict[str, Tensor]
"""Of one weight: see `Cospadi.decompose`."""


def encoded(options: CospadiOptions, spec: Spec, artefact: Artefact, bias: Tensor | None) -> dict[str, Tensor]:
    """Solve, and take the codes' least-squares dictionary of the weight itself: it needs no inverse of the Gram.

    What is stored of one weight, see formats; ArithmeticError where it is not finite.
    """
    target = artefact["left"] * artefact.get("diagonal", artefact["energies"]).sqrt().to(artefact["left"])
    atoms, nonzeros = spec.parameters["atoms"], spec.parameters["rank"]
    code = SOLVERS[options.solver](target, atoms, nonzeros, _turns(options))
    if "rows" in artefact:
        return _coupled(options, spec, artefact, target, code, bias)
    roots, weight = artefact["roots"][:, None], widened(artefact["weight"])
    codes = widened(code.codes)
    dictionary = fitted_dictionary(roots * weight, codes)
    codes = codes / roots
    scale = _balance(dictionary, codes)
    dictionary, codes = dictionary * scale, codes / scale
    if options.dictionary_bits == 8:
        codes = _refitted_codes(artefact, _rounded(dictionary, 8), codes, code.support)
    elif options.coefficient_bits == 8:
        dictionary = fitted_dictionary(roots * weight, roots * _rounded(codes, 8))
    return _stored(options, spec, artefact, dictionary, codes, code.support, bias)


def _coupled(
    options: CospadiOptions, spec: Spec, artefact: Artefact, target: Tensor, code: SparseCode, bias: Tensor | None
) -> dict[str, Tensor]:
    """`encoded`, from a code in the diagonal metric on, in that of the full Gram."""
    roots, rows = artefact["roots"][:, None].float(), artefact["rows"]
    unit = rows.diagonal().mean()
    start = SparseCode(code.dictionary, code.codes / roots, code.support)
    code = coupled_htp(target / roots, rows / unit, start, spec.parameters["rank"], options.full_gram_rounds)
    root = upper_root(rows)
    codes = widened(code.codes)
    dictionary = fitted_dictionary(root @ widened(artefact["weight"]), root @ codes)
    scale = _balance(dictionary, codes)
    return _stored(options, spec, artefact, dictionary * scale, codes / scale, code.support, bias)


def encoded_together(
    options: CospadiOptions, specs: Sequence[Spec], artefacts: Sequence[Artefact], biases: Sequence[Tensor | None]
) -> list[dict[str, Tensor]]:
    """One dictionary for all, by `joint_htp`; then as in `encoded`. ArithmeticError where it is not finite."""
    roots = [a["roots"][:, None] for a in artefacts]
    weights = [r * widened(a["weight"]) for r, a in zip(roots, artefacts, strict=True)]
    grams = [a["gram"] if "gram" in a else None for a in artefacts]
    # One factor for all weights, so that sums in float32 begin near 1.
    unit = torch.stack([w.square().mean() for w in weights]).mean().sqrt().clamp_min(1e-30)
    scaled = [(w / unit).float() for w in weights]
    atoms, nonzeros = specs[0].parameters["atoms"], specs[0].parameters["rank"]
    code = joint_htp(scaled, grams, atoms, nonzeros, _turns(options))
    shared = SharedDictionary(weights, [g if g is None else widened(g) for g in grams])
    codes = [widened(c) for c in code.codes]
    dictionary = shared.solve(codes, widened(code.dictionary) * unit, FINAL_STEPS)
    scale = _balance(dictionary, torch.cat(codes))
    dictionary = dictionary * scale
    codes = [c / r / scale for c, r in zip(codes, roots, strict=True)]
    if options.dictionary_bits == 8:
        changed = _rounded(dictionary, 8)
        codes = [_refitted_codes(a, changed, c, s) for a, c, s in zip(artefacts, codes, code.supports, strict=True)]
    elif options.coefficient_bits == 8:
        few = [r * _rounded(c, 8) for r, c in zip(roots, codes, strict=True)]
        dictionary = shared.solve(few, dictionary, FINAL_STEPS)
    return [
        _stored(options, spec, artefact, dictionary, c, support, bias)
        for spec, artefact, c, support, bias in zip(specs, artefacts, codes, code.supports, biases, strict=True)
    ]


def _turns(options: CospadiOptions) -> Alternation:
    return Alternation(*options.limits, pursuit_for)


def _refitted_codes(artefact: Artefact, dictionary: Tensor, codes: Tensor, support: Tensor) -> Tensor:
    """Codes (out, k) that are the best in the metric for a dictionary (k, in) that has been changed."""
    seen = dictionary if "gram" not in artefact else dictionary @ widened(artefact["gram"])
    return refitted_codes(seen @ dictionary.T, widened(artefact["weight"]) @ seen.T, codes, support)


def _stored(
    options: CospadiOptions,
    spec: Spec,
    artefact: Artefact,
    dictionary: Tensor,
    codes: Tensor,
    support: Tensor,
    bias: Tensor | None,
) -> dict[str, Tensor]:
    if not all(all_finite(t) for t in (dictionary, codes)):
        raise ArithmeticError("the sparse dictionary is not finite")
    if "mean" in artefact:
        left = _rounded(codes, options.coefficient_bits)
        right = _rounded(dictionary, options.dictionary_bits)
        weight, left, right = (exact(part) for part in (artefact["weight"], left, right))
        if options.by_input:
            weight, left, right = weight.T, right.T, left.T
        moved = weight @ artefact["mean"] - left @ (right @ artefact["mean"])
        bias = (moved if bias is None else bias.to(moved) + moved).float()
    form = TransposedDictionary if options.by_input else SparseDictionary
    return form.encode(spec, dictionary.float(), codes.float(), support, bias)


def _rounded(values: Tensor, bits: int) -> Tensor:
    """Wide rows of `values` as they are stored with `bits` bits; zeros stay zeros."""
    return widened(dequantised(quantised(values.float(), bits)))


def _balance(dictionary: Tensor, codes: Tensor) -> Tensor:
    """One factor that makes both halves equally large, so that neither leaves the range of half precision."""
    sizes = dictionary.norm(), codes.norm()
    return (sizes[1] / sizes[0]).sqrt() if bool(sizes[0] > 0) and bool(sizes[1] > 0) else torch.ones_like(sizes[0])
