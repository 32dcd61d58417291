"""Putting stored formats in the place of linear layers, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lrcompress.errors import InputError
from lrcompress.formats import StoredLinear, build
from lrcompress.formats.base import KernelLinear
from lrcompress.formats.table import Table, TableEmbedding, TiedHead, table_like
from lrcompress.meta import on_meta
from lrcompress.model.experts import fuse
from lrcompress.protocols import Spec


def install(model: nn.Module, name: str, spec: Spec, dtype: torch.dtype) -> None:
    """Replace module `name` by the format of `spec`, on the meta device, its tensors to be loaded."""
    with on_meta():
        stored = build(spec, dtype)
    # Some models fill every nn.Linear by the two sides of its weight, which a format need not have.
    stored._is_hf_initialized = True  # type: ignore[assignment]
    put(model, name, stored)


def put(model: nn.Module, name: str, stored: StoredLinear, heads: Sequence[str] = ()) -> None:
    """Put a stored format in the place of module `name`, and of the `heads` that multiply by it."""
    original = model.get_submodule(name)
    if isinstance(stored, Table):
        if not isinstance(original, nn.Embedding):
            raise InputError(f"the manifest says that {name} is a table of embeddings, which it is not in this model")
        stored = table_like(original, stored)
    model.set_submodule(name, stored)
    connect(model, {}, dict.fromkeys(heads, name))


def connect(model: nn.Module, modules: dict[str, Spec], tied: dict[str, str]) -> None:
    """Tell every installed module that shares something where it is stored; `tied` heads follow tables."""
    for head, holder in tied.items():
        try:
            replaced, table = model.get_submodule(head), model.get_submodule(holder)
        except AttributeError as error:
            raise InputError(f"the manifest names {head}, which this model does not have") from error
        if not isinstance(replaced, nn.Linear) or not isinstance(table, Table):
            raise InputError(f"the manifest ties {head} to {holder}, which are no head and no embeddings in this model")
        model.set_submodule(head, TiedHead(table))
    for name, spec in modules.items():
        if spec.owner is not None:
            module, owner = model.get_submodule(name), model.get_submodule(spec.owner)
            assert isinstance(module, StoredLinear)
            assert isinstance(owner, StoredLinear)
            module.follow(owner)


def densify(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every stored format by the ordinary layer that computes the same, and fuse experts as they were.

    Experts with biases that compression added have no fused form: they stay linear layers. InputError, before anything
    is replaced, where accelerate keeps a layer's tensors elsewhere.
    """
    layers = stored_layers(model)
    for name, module in layers.items():
        if any(tensor.is_meta for tensor in module.state_dict().values()):
            raise InputError(
                f"{name} is offloaded, so that there is nothing to multiply out: load the model without a device_map, "
                "or run lrcompress export --to dense"
            )
    made: dict[nn.Module, nn.Module] = {}
    for name, module in layers.items():
        made[module] = dense_layer(module, dtype)
        model.set_submodule(name, made[module])
    for name, head in [*model.named_modules()]:
        if isinstance(head, TiedHead):
            model.set_submodule(name, _tied_layer(head, made[head.table]))
    for layer in model.modules():
        if type(layer) is KernelLinear:
            layer.__class__ = nn.Linear  # type: ignore[assignment]
    fuse(model)
    return model


def speed_up_dense(model: nn.Module) -> None:
    """Let our kernels multiply by what stayed dense: torch's product with one row does not reach the memory's speed."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = KernelLinear


def stored_layers(model: nn.Module) -> dict[str, StoredLinear]:
    """Name to module of every weight that is held in a stored format; the parts of a sum are no layers of their own."""
    found: dict[str, StoredLinear] = {}
    for name, module in model.named_modules():  # a module comes before its parts
        if isinstance(module, StoredLinear) and name.rpartition(".")[0] not in found:
            found[name] = module
    return found


def _tied_layer(head: TiedHead, embeddings: nn.Module) -> nn.Module:
    """nn.Linear of the weight of `embeddings`."""
    with on_meta():
        layer = nn.Linear(head.in_features, head.out_features, bias=False)
    layer.weight = embeddings.weight  # type: ignore[assignment]
    return layer


@torch.no_grad()
def dense_layer(module: StoredLinear, dtype: torch.dtype | None = None) -> nn.Module:
    """nn.Linear, or Conv1D or embeddings where the dense model had those, equal to `module` up to rounding."""
    from transformers.pytorch_utils import Conv1D

    weight, bias = dense_parts(module)
    dtype = dtype or module.weight.dtype
    if isinstance(module, TableEmbedding):
        return module.dense_embedding(weight.to(dtype))
    with on_meta():
        layer: nn.Module = nn.Linear(module.in_features, module.out_features, bias=bias is not None)
        if module.spec.conv1d:
            layer = Conv1D(module.out_features, module.in_features)
    layer.weight = nn.Parameter((weight.T.contiguous() if module.spec.conv1d else weight).to(dtype))
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype))
    elif module.spec.conv1d:
        layer.bias = nn.Parameter(weight.new_zeros(module.out_features, dtype=dtype))
    return layer


def dense_parts(module: StoredLinear) -> tuple[Tensor, Tensor | None]:
    """The equivalent weight (out, in) and bias, multiplied out in float32."""
    copy = module
    if module.weight.dtype != torch.float32 or module.spec.owner is not None:
        copy = build(module.spec.alone(), torch.float32).to(module.weight.device)
        copy.load_state_dict(module.whole_state())
    return copy.dense().detach(), None if (bias := copy.dense_bias()) is None else bias.detach()
