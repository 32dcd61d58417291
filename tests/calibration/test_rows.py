"""Rows of a layer that are not one a token."""

import pytest
import torch
from torch import nn

from lrcompress.calibration.collect import InputCollector
from lrcompress.protocols import Site


@pytest.mark.parametrize(("shape", "repeated"), [((1, 6, 2, 4), 2), ((1, 6, 4), 1), ((9, 4), None)])
def test_a_token_s_weight_is_that_of_each_of_its_rows(shape, repeated):
    """A layer that runs head by head, as usual, and on rows that are no tokens, which count once."""
    model, weights = nn.Sequential(nn.Linear(4, 3)), torch.arange(1.0, 7)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    with InputCollector(model, [Site("0", (3, 4), 0, "0", True)], weights) as collector:
        model(x)
    counted = torch.ones(9) if repeated is None else weights.repeat_interleave(repeated)
    expected = (counted[:, None] * x.flatten(0, -2)).sum(0)
    torch.testing.assert_close(collector.statistics["0"].total.float(), expected, rtol=1e-5, atol=1e-5)
