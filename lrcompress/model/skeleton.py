"""A transformers model on the meta device: its structure without its weights."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lrcompress.errors import InputError, LrcompressError
from lrcompress.meta import Undrawn
from lrcompress.model.device import out_of_memory

MISFIT = (
    "its config and its files do not belong together: download both again, or let config.json name the model_type and "
    "architectures that the files were saved by"
)
"""What is wrong with a checkpoint whose tensors are not those of its config, and what to do."""

MOST_POSITIONS = 10**8
"""More positions than any model has."""


@contextmanager
def library_errors(what: str, cure: str = "") -> Iterator[None]:
    """Whatever a library raises on files that make no sense to it, but for lack of memory, as an InputError."""
    try:
        yield
    except LrcompressError:
        raise
    except Exception as error:  # of many kinds, from deep inside
        if out_of_memory(error):
            raise
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise InputError(f"{what} ({reason})" + (f": {cure}" if cure else "")) from error


def read_config(folder: Path, *, trust_remote_code: bool = False) -> object:
    """The checkpoint's config; InputError where it cannot be read or its model type is unknown."""
    from transformers import AutoConfig

    with library_errors(f"config of {folder} cannot be read", "is it a causal language model's folder?"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def text_config(config: Any) -> Any:
    """The part of a config that is about the language model, of two about the one that writes."""
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(decoder=True)


def check_sizes(config: object, tensors: int, numbers: int) -> None:
    """InputError where a config asks for more than a checkpoint of so many tensors and numbers can hold.

    Building a billion of blocks or experts would not end, and the constructors of wide layers ask for real memory.
    """
    with library_errors("the config makes no sense"):
        language = text_config(config)
        width = getattr(language, "hidden_size", 1)
        # Experts have tensors of their own, or are slices of tensors in which each has a number per channel at least.
        experts = max(tensors, numbers // max(width, 1) if isinstance(width, int) else 0)
        limits = {"num_hidden_layers": tensors, "hidden_size": numbers, "intermediate_size": numbers}
        limits |= {"head_dim": numbers, "num_attention_heads": numbers, "num_key_value_heads": numbers}
        limits |= {"max_position_embeddings": max(numbers, MOST_POSITIONS)}  # they need no numbers where they rotate
        limits |= {"vocab_size": numbers, **{key: experts for key in vars(language) if "experts" in key}}
        asked = ((key, limit, value) for key, limit in limits.items() for value in _in_layers(language, key))
        too_much = next(((key, value) for key, limit, value in asked if isinstance(value, int) and value > limit), None)
    if too_much is not None:
        raise InputError(
            f"the config has {too_much[0]} {too_much[1]}, which its checkpoint of {numbers} numbers cannot hold: "
            "download both again"
        )


def _in_layers(config: Any, key: str) -> Iterator[Any]:
    """What a config says of `key`, once, or for every layer where layers differ: then it refuses to be asked once."""
    try:
        yield getattr(config, key, 0)
    except RuntimeError:
        yield from (getattr(layer, key, 0) for layer in config.per_layer_config)


def auto_class(config: object) -> Any:
    """transformers' auto class for the class that a config names, or that itself where no auto class knows it.

    It may hold more than a language model. AutoModelForCausalLM where none is named, or one without a language head.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    own = getattr(config, "auto_map", None) or {}
    known = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    fitting = [auto for auto in known if auto.__name__ in own or type(config) in auto._model_mapping]
    named = set(getattr(config, "architectures", None) or ())
    for auto in fitting:
        if named & _class_names(auto, config, own):
            return auto
    if fitting:
        return fitting[0]
    classes = [getattr(transformers, name, None) for name in named]
    return next((cls for cls in classes if getattr(cls, "config_class", None) is type(config)), AutoModelForCausalLM)


def _class_names(auto: Any, config: object, own: Mapping[str, Any]) -> set[str]:
    """Names of the classes that an auto class builds from such configs, with the checkpoint's own code or without."""
    found = {str(own[auto.__name__]).rpartition(".")[2]} if auto.__name__ in own else set()
    if type(config) in auto._model_mapping:
        classes = auto._model_mapping[type(config)]
        found |= {cls.__name__ for cls in (classes if isinstance(classes, (tuple, list)) else [classes])}
    return found


def empty_model(config: object, *, trust_remote_code: bool = False) -> nn.Module:
    """The language model of `config`, in the class that it names, parameters on the meta device and buffers real."""
    from accelerate import init_empty_weights

    with library_errors("no language model can be built from its config"):
        with (
            init_empty_weights(include_buffers=False),
            torch.random.fork_rng(devices=[]),
            _NothingAllocated(),
            Undrawn(),
        ):
            auto = auto_class(config)
            if hasattr(auto, "from_config"):
                model = auto.from_config(config, trust_remote_code=trust_remote_code)
            else:
                model = auto._from_config(config)
        model.tie_weights()
        return model.eval().requires_grad_(False)


class _NothingAllocated(TorchFunctionMode):
    """While open, tensors that nothing is put into yet are on the meta device; parameters begin as such."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def checkpoint_names(model: nn.Module, stored: Iterable[str], made: Collection[str] = ()) -> dict[str, str]:
    """Name in the checkpoint of every tensor of the model's state dict that has one of its own.

    Of tied ones, which share a parameter, one is enough, whichever it is. `made` are those of the `stored` names that
    are the model's already.
    """
    state, tied = model.state_dict(), tied_names(model)
    found = stored_names(model, (name for name in stored if name not in made)) | {name: name for name in made}
    missing = [name for name in state if name not in found and not found.keys() & tied.get(name, set())]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"the checkpoint has no tensor {missing[0]}{more}: {MISFIT}")
    return {name: found[name] for name in state if name in found}


def stored_names(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Those of the `stored` names that the model has a tensor for, by the name that it has in the model.

    transformers' own renamings are applied (GPT-NeoX's embed_out is lm_head in the model), a base model's prefix is
    added or removed (gpt2).
    """
    state, renaming = model.state_dict(), Renaming(model)
    found: dict[str, str] = {}
    for source in stored:
        name, pattern = renaming(source, state)
        if pattern is not None and name in state:
            raise InputError(
                f"{name} is made from several tensors of the checkpoint ({source} and others): "
                "start from the dense checkpoint as it was published"
            )
        if name in state:
            found[name] = source
    return found


class Renaming:
    """transformers' own way from the names in a checkpoint to those in a model."""

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        transforms: list[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        self._prefix = getattr(model, "base_model_prefix", None)

    def __call__(self, stored: str, state: Mapping[str, Any]) -> tuple[str, str | None]:
        """The name in the model whose tensors are `state`, and the pattern of a conversion that makes its tensor."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(stored, self._renamings, self._converters, self._prefix, state)  # type: ignore[arg-type]
        if name not in state and stored in state:  # it has its final name already
            return stored, None
        return name, pattern

    def converter(self, pattern: str | None) -> Any:
        """The conversion of a pattern, None for none."""
        return next((c for c in self._converters if pattern in c.source_patterns), None)

    def in_order(self, names: Iterable[str]) -> list[str]:
        """The order in which conversions get their tensors: numbers in a name by their size."""
        from transformers.core_model_loading import dot_natural_key

        return sorted(names, key=dot_natural_key)


def tied_names(model: nn.Module) -> dict[str, set[str]]:
    """The other names of every parameter that has several, by each of its names."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {name: same - {name} for same in names.values() if len(same) > 1 for name in same}


def tie_as_stored(model: nn.Module, stored: Collection[str]) -> list[str]:
    """Tie the parameters of a model whose `stored` tensors have been loaded, as transformers does for such files.

    Whichever one of a pair is stored serves for both. Where both are, and differ, they stay apart whatever the config
    says; those are returned. A pair within blocks, which are not loaded, is left as it is.
    """
    keys: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    asked, missing = list(keys), set(model.state_dict()) - set(stored)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)  # type: ignore[operator]
    return [name for name in asked if name not in keys]


def find_blocks(model: nn.Module) -> list[str]:
    """Module names of the decoder blocks: the largest ModuleList whose members are of one class, nearest to the text.

    Members of several classes are blocks too, as in models that mix attention with other layers, where they are as many
    as the config says. Beside a language model there may be towers for images and sound: its own blocks share most of
    their path with the embeddings of its tokens, and are as many as its config says. Blocks whose weights are all held
    as codes have no parameters, only buffers.
    """
    best: tuple[tuple[int, bool, int], str, int] = ((0, False, 0), "", 0)
    language = text_config(getattr(model, "config", None))
    count, text, lists = getattr(language, "num_hidden_layers", None), _embeddings_path(model), list[str]()
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            if len({type(m) for m in module}) > 1 and len(module) != count:
                continue
            lists += [name] if len(module) > 1 else []
            size = sum(p.numel() for p in module.parameters()) or sum(b.numel() for b in module.buffers())
            score = (_shared(name.split("."), text), len(module) == count, size)
            if size and score > best[0]:
                best = (score, name, len(module))
    if not best[1]:
        raise InputError(
            "no list of decoder blocks was found in this model: only decoder-only models can be compressed, or one "
            "that another holds, saved by itself with save_pretrained"
        )
    return [f"{best[1]}.{i}" for i in range(best[2])]


def language_model(model: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """The innermost part of a model that makes predictions from text alone: it holds the blocks and an output head."""
    from transformers import PreTrainedModel

    def has_head(part: nn.Module) -> bool:
        try:
            return isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None
        except (NotImplementedError, AttributeError):
            return False

    parts = [part for name, part in model.named_modules() if blocks[0].startswith(f"{name}.") and has_head(part)]
    return parts[-1] if parts else model


def _embeddings_path(model: nn.Module) -> list[str]:
    """The parts of the name of the module that embeds tokens; none where a model does not say which one does."""
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return []
    return next((name.split(".") for name, module in model.named_modules() if module is embeddings), [])


def _shared(one: list[str], two: list[str]) -> int:
    """How many parts two paths begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
