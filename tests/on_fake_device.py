"""Every method on the fake device and on the CPU: prints how far their errors differ, relative to the weight's size."""

import json
from dataclasses import replace

import torch

from lrcompress.methods import make_method
from lrcompress.precision import placed, split, wide
from lrcompress.protocols import InputStatistics, Site
from tests.fake_device import FAKE

METHODS = [
    ("lord", {}, None, None),
    ("lord", {"metric": "two_sided", "join": "auto"}, "pivoted", None),
    ("welore", {}, None, None),
    ("eora", {}, None, "gptq:3:32"),
    ("eora", {"factor_bits": 8, "metric": "centred"}, None, "rtn:3:32"),
    ("eora", {"act_order": True, "clip_search": True}, None, "gptq:3:32"),
    ("eora", {}, None, "sparsegpt:2:4"),
    ("auto", {}, None, None),
    ("ecsq", {"metric": "trace"}, None, None),
    ("auto", {}, "auto", None),
    ("cospadi", {"metric": "centred"}, None, None),
    ("cospadi", {"solver": "ksvd", "rounds": 1}, None, None),
]


def statistics(shape: tuple[int, int], device: torch.device) -> InputStatistics:
    generator, (m, n) = torch.Generator().manual_seed(0), shape
    mixed = torch.randn(n, n, generator=generator) * torch.logspace(0, -2, n)
    found = InputStatistics.zeros(n, device)
    for _ in range(2):
        rows = torch.randn(100, n, generator=generator) @ mixed + 1
        found.update(rows.to(device), torch.rand(100, generator=generator).to(device))
    gradients = torch.randn(200, m, generator=generator).double()
    return replace(found, gradients=split(gradients.T @ gradients / 200, device)[0])


assert wide(FAKE) == torch.float32
found = []
for place, (name, options, form, base) in enumerate(METHODS):
    shape = ((24, 48), (48, 24))[place % 2]
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    site, errors = Site("a", shape, 0, "a", True), []
    for device in (torch.device("cpu"), FAKE):
        method = make_method(name, options, form, base)
        curve = method.curve(site, 2)
        artefact = method.decompose(site, weight.to(device), statistics(shape, device))
        errors.append(method.errors(artefact, curve).cpu() / method.total(artefact))
        kept = {key: placed(tensor.cpu(), device) for key, tensor in artefact.items()}
        encoded = method.encode(
            method.spec(site, int(curve.ranks[len(curve.ranks) // 2]), 2), kept, torch.ones(shape[0])
        )
        assert all(bool(torch.isfinite(t.cpu().float()).all()) for t in encoded.values())
    difference = float((errors[0] - errors[1]).abs().max())
    found.append({"method": name, "options": options, "shape": shape, "difference": difference})
print(json.dumps(found))
