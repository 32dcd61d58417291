"""How transformers loads our checkpoints: a quantizer registered under the name in `quantization_config`.

Imported by `import lrcompress` as soon as transformers is (see _autoload).
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrcompress.checkpoint.manifest import QUANT_METHOD, Manifest
from lrcompress.checkpoint.mapped import release_unused
from lrcompress.errors import InputError
from lrcompress.formats import StoredLinear
from lrcompress.meta import on_meta
from lrcompress.model.device import release_freed
from lrcompress.model.experts import linear_experts, linearise
from lrcompress.model.surgery import connect, densify, install, speed_up_dense


class LrcompressConfig(QuantizationConfigMixin):
    """The manifest as transformers carries it in a model's config."""

    def __init__(self, **data: Any) -> None:
        self.quant_method = QUANT_METHOD
        for key, value in data.items():
            setattr(self, key, value)

    def manifest(self) -> Manifest:
        """The checked manifest."""
        return Manifest.from_json(self.to_dict())


class LrcompressQuantizer(HfQuantizer):
    """Puts the stored formats in place before weights are loaded."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check the manifest before anything is allocated."""
        self.quantization_config.manifest()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        manifest = self.quantization_config.manifest()
        found = linearise(model, manifest.experts)
        for name, fused in manifest.experts.items():
            if name not in found or not set(fused) <= set(found[name].fused_weights()):
                raise InputError(f"the manifest names experts {name}, which this model does not have so")
            with on_meta():
                found[name].mark(fused)
            # Some models fill the fused weights from the module around them, unless it is said to be filled.
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]
        experts = linear_experts(model).items()
        self._fused = [f"{name}.{key}" for name, module in experts for key in module.fused_shapes()]
        for name, spec in manifest.modules.items():
            try:
                replaced = model.get_submodule(name)
            except AttributeError as error:
                raise InputError(f"the manifest names {name}, which this model does not have") from error
            _check_shape(name, replaced, spec.shape, spec.conv1d)
            install(model, name, spec, replaced.weight.dtype)  # type: ignore[arg-type]
        connect(model, manifest.modules, manifest.tied)
        for head in manifest.tied:  # there is no parameter of this name to tie
            model.all_tied_weights_keys.pop(f"{head}.weight", None)  # type: ignore[operator,union-attr]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        # Streams of coded weights are decoded, by code that lets other threads run.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(partial(_lay_out, model), self.quantization_config.manifest().modules))
        speed_up_dense(model)
        release_freed()
        release_unused(model)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Without the conversions into fused experts and compressed weights: those are stored as they are here.

        transformers names the model too, since 5.20.
        """
        own = [*self._fused, *(f"{name}.weight" for name in self.quantization_config.manifest().modules)]

        def makes_own(conversion: Any) -> bool:
            patterns = conversion.target_patterns if isinstance(conversion, WeightConverter) else []
            return any(pattern in name for name in own for pattern in patterns)

        return [conversion for conversion in weight_conversions if not makes_own(conversion)]

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a config that was saved has its name
        added = sum(spec.added_bias for spec in self.quantization_config.manifest().modules.values())
        if added:
            warnings.warn(
                f"{added} layers have a bias that the dense ones had not: the dense model computes the same, but "
                "saving and loading it would lose them; lrcompress export --to dense keeps them where the config has "
                "a switch for them, or compress with metric=input",
                stacklevel=2,
            )
        dense = densify(model, wanted)
        if self.quantization_config.manifest().tied:
            dense.all_tied_weights_keys = dense.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
        return dense

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """save_pretrained writes the stored formats."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """transformers' Trainer may train them as they are, without an adapter."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile works on the formats."""
        return True


def _lay_out(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    assert isinstance(module, StoredLinear)
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        return  # offloaded
    try:
        module.check_indices()
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    module.lay_out()


def _check_shape(name: str, module: nn.Module, shape: tuple[int, int], conv1d: bool) -> None:
    weight = getattr(module, "weight", None)
    actual = tuple(weight.shape) if isinstance(weight, torch.Tensor) else None
    if actual != (tuple(reversed(shape)) if conv1d else tuple(shape)):
        raise InputError(f"the manifest says {name} is {tuple(shape)}, the model's config makes it {actual}")


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(LrcompressConfig)
    register_quantizer(QUANT_METHOD)(LrcompressQuantizer)
