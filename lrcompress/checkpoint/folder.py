"""What lies in a checkpoint's folder beside its tensors: the config and the tokenizer."""

from pathlib import Path
from typing import Any

from lrcompress.checkpoint.reader import CheckpointReader, read_json_object
from lrcompress.errors import InputError
from lrcompress.model.skeleton import check_sizes, library_errors, read_config


def read_config_file(folder: Path) -> dict[str, Any]:
    """config.json as a mapping; InputError where it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: is it a checkpoint's folder?")
    return read_json_object(path)


def read_sound_config(folder: Path, *, trust_remote_code: bool = False) -> object:
    """As read_config; InputError where the config asks for more than the folder's tensors can hold."""
    config, files = read_config(folder, trust_remote_code=trust_remote_code), CheckpointReader(folder)
    check_sizes(config, len(files.names()), files.numbers)
    return config


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer; InputError where there is none."""
    from transformers import AutoTokenizer

    with library_errors(f"no tokenizer can be loaded from {folder}", "copy its tokenizer files there"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """What makes inputs of text and images, by the folder's files; InputError where these or a package are missing."""
    from transformers import AutoProcessor
    from transformers.utils import is_vision_available

    if not is_vision_available():
        raise InputError("reading images needs the package pillow: pip install pillow")
    what = f"no processor of images can be loaded from {folder}"
    cure = "copy its processor files there (processor_config.json or preprocessor_config.json, and its chat template)"
    with library_errors(what, cure):
        try:
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except ImportError as error:
            reason = " ".join(str(error).split()).partition(". ")[0]
            raise InputError(f"{what} ({reason}): install that package") from error
    if not hasattr(processor, "image_processor"):
        raise InputError(f"{what}: {cure}")
    return processor
