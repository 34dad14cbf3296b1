"""Write torch zip files in the layout of torch.save, one tensor at a time: memory stays at one piece of one tensor."""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["PlannedTensor", "write_torch_zip"]

_ALIGNMENT: Final = 64
_LOCAL_HEADER_BYTES: Final = 30
_ZIP64_EXTRA_BYTES: Final = 20


@dataclass(frozen=True, slots=True, eq=False)
class PlannedTensor:
    """A tensor that is made when it is written: `values()` yields its elements in order, float32 or int64."""

    shape: tuple[int, ...]
    values: Callable[[], Iterator[NDArray[Any]]]
    dtype: str = "float32"

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True, eq=False)
class _PlannedStorage:
    key: str
    tensor: PlannedTensor


class _Pickler(pickle.Pickler):
    """Writes planned tensors as torch.save writes tensors: a rebuild call on a storage with a persistent id."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)
        self.storages: list[PlannedTensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _PlannedStorage):
            return None
        kind = torch.LongStorage if obj.tensor.dtype == "int64" else torch.FloatStorage
        return ("storage", kind, obj.key, "cpu", math.prod(obj.tensor.shape))

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, PlannedTensor):
            return NotImplemented
        storage = _PlannedStorage(str(len(self.storages)), obj)
        self.storages.append(obj)
        stride = tuple(math.prod(obj.shape[axis + 1 :]) for axis in range(len(obj.shape)))
        hooks: OrderedDict[str, Any] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, stride, False, hooks)


def write_torch_zip(path: Path, structure: Any) -> None:
    """Write what `torch.save(structure, path)` would, with `PlannedTensor`s in place of tensors.

    Args:
        path: the file; written under another name and then renamed.
        structure: anything picklable.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(structure)
    unfinished = path.with_name(path.name + ".part")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, f"{path.stem}/data.pkl", iter([stream.getvalue()]))
        _add(archive, f"{path.stem}/byteorder", iter([b"little"]))
        for key, tensor in enumerate(pickler.storages):
            _add(archive, f"{path.stem}/data/{key}", _checked_bytes(tensor))
        _add(archive, f"{path.stem}/version", iter([b"3\n"]))
    unfinished.replace(path)


def _add(archive: zipfile.ZipFile, name: str, pieces: Iterator[bytes]) -> None:
    # a fixed date: the same seed gives the same file
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    assert archive.fp is not None
    start = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(name.encode()) + _ZIP64_EXTRA_BYTES + 4
    padding = -start % _ALIGNMENT  # so that a mapped tensor is aligned
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as entry:
        for piece in pieces:
            entry.write(piece)


def _checked_bytes(tensor: PlannedTensor) -> Iterator[bytes]:
    n_bytes = 0
    for piece in tensor.values():
        assert piece.dtype == tensor.dtype
        n_bytes += piece.nbytes
        yield piece.tobytes()
    assert n_bytes == tensor.n_bytes
