"""The two containers torch.save has written: zip files (since 1.6) and a chain of pickles before that."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, Final

from lada_rt.errors import CheckpointError

from lada_rt_export.safe_pickle import MAX_PICKLE_BYTES, Foreign, Hooks, read_pickle
from lada_rt_export.safe_zip import Entry, read_entries
from lada_rt_export.tensor_file import (
    AGAIN,
    ITEM_BYTES,
    MAX_AXES,
    LazyTensor,
    Storage,
    TensorFile,
    brief,
    is_count,
    shorten,
)

__all__ = ["is_torch_legacy", "read_torch_legacy", "read_torch_zip"]

_STORAGE_DTYPES: Final = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_RESAVE: Final = "load and save the file again with torch.save"


def read_torch_zip(file: TensorFile) -> None:
    """Fill `root` and `places` from a torch zip file.

    Raises:
        CheckpointError: damaged, compressed, big-endian, a TorchScript archive, or no torch file at all.
    """
    entries = read_entries(file.buffer, file.source)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    root = pickles[0].removesuffix("data.pkl") if pickles else ""
    if len(pickles) != 1 or f"{root}constants.pkl" in entries:
        raise CheckpointError(
            f"{file.source}: expected a torch.save file with one data.pkl, got {len(pickles)} and the "
            f"entries {shorten(entries)}; save the weights with torch.save(model.state_dict(), ...)"
        )
    order = _small_entry(file, entries[f"{root}byteorder"]) if f"{root}byteorder" in entries else b"little"
    if order != b"little":
        raise CheckpointError(f"{file.source}: expected little-endian tensors, got {order[:20]!a}; {_RESAVE}")
    storages: dict[str, Storage] = {}
    structure = _small_entry(file, entries[pickles[0]])
    file.root = read_pickle(structure, file.source, _hooks(file, storages))
    for key in storages:
        place = entries.get(f"{root}data/{key}")
        if place is not None:
            _need_stored(file, place)
            file.places[key] = place
    file.kind = "torch zip"


def _need_stored(file: TensorFile, entry: Entry) -> None:
    if not entry.stored:
        raise CheckpointError(
            f"{file.source}: expected uncompressed entries as torch writes them, "
            f"got a compressed {entry.name!a}; {_RESAVE}"
        )


def _small_entry(file: TensorFile, entry: Entry) -> bytes:
    _need_stored(file, entry)
    if entry.size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{file.source}: expected at most {MAX_PICKLE_BYTES} bytes in {entry.name!a}, got {entry.size}; "
            "save the weights as a plain state_dict"
        )
    data = bytes(file.buffer[entry.start : entry.start + entry.size])
    if zlib.crc32(data) != entry.crc32:
        raise CheckpointError(
            f"{file.source}: expected CRC 32 {entry.crc32:08x} of entry {entry.name!a}, "
            f"got {zlib.crc32(data):08x}; {AGAIN}"
        )
    return data


def is_torch_legacy(head: bytes) -> bool:
    """Whether a file that begins with these bytes is in the older torch format."""
    return head.startswith(b"\x80") and _LEGACY_MAGIC.to_bytes(10, "little") in head


def read_torch_legacy(file: TensorFile) -> None:
    """Fill `root` and `places` from the older torch format.

    Five pickles (magic, version, system, structure, storage keys), then each storage behind its item count.

    Raises:
        CheckpointError: damaged, cut short, big-endian or of another version.
    """
    stream = io.BytesIO(bytes(file.buffer[:MAX_PICKLE_BYTES]))
    storages: dict[str, Storage] = {}
    magic, version, system = (read_pickle(stream, file.source) for _ in range(3))
    little = isinstance(system, dict) and system.get("little_endian") is True
    if magic != _LEGACY_MAGIC or version != 1001 or not little:
        raise CheckpointError(
            f"{file.source}: expected version 1001 of the older torch format, little-endian, "
            f"got {brief(version, 40)}; {_RESAVE}"
        )
    file.root = read_pickle(stream, file.source, _hooks(file, storages))
    keys = read_pickle(stream, file.source)
    at = stream.tell()
    for key in keys if isinstance(keys, list) else []:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or key in file.places or at + 8 > len(file.buffer):
            raise CheckpointError(f"{file.source}: expected the storages the file lists, got {brief(key)}; {AGAIN}")
        (n_items,) = struct.unpack_from("<q", file.buffer, at)
        if n_items != storage.n_items or at + 8 + storage.n_bytes > len(file.buffer):
            raise CheckpointError(
                f"{file.source}: expected {storage.n_items} items of storage {key[:80]!a}, got {n_items} "
                f"announced in a file of {len(file.buffer)} bytes; {AGAIN}"
            )
        file.places[key] = Entry(f"storage {key}", at + 8, storage.n_bytes, None, True)
        at += 8 + storage.n_bytes
    file.kind = "torch legacy"


def _hooks(file: TensorFile, storages: dict[str, Storage]) -> Hooks:
    """Read the handful of names that make up a state dict; a ValueError here means a damaged file."""

    def persistent(pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            return NotImplemented
        _, kind, key, _, n_items = pid[:5]
        module, _, name = kind.name.rpartition(".") if isinstance(kind, Foreign) else ("", "", "")
        dtype = _STORAGE_DTYPES.get(name)
        if dtype is None or module not in ("torch", "torch.storage", "torch.cuda"):
            return NotImplemented
        if len(pid) == 6 and pid[5] is not None:  # views of storages: gone since torch 0.4
            return NotImplemented
        if not isinstance(key, str) or not is_count(n_items):
            raise ValueError("a storage without a name or size")
        storage = Storage(key, dtype, n_items)
        if storages.setdefault(key, storage).n_bytes != storage.n_bytes:
            raise ValueError("a storage with two sizes")
        return storage

    def call(name: str, args: tuple[Any, ...]) -> Any:
        if name in ("collections.OrderedDict", "builtins.dict") and not args:
            return {}
        if name == "collections.defaultdict" and len(args) <= 1:
            return {}
        if name == "torch.Size" and len(args) == 1 and isinstance(args[0], tuple):
            return args[0]
        function = name.removeprefix("torch._utils.")
        if function in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return args[0] if args and isinstance(args[0], LazyTensor) else NotImplemented
        if function not in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return NotImplemented
        if len(args) < 4 or not isinstance(args[0], Storage):
            return NotImplemented
        dtype = args[0].dtype
        if function == "_rebuild_tensor_v3":  # an untyped storage, the dtype apart
            named = args[6] if len(args) > 6 else None
            dtype = named.name.removeprefix("torch.") if isinstance(named, Foreign) else ""
            if dtype not in ITEM_BYTES:
                return NotImplemented
        return _tensor(file, args[0], dtype, args[1], args[2], args[3])

    return Hooks(call, persistent)


def _tensor(file: TensorFile, storage: Storage, dtype: str, offset: Any, shape: Any, stride: Any) -> LazyTensor:
    """Check that every element lies inside the storage. Python integers: no product here can overflow."""
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise ValueError("a tensor whose shape and strides do not match")
    if len(shape) > MAX_AXES or not all(map(is_count, (offset, *shape, *stride))):
        raise ValueError("a tensor with an impossible shape, stride or offset")
    if 0 in shape:
        return LazyTensor(file, storage, dtype, shape, (0,) * len(shape), 0)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if last >= storage.n_bytes // ITEM_BYTES[dtype]:
        raise ValueError("a tensor that reaches outside its storage")
    return LazyTensor(file, storage, dtype, shape, stride, offset)
