"""The .safetensors container: a JSON table of names, dtypes, shapes and byte ranges in front of the data."""

from __future__ import annotations

import itertools
import json
from typing import Any, Final

from lada_rt.errors import CheckpointError

from lada_rt_export.safe_zip import Entry
from lada_rt_export.tensor_file import AGAIN, ITEM_BYTES, MAX_AXES, LazyTensor, Storage, TensorFile, is_count

__all__ = ["read_safetensors"]

_DTYPES: Final = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
#: the limit of the format's own reader is 100 MB; the released networks need 60 kB
_MAX_HEADER_BYTES: Final = 16 << 20


def read_safetensors(file: TensorFile) -> None:
    """Fill `root` and `places` from a .safetensors file. The format carries no checksum.

    Raises:
        CheckpointError: damaged, cut short, or with tensors that overlap or lie outside the file.
    """
    try:
        _read(file)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = ascii(str(error))[1:-1][:300]
        raise CheckpointError(
            f"{file.source}: expected an intact .safetensors file, got one that cannot be read "
            f"({type(error).__name__}: {reason}); {AGAIN}"
        ) from error


def _read(file: TensorFile) -> None:
    header_bytes = int.from_bytes(file.buffer[:8], "little")
    data_start = 8 + header_bytes
    if header_bytes > _MAX_HEADER_BYTES or data_start > len(file.buffer):
        raise ValueError(f"a header of {header_bytes} bytes in a file of {len(file.buffer)}")
    text = bytes(file.buffer[8:data_start]).decode("utf-8")
    header = json.loads(text, object_pairs_hook=_unique_keys)
    tensors: dict[str, LazyTensor] = {}
    ranges: list[tuple[int, int]] = []
    for name, item in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = _DTYPES.get(item["dtype"]), item["shape"], item["data_offsets"]
        if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(map(is_count, (*shape, begin, end))):
            raise ValueError("a tensor with an impossible shape or offset")
        if begin > end or data_start + end > len(file.buffer):
            raise ValueError("a tensor outside the file")
        ranges.append((begin, end))
        if dtype is None:  # eight-bit floats and the like: may be there, are never needed
            continue
        strides: list[int] = []
        n_items = 1
        for size in reversed(shape):
            strides.insert(0, n_items)
            n_items *= size
        if n_items * ITEM_BYTES[dtype] != end - begin:
            raise ValueError(f"a tensor of {n_items} {dtype} in {end - begin} bytes")
        file.places[name] = Entry(name, data_start + begin, end - begin, None, True)
        stride = tuple(strides) if n_items else (0,) * len(shape)
        tensors[name] = LazyTensor(file, Storage(name, dtype, n_items), dtype, tuple(shape), stride, 0)
    ranges.sort()
    if any(first[1] > second[0] for first, second in itertools.pairwise(ranges)):
        raise ValueError("tensors that overlap")
    file.root = tensors
    file.kind = "safetensors"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key that appears twice")
    return made
