"""Sort codes into classes by the energy of their row and column, and count what is in them.

Row i of codes has the energy log2 of its mean |code| in quarter octaves, a column likewise; the class of an entry
depends on the sum of both, which predicts how large it is. Sums are exact and the rest is correctly rounded, so that
every machine finds the same classes.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrcompress.coding.tables import FAR_BITS, MAX_CLASSES, MAX_SHIFT, REACH, SYMBOLS, Tables, fitted

STEPS = 4
"""Of energy in an octave."""
LEAST, MOST = -22, 32
"""log2 of the smallest and largest mean |code| that are told apart."""
KEPT_OCTAVES = 2.5
"""A value's predicted size is at most about 2^KEPT_OCTAVES: what is larger loses low bits to it."""
SLAB = 1 << 20
"""Entries counted at once."""
_STEP = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
THRESHOLDS = torch.tensor(
    [math.ldexp(step, octave) for octave in range(LEAST, MOST) for step in _STEP], dtype=torch.float64
)


@dataclass(frozen=True)
class Classes:
    """row (m), column (n) uint8: energies; of (sums) uint8: class of an entry by the sum of its two energies."""

    row: npt.NDArray[np.uint8]
    column: npt.NDArray[np.uint8]
    of: npt.NDArray[np.uint8]
    tables: Tables

    def rows(self, part: slice) -> "Classes":
        """Those of some rows."""
        return Classes(self.row[part], self.column, self.of, self.tables)


def sorted_codes(codes: Tensor) -> tuple[Classes, float]:
    """Classes for integer codes (m, n), and the bits of codes, escapes and tables together."""
    row, column, predicted = _energies(codes)
    group = np.arange(int(row.max()) + int(column.max()) + 1) // 2
    shift = _shifts(predicted, int(group[-1]) + 1)
    histogram = _histograms(codes, row, column, group, shift)
    runs = _merged(histogram, shift)
    of = np.repeat(np.arange(len(runs)), [run.stop - run.start for run in runs])[group].astype(np.uint8)
    counts = np.stack([histogram[run].sum(axis=0) for run in runs])
    shifts = np.array([shift[run.start] for run in runs], dtype=np.uint8)
    tables, bits = fitted(counts, shifts)
    bits += float((counts.sum(axis=1) * shifts.astype(np.int64)).sum())
    return Classes(row, column, of, tables), bits


def _energies(codes: Tensor) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], float]:
    """Of rows and columns, from 0 up, and log2 of the size that the energies 0 and 0 predict, times STEPS."""
    rows = torch.zeros(codes.shape[0], dtype=torch.int64, device=codes.device)
    columns = torch.zeros(codes.shape[1], dtype=torch.int64, device=codes.device)
    for part in _slabs(codes):
        size = codes[part].to(torch.int64 if codes.dtype in (torch.int32, torch.int64) else torch.int32).abs()
        rows[part] = size.sum(dim=1)
        columns += size.sum(dim=0)
    total = int(rows.sum()) / codes.numel()
    row, row_base = _steps(rows.cpu(), codes.shape[1])
    column, column_base = _steps(columns.cpu(), codes.shape[0])
    return row, column, row_base + column_base - (STEPS * math.log2(total) if total else 0.0)


def _steps(sums: Tensor, count: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Energies of sums of |code| over `count` entries, less the least, and the least in quarter octaves."""
    mean = (sums.double() + 0.25) / count
    found = torch.bucketize(mean, THRESHOLDS, right=True)
    least = int(found.min())
    return (found - least).to(torch.uint8).numpy(), least - 1 + LEAST * STEPS


def _shifts(predicted: float, groups: int) -> npt.NDArray[np.int64]:
    sizes = (predicted + 2 * np.arange(groups) + 1) / STEPS
    return np.clip(np.ceil(sizes - KEPT_OCTAVES), 0, MAX_SHIFT).astype(np.int64)


def _slabs(codes: Tensor) -> list[slice]:
    rows = max(1, SLAB // codes.shape[1])
    return [slice(start, min(start + rows, codes.shape[0])) for start in range(0, codes.shape[0], rows)]


def _histograms(
    codes: Tensor,
    row: npt.NDArray[np.uint8],
    column: npt.NDArray[np.uint8],
    group: npt.NDArray[np.int64],
    shift: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """(groups, 256): how often each of the values -127 to 127 occurs, index 0 for those beyond."""
    device, groups = codes.device, len(shift)
    across = torch.from_numpy(column).to(device, torch.int32)
    down = torch.from_numpy(row).to(device, torch.int32)
    first = torch.from_numpy(group * SYMBOLS).to(device, torch.int32)
    shifts = torch.from_numpy(shift[group]).to(device, torch.int32)
    found = torch.zeros(groups * SYMBOLS, dtype=torch.int64, device=device)
    for part in _slabs(codes):
        sums = down[part, None] + across[None]
        values = codes[part].to(torch.int32)
        if shift.any():
            values = values >> shifts[sums]
        values = torch.where(values > REACH, -REACH - 1, values).clamp_(min=-REACH - 1)
        found += torch.bincount((values + (REACH + 1) + first[sums]).flatten(), minlength=groups * SYMBOLS)
    return found.reshape(groups, SYMBOLS).cpu().numpy()


def _merged(histogram: npt.NDArray[np.int64], shift: npt.NDArray[np.int64]) -> list[slice]:
    """Runs of neighbouring groups of one shift, each worth a table of its own."""
    runs = [slice(index, index + 1) for index in range(len(shift))]
    counts = [histogram[index] for index in range(len(shift))]
    costs = [_cost(count) for count in counts]
    joint = [_cost(a + b) for a, b in pairwise(counts)]
    while len(runs) > 1:
        gains = [
            costs[i] + costs[i + 1] - joint[i] if shift[runs[i].start] == shift[runs[i + 1].start] else -math.inf
            for i in range(len(runs) - 1)
        ]
        best = max(range(len(gains)), key=gains.__getitem__)
        if gains[best] < 0 and (len(runs) <= MAX_CLASSES or gains[best] == -math.inf):
            break
        runs[best : best + 2] = [slice(runs[best].start, runs[best + 1].stop)]
        counts[best : best + 2] = [counts[best] + counts[best + 1]]
        costs[best : best + 2] = [joint[best]]
        joint[max(best - 1, 0) : best + 2] = [
            _cost(counts[i] + counts[i + 1]) for i in (best - 1, best) if 0 <= i < len(runs) - 1
        ]
    return runs


def _cost(count: npt.NDArray[np.int64]) -> float:
    """About how many bits a class takes with its table, rounded so that every machine decides alike."""
    total = int(count.sum())
    if total == 0:
        return 0.0
    kept = count[1:][count[1:] * 8192 >= total]
    far = total - int(kept.sum())
    bits = total * math.log2(total) - float(np.rint(kept * np.log2(kept) * 16).sum()) / 16
    bits += far * (4 - math.log2(far)) + int(count[0]) * FAR_BITS if far else 0.0
    return round(16 * (bits + 7 * len(kept) + 20)) / 16
