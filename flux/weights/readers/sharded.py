"""A model in several safetensors files, as diffusers saves large ones: an index names the file of every tensor.

The index is ``{"weight_map": {tensor: file}, "metadata": {...}}``, beside the files that it names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from ...errors import FileError, MissingFileError
from ..json_text import load_json
from .header import MAX_TENSORS, TensorEntry, is_name, whole_text
from .safetensors import SafetensorsFile
from .stamps import FileStamp

__all__ = ["INDEX_SUFFIX", "ShardedFile", "index_in", "index_of_shard"]

INDEX_SUFFIX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<place>\d{5})-of-(?P<count>\d{5})\.safetensors")
MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 1000
MAX_FILE_NAME = 255  # bytes; what file systems take
SHOWN = 80  # characters of a name that is none


class ShardedFile(Mapping[str, TensorEntry]):
    """The entries of all files by name; ``stored`` and ``read`` bring one tensor.

    Args:
        path: The index.

    Attributes:
        metadata: Of the files' headers together; of the index where they have none.

    Raises:
        MissingFileError: The index, or a file that it names, is not there.
        FileError: One of them is damaged, or they do not belong together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        weight_map, self.metadata = _read_index(path)
        self._shards = {name: SafetensorsFile(_shard_path(path, name)) for name in dict.fromkeys(weight_map.values())}
        for shard in self._shards.values():
            self.metadata |= shard.metadata
        self._home = {tensor: self._shards[name] for tensor, name in weight_map.items()}
        _check_belonging(path, self._home, self._shards)

    def __getitem__(self, name: str) -> TensorEntry:
        return self._home[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(shard.path for shard in self._shards.values())

    @property
    def stamps(self) -> dict[Path, FileStamp]:
        """Of every file, as it was when its header was read."""
        return {shard.path: shard.stamp for shard in self._shards.values()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.nbytes for shard in self._shards.values())

    def stored(self, name: str) -> Tensor:
        """See ``SafetensorsFile.stored``."""
        return self._home[name].stored(name)

    def outline(self, name: str) -> Tensor:
        """See ``SafetensorsFile.outline``."""
        return self._home[name].outline(name)

    def read(self, name: str) -> Tensor:
        """See ``SafetensorsFile.read``."""
        return self._home[name].read(name)

    def read_into(self, name: str, target: Tensor) -> None:
        """See ``SafetensorsFile.read_into``."""
        self._home[name].read_into(name, target)

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """See ``SafetensorsFile.held``."""
        with ExitStack() as stack:
            checks = [stack.enter_context(shard.held()) for shard in self._shards.values()]

            def check_all() -> None:
                for check in checks:
                    check()

            yield check_all

    def want(self, name: str) -> None:
        """See ``SafetensorsFile.want``."""
        self._home[name].want(name)

    def forget(self, name: str) -> None:
        """See ``SafetensorsFile.forget``."""
        self._home[name].forget(name)


def index_in(folder: Path) -> Path | None:
    """The index in a folder, or its only safetensors file; None where there is neither.

    Raises:
        FileError: There are several.
    """
    for pattern in (f"*{INDEX_SUFFIX}", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:3])
            raise FileError(f"{folder} holds several models ({names}, ...); name one of these files")
        if found:
            return found[0]
    return None


def index_of_shard(path: Path) -> Path | None:
    """The index of a file that is one of several by its name; None for other files.

    Raises:
        MissingFileError: It has no index beside it.
    """
    named = SHARD.fullmatch(path.name)
    if named is None or int(named["count"]) < 2:
        return None
    index = path.with_name(named["stem"] + INDEX_SUFFIX)
    if not index.is_file():
        raise MissingFileError(
            f"{path.name} is part {int(named['place'])} of {int(named['count'])} of a model, and {index.name}, which "
            "names them all, is not beside it; put the whole folder's files there"
        )
    return index


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The file of every tensor, and the metadata."""
    if not path.is_file():
        raise MissingFileError(f"{path} was not found; check the name and the folder")
    try:
        size = path.stat().st_size
        if not 0 < size <= MAX_INDEX_BYTES:
            raise FileError(f"{path.name} has {size} bytes, which is no index of a model; download it again")
        index = load_json(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from error
    except ValueError as error:
        raise FileError(f"{path.name} is damaged: it is not JSON ({str(error)[:200]}); download it again") from error
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise FileError(f"{path.name} has no weight_map of tensors and their files; download it again")
    if len(set(table.values())) > MAX_SHARDS or len(table) > MAX_TENSORS:
        raise FileError(
            f"{path.name} names more than {MAX_SHARDS} files or {MAX_TENSORS} tensors, which is absurd; "
            "download it again"
        )
    if not all(map(is_name, table)):
        raise FileError(
            f"{path.name} has a tensor's name that is absurdly long or cannot be printed; download it again"
        )
    metadata = index.get("metadata")
    texts = metadata if isinstance(metadata, dict) else {}
    return table, {
        whole_text(key): whole_text(str(value)) for key, value in texts.items() if isinstance(value, str | int | float)
    }


def _shard_path(index: Path, name: str) -> Path:
    """A file that the index names: beside it, never elsewhere."""
    is_plain = Path(name).name == name and "\\" not in name and is_name(name) and len(name.encode()) <= MAX_FILE_NAME
    if not is_plain or not name.endswith(".safetensors"):
        raise FileError(
            f"{index.name} names {name[:SHOWN]!r}, which is no .safetensors file beside it; download it again"
        )
    path = index.with_name(name)
    if not path.is_file():
        raise MissingFileError(f"{index.name} needs {name}, which is not beside it; download that file too")
    return path


def _check_belonging(path: Path, home: Mapping[str, SafetensorsFile], shards: Mapping[str, SafetensorsFile]) -> None:
    """Every tensor is in the file that the index says, and in no other."""
    absent = next((name for name, shard in home.items() if name not in shard), None)
    if absent is not None:
        raise FileError(
            f"{path.name} says that tensor {absent} is in {home[absent].path.name}, which does not have it; download "
            "the model's files again"
        )
    for shard in shards.values():
        extra = next((name for name in shard if home.get(name) is not shard), None)
        if extra is not None:
            raise FileError(
                f"{shard.path.name} has tensor {extra}, which {path.name} does not place there; download the model's "
                "files again"
            )
