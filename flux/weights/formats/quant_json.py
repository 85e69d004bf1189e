"""The JSON in which safetensors files say how layers are stored: checked in size and form, not yet in meaning.

ComfyUI has it in the header, as ``_quantization_metadata``, or for each layer in a tensor of bytes, ``comfy_quant``;
bitsandbytes in a tensor of bytes, ``quant_state``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...errors import FileError
from ..json_text import load_json

if TYPE_CHECKING:
    from .companions import HasShapeAndDtype

__all__ = ["MAX_JSON_BYTES", "METADATA", "Config", "metadata_layers", "names_format", "read_json"]

Config = Mapping[str, Any]

MAX_JSON_BYTES = 64 * 1024
MAX_METADATA_CHARACTERS = 16 * 1024 * 1024
METADATA = "_quantization_metadata"
AGAIN = "download the file again"


def metadata_layers(metadata: Mapping[str, str], file: str) -> dict[str, Config]:
    """The layers of the header's ``_quantization_metadata``; none where it has no such text.

    Raises:
        FileError: It is not JSON, or no table of layers and their formats.
    """
    text = metadata.get(METADATA)
    if text is None:
        return {}
    if len(text) > MAX_METADATA_CHARACTERS:
        raise FileError(f"{file}: {METADATA} has {len(text)} characters, which is absurd; {AGAIN}")
    layers = _parse(text, f"{file}: {METADATA}").get("layers", {})
    if not isinstance(layers, dict) or not all(names_format(config) for config in layers.values()):
        raise FileError(f"{file}: {METADATA} is no table of layers and their formats; {AGAIN}")
    return layers


def names_format(value: object) -> bool:
    """Whether a value is a table that names a format."""
    return isinstance(value, dict) and isinstance(value.get("format"), str)


def read_json(name: str, entry: HasShapeAndDtype, read: Callable[[str], Tensor], file: str) -> dict[str, Any]:
    """A tensor's bytes as a JSON table, its size checked before it is read.

    Args:
        name: Of the tensor.
        entry: The header's entry of it.
        read: Brings a tensor.
        file: The file's name, for messages.

    Raises:
        FileError: It is no text, too long, or not a JSON table.
    """
    if entry.dtype != "U8" or len(entry.shape) != 1 or entry.shape[0] > MAX_JSON_BYTES:
        raise FileError(
            f"{file}: tensor {name} is {entry.dtype} {list(entry.shape)}, not a JSON text of at most {MAX_JSON_BYTES} "
            f"bytes; {AGAIN}"
        )
    return _parse(read(name).numpy().tobytes(), f"{file}: tensor {name}")


def _parse(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = load_json(text)
    except ValueError as error:
        raise FileError(f"{what} is not JSON ({str(error)[:200]}); {AGAIN}") from error
    if not isinstance(value, dict):
        raise FileError(f"{what} is not a JSON table; {AGAIN}")
    return value
