"""Where each tensor lies in a checkpoint's files. Only headers are read here, and no code is ever unpickled.

Three formats: safetensors; torch.save's; and the folders of torch.distributed.checkpoint. Tensors are then read in
parts with plain file reads: mapped memory would count as the process's own, and a checkpoint may be larger than the
machine.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from initlab.kernels.torch_internals import FakeTensorMode

from .._console import inline_listing

PART = 1 << 18  # elements that are read at once: 1 MB of float32, which stays in the cache


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or would run code; it says which, and what can be done."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, or one shard of it, in a file.

    Args:
        name: its name in the state dict, nested names joined by dots.
        dtype, shape: of this part.
        file: where it lies.
        start: byte of its first element in the file.
        strides: in elements.
        begin: index of this part in the whole tensor, all 0 if it is the whole.
        loaded: the tensor itself, where its format cannot be read in parts.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    strides: tuple[int, ...]
    begin: tuple[int, ...] = ()
    loaded: Tensor | None = None

    def parts(self) -> Iterator[Tensor]:
        """The elements, flat, at most PART at once; in the order of memory where they are dense."""
        if self.loaded is not None:
            yield from self.loaded.reshape(-1).split(PART)
            return
        count = math.prod(self.shape)
        if not count:
            return
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        with self.file.open("rb") as file:
            file.seek(self.start)
            if span == count:  # in any order of dimensions
                for at in range(0, count, PART):
                    yield _read(file, self.dtype, min(PART, count - at), self)
            else:
                yield from (
                    _read(file, self.dtype, span, self).as_strided(self.shape, self.strides).reshape(-1).split(PART)
                )


def _read(file: BinaryIO, dtype: torch.dtype, count: int, stored: StoredTensor) -> Tensor:
    data = bytearray(count * dtype.itemsize)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise CheckpointError(
            f"{stored.file} ends within {stored.name!r}: the file is cut short; copy or save it again"
        )
    return torch.frombuffer(data, dtype=dtype)


def stored_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a file or of a torch.distributed.checkpoint folder, in its order.

    Raises:
        CheckpointError: where it is none, is damaged, or holds code.
    """
    if path.is_dir():
        return _distributed(path)
    with path.open("rb") as file:
        begin = file.read(9)
    if path.suffix == ".safetensors" or (len(begin) == 9 and begin[8:] == b"{"):
        return _safetensors(path)
    return _torch(path)


# safetensors: 8 bytes with the length of a JSON header, the header, the data. Read here and not by the package, which
# maps the whole file into memory.
_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_LONGEST_HEADER = 100_000_000  # bytes, as the package has it


def _safetensors(path: Path) -> list[StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{path} is cut short or no safetensors file: its header would take {length:,} bytes")
        try:
            header = json.loads(file.read(length))
            entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
            found = []
            for name, entry in entries:
                begin, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                dtype = _SAFETENSORS.get(entry["dtype"])
                if dtype is None:
                    raise CheckpointError(f"{path} holds {name!r} as {entry['dtype']}, which torch has no dtype for")
                if not 0 <= begin <= end <= size - 8 - length or end - begin != math.prod(shape) * dtype.itemsize:
                    raise CheckpointError(f"{path} is cut short or damaged: {name!r} does not fit into the file")
                found.append(StoredTensor(name, dtype, shape, path, 8 + length + begin, _contiguous(shape)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} has no safetensors header: {error}") from error
    return found


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _torch(path: Path) -> list[StoredTensor]:
    """torch.save's files. A fake load gives shapes and places without reading a tensor."""
    if not zipfile.is_zipfile(path):  # torch's format until 1.6 can only be loaded as a whole
        loaded = _load(path, path)
    else:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            order = next((archive.read(r) for r in records if r.filename.endswith("/byteorder")), b"little")
        # torch can read what another tool has compressed, or a big-endian machine has written; not in parts.
        plain = order == b"little" and all(record.compress_type == zipfile.ZIP_STORED for record in records)
        loaded = _load_fake(path, path) if plain else _load(path, path)
    return list(_flattened(loaded, path, 0))


def _load(source: Any, path: Path) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AssertionError) as error:
        raise CheckpointError(f"{path} is no checkpoint, or damaged: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _load_fake(source: Any, path: Path) -> Any:
    with FakeTensorMode():
        return _load(source, path)


def _refused(path: Path, error: Exception) -> CheckpointError:
    calls = re.findall(r"GLOBAL (\S+)|it calls (\S+)", str(error))
    names = sorted({a or b for a, b in calls})
    if zipfile.is_zipfile(path):
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or names
    if not names:
        rule = "no pickle that torch.load(weights_only=True) reads"
        return CheckpointError(f"{path} is no checkpoint, or damaged: {rule}")
    return CheckpointError(
        f"{path} holds more than tensors (it calls {inline_listing(names, 4)}). Nothing of it was run. If you trust "
        f"whoever wrote it, load it yourself and save its state_dict() alone"
    )


def _flattened(
    value: Any, path: Path, offset: int, name: str = "", names: tuple[str, ...] = ()
) -> Iterator[StoredTensor]:
    """The tensors in nested containers; an optimizer's state goes by the parameters' names where it has them."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized:
            value = value.dequantize() if value.is_quantized else value.coalesce().values()
        at = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        shape, strides = tuple(value.shape), tuple(value.stride())
        if at is None:
            yield StoredTensor(name, value.dtype, shape, path, 0, strides, loaded=value.detach())
        else:
            start = offset + at + value.storage_offset() * value.dtype.itemsize
            yield StoredTensor(name, value.dtype, shape, path, start, strides)
    elif isinstance(value, Mapping):
        groups = value.get("param_groups")
        if isinstance(groups, list) and "state" in value:
            names = tuple(str(n) for group in groups if isinstance(group, dict) for n in group.get("param_names", ()))
        for key, item in value.items():
            known = isinstance(key, int) and name.rpartition(".")[2] == "state" and key < len(names)
            label = names[key] if known else str(key)
            yield from _flattened(item, path, offset, f"{name}.{label}" if name else label, names)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _flattened(item, path, offset, f"{name}.{index}" if name else str(index), names)


# torch.distributed.checkpoint: a pickle with the shapes and places, and files of torch.save's archives end to end.
_METADATA = {
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "_MEM_FORMAT_ENCODING",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
_PATHS = {("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")} | {
    ("pathlib._local", name) for name in ("Path", "PosixPath", "PurePosixPath")
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's description, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _METADATA | _PATHS or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


class _Section(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        wanted = max(0, min(len(buffer), self._length - self._at))
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _distributed(folder: Path) -> list[StoredTensor]:
    description = folder / ".metadata"
    try:
        with description.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        places = dict(metadata.storage_data)
        tensors = dict(metadata.state_dict_metadata)
    except pickle.UnpicklingError as error:
        raise _refused(description, error) from error
    except (AttributeError, EOFError, TypeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{description} does not describe a checkpoint: {error}") from error
    found = []
    for index, place in places.items():
        file_path = folder / place.relative_path
        if not file_path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{description} points to {file_path}, outside the folder")
        if not file_path.is_file():
            raise CheckpointError(f"{file_path} is missing: {index.fqn!r} lies in it; copy the folder whole")
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{file_path} is written with {place.transform_descriptors}: load it with the same")
        if type(tensors.get(index.fqn)).__name__ != "TensorStorageMetadata":
            continue  # rates, counters and the like, each pickled on its own
        with file_path.open("rb") as file:
            section: Any = io.BufferedReader(_Section(file, place.offset, place.length))
            for part in _flattened(_load_fake(section, file_path), file_path, place.offset):
                found.append(
                    StoredTensor(
                        index.fqn,
                        part.dtype,
                        part.shape,
                        file_path,
                        part.start,
                        part.strides,
                        tuple(index.offset or ()),
                    )
                )
    return found
