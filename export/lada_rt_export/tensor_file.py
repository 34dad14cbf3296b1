"""Tensors that are still in their file: memory-mapped views over sizes and offsets that were checked."""

from __future__ import annotations

import itertools
import mmap
import os
import stat
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from lada_rt.errors import CheckpointError

from lada_rt_export.safe_pickle import Foreign, plain
from lada_rt_export.safe_zip import Entry

if TYPE_CHECKING:
    import torch

__all__ = [
    "AGAIN",
    "ITEM_BYTES",
    "MAX_AXES",
    "LazyTensor",
    "Storage",
    "TensorFile",
    "brief",
    "check_storages",
    "is_count",
    "map_file",
    "shorten",
]

#: dtype name -> bytes of one element
ITEM_BYTES: Final = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
MAX_AXES: Final = 16
#: the remedy for a damaged file
AGAIN: Final = "download the file again"


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements in the file, under the key its pickle gives it."""

    key: str
    dtype: str
    n_items: int

    @property
    def n_bytes(self) -> int:
        return self.n_items * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LazyTensor:
    """A tensor that is still in its file: name of the dtype, shape, and where its elements lie.

    Keep the `TensorFile` open while reading; views that exist already stay valid after it is closed.
    """

    file: TensorFile
    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def __repr__(self) -> str:
        return f"LazyTensor({self.dtype}, {list(self.shape)})"

    @property
    def n_elements(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def n_bytes(self) -> int:
        return self.n_elements * ITEM_BYTES[self.dtype]

    def numpy(self, *, widen: bool = False) -> np.ndarray[Any, np.dtype[Any]]:
        """A read-only view of the file's bytes in the tensor's shape.

        Args:
            widen: float16 comes as a float32 copy. bfloat16 always does: numpy has no such dtype.

        Returns:
            Array of `shape`; memory-mapped where the file's own dtype is kept.

        Raises:
            CheckpointError: the data is damaged, or the file was closed.
        """
        data = self.file.storage_bytes(self)
        item = ITEM_BYTES[self.dtype]
        try:
            view: np.ndarray[Any, np.dtype[Any]] = np.ndarray(
                self.shape,
                dtype=np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype),
                buffer=data,
                offset=self.offset * item,
                strides=tuple(step * item for step in self.stride),
            )
        except ValueError as error:  # an empty tensor of absurd extents
            raise CheckpointError(
                f"{self.file.source}: expected a usable shape, got {list(self.shape)} ({error}); {AGAIN}"
            ) from error
        view.flags.writeable = False
        if self.dtype == "bfloat16":
            return (view.astype(np.uint32) << 16).view(np.float32)
        return view.astype(np.float32) if widen and self.dtype == "float16" else view

    def torch(self, *, widen: bool = False) -> torch.Tensor:
        """A torch view of the file's bytes. The mapping is private: writing to it never reaches the file.

        Args:
            widen: float16 and bfloat16 come as a float32 copy.

        Returns:
            CPU tensor of `shape`; memory-mapped where the file's own dtype is kept.

        Raises:
            CheckpointError: the data is damaged, or the file was closed.
        """
        import torch

        data = self.file.storage_bytes(self)
        dtype: torch.dtype = getattr(torch, self.dtype)
        if self.n_elements == 0:
            try:
                return torch.empty(self.shape, dtype=dtype)
            except RuntimeError as error:
                raise CheckpointError(
                    f"{self.file.source}: expected a usable shape, got {list(self.shape)}; {AGAIN}"
                ) from error
        if data.readonly:  # torch has no read-only tensors
            data = memoryview(bytearray(data))
        # whole elements only: an untyped storage may end within one
        item = ITEM_BYTES[self.dtype]
        flat = torch.frombuffer(data, dtype=dtype, count=len(data) // item)
        tensor = flat.as_strided(self.shape, self.stride, self.offset)
        return tensor.float() if widen and self.dtype in ("float16", "bfloat16") else tensor


class TensorFile:
    """An open checkpoint: `root` is its structure as data, with `LazyTensor` leaves and inert `Foreign`s.

    `source` is the file name for messages, `kind` the container, `places` where each storage's bytes lie.
    The file must not be written to while it is open; replacing it whole (a rename) does no harm.
    """

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self.source = ascii(path.name)[1:-1]
        self.kind = ""
        self.root: Any = None
        self.places: dict[str, Entry] = {}
        self._map = mapping
        self._buffer: memoryview | None = memoryview(mapping)
        self._verified: set[str] = set()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def buffer(self) -> memoryview:
        """The whole file, mapped.

        Raises:
            CheckpointError: it was closed.
        """
        if self._buffer is None:
            raise CheckpointError(f"{self.source}: expected an open file, got a closed one; open it again")
        return self._buffer

    def close(self) -> None:
        """Let go of the mapping; it ends when the last view of it does."""
        if self._buffer is not None:
            try:
                self._buffer.release()
                self._map.close()
            except BufferError:  # views are alive: the mapping goes with the last of them
                pass
            self._buffer = None

    def entry(self, *keys: str) -> Any:
        """The value at a path of dictionary keys, such as `entry("cfg", "model")`.

        Raises:
            CheckpointError: there is no such entry.
        """
        value = self.root
        for depth, key in enumerate(keys):
            if not isinstance(value, dict) or key not in value:
                found = shorten(value) if isinstance(value, dict) else brief(value)
                raise CheckpointError(
                    f"{self.source}: expected an entry {'/'.join(keys[: depth + 1])!a}, got {found}; "
                    "check that this is the released file"
                )
            value = value[key]
        return value

    def tensors(self, *keys: str) -> dict[str, LazyTensor]:
        """Tensors by name in the dictionary at a path of keys (none: the top level); the rest is left out.

        Raises:
            CheckpointError: there is no such dictionary.
        """
        value = self.entry(*keys)
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{self.source}: expected a dictionary of tensors, got {brief(value)}; "
                "save the model's state_dict() instead of the model"
            )
        return {k: item for k, item in value.items() if isinstance(k, str) and isinstance(item, LazyTensor)}

    def data(self, *keys: str) -> Any:
        """A readable copy of the entry at a path of keys: dictionaries, lists, scalars (`safe_pickle.plain`).

        Raises:
            CheckpointError: there is no such entry.
        """
        return plain(self.entry(*keys))

    def storage_bytes(self, tensor: LazyTensor) -> memoryview:
        """The bytes of a tensor's storage, its checksum compared the first time.

        Raises:
            CheckpointError: the checksum differs, the tensor repeats elements, or the file was closed.
        """
        storage, buffer = tensor.storage, self.buffer
        if tensor.n_elements > storage.n_bytes // ITEM_BYTES[tensor.dtype]:
            raise CheckpointError(
                f"{self.source}: expected tensors that own their elements, got {list(tensor.shape)} spread "
                f"over {storage.n_items}; call .contiguous() before saving"
            )
        if storage.n_bytes == 0:
            return memoryview(b"")
        place = self.places[storage.key]
        if place.crc32 is not None and storage.key not in self._verified:
            crc32 = zlib.crc32(buffer[place.start : place.start + place.size])
            if crc32 != place.crc32:
                raise CheckpointError(
                    f"{self.source}: expected CRC 32 {place.crc32:08x} of entry {place.name!a}, "
                    f"got {crc32:08x}; {AGAIN}"
                )
            self._verified.add(storage.key)
        data = buffer[place.start : place.start + storage.n_bytes]
        if place.start % ITEM_BYTES[tensor.dtype]:  # no writer does this, but views must be aligned
            data = memoryview(bytearray(data))
        return data


def map_file(path: Path) -> mmap.mmap:
    """Map a regular, non-empty file privately (copy on write), or read-only where that is refused.

    Raises:
        CheckpointError: it cannot be opened or mapped.
    """
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{path}: expected a readable file, got: {reason}; check the path and its permissions"
        ) from error
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode) or info.st_size == 0:
            kind = "an empty file" if stat.S_ISREG(info.st_mode) else "a folder, pipe or device"
            raise CheckpointError(f"{path}: expected a checkpoint file, got {kind}; {AGAIN}")
        try:
            # private pages: torch tensors are writable, the file must not be
            return mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
        except OSError:  # systems that reserve memory for private pages
            return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a file that can be mapped, got: {error}; copy it to a local disk"
        ) from error
    finally:
        os.close(handle)


def is_count(value: Any) -> bool:
    """Whether an untrusted value is a plausible size, offset or stride."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def check_storages(file: TensorFile) -> None:
    """Every tensor's data must be in the file and long enough: found at open, not in the middle of a build.

    Raises:
        CheckpointError: it is not.
    """
    for tensor in _leaves(file.root):
        need = tensor.storage.n_bytes
        place = file.places.get(tensor.storage.key)
        if need and (place is None or place.size < need):
            got = "no such entry" if place is None else f"{place.size}"
            raise CheckpointError(
                f"{file.source}: expected {need} bytes of storage {tensor.storage.key[:80]!a}, got {got}; {AGAIN}"
            )


def _leaves(root: Any) -> Iterable[LazyTensor]:
    """Tensors anywhere in the structure, each container visited once (it may be shared or cyclic)."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, LazyTensor):
            yield value
        elif isinstance(value, (dict, list, tuple, Foreign)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                stack.extend(value.values())
            elif isinstance(value, Foreign):
                stack.extend((value.args, value.state, value.elements, value.pairs))
            else:
                stack.extend(value)


def shorten(items: Collection[Any], limit: int = 8) -> str:
    """The first names of an untrusted collection, on one line and in ASCII."""
    names = [brief(item, 60) for item in itertools.islice(items, limit)]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(names) + more if names else "nothing"


def brief(value: Any, limit: int = 80) -> str:
    """What an untrusted value is, on one line and in ASCII, at a cost that does not depend on it.

    Never by `repr` of a collection: a hundred lists that each hold the next one twice print 2**100 names.
    """
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, bytes, bytearray)):
        value = value[:limit]
    return (repr(value) if isinstance(value, Foreign) else ascii(value))[:limit]
