"""A bundle on disk: manifest, hashes, stages.

Layout:

    manifest.json       format version, geometry, sizes, one entry per stage, sha256 and size of every other file
    graphs/*.onnx       one graph per stage, with external data beside it for large weights; where it pays, a second
                        one, <stage>.cpu.onnx, in operators that only ONNX Runtime on CPUs has, over the same weights
    tokenizer.json      text tokenizer
    constants.npz       small arrays the runtime itself needs (latent mean and deviation)
    engines/<key>/      compiled engines, rebuilt when stale; not part of the bundle's hash

A bundle is untrusted: paths may not leave its folder, nothing but regular files is opened, and every byte of graphs and
files is checked against the manifest before use. Not so engines/, which no manifest names: they are native code, built
for one machine, and a bundle from elsewhere should come without them. Their own entries name their hashes, which
`inspect` and every load check.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lada_rt.errors import BundleError
from lada_rt.geometry import CodecGeometry

__all__ = [
    "DAMAGED_ARRAYS",
    "FORMAT_VERSION",
    "STAGES",
    "Bundle",
    "FileEntry",
    "StageEntry",
    "TensorEntry",
    "demo_bundle_path",
    "file_sha256",
    "open_regular",
    "parse_proof",
    "parse_stage",
    "read_json",
]

FORMAT_NAME = "lada-rt bundle"
FORMAT_VERSION = 1
STAGES = ("encoder", "text_encoder", "ref_encoder", "denoiser", "flow", "mel_decoder", "vocoder")
MANIFEST_LIMIT_BYTES = 16 << 20
#: what numpy and zipfile raise on .npy and .npz files that are damaged, forged or something else
DAMAGED_ARRAYS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RuntimeError,
    OverflowError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle: POSIX path relative to its folder, sha256 in hex, size in bytes."""

    path: str
    sha256: str
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "sha256": self.sha256, "bytes": self.bytes}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A named input or output; a dimension is an int or the name of a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class StageEntry:
    """One network: its graph, what it takes and returns, its precision and the error measured when it was built."""

    name: str
    graph: FileEntry
    external_data: tuple[FileEntry, ...]
    precision: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    proof: Mapping[str, Any] = field(default_factory=dict)
    #: names everything the graph was made from; the same key means that building it again would change nothing
    build_key: str = ""
    #: the same network for ONNX Runtime on CPUs, its weights in `external_data`; None where it would not be faster
    cpu_graph: FileEntry | None = None

    @property
    def files(self) -> tuple[FileEntry, ...]:
        return (self.graph, *self.external_data, *((self.cpu_graph,) if self.cpu_graph else ()))

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.files)

    @property
    def sha256(self) -> str:
        """Of the network: the graph's and its external data's, since no large weight need lie in the graph itself."""
        return hashlib.sha256("".join(f.sha256 for f in (self.graph, *self.external_data)).encode()).hexdigest()

    def input_shape(self, name: str) -> tuple[int | str, ...]:
        """Shape of an input.

        Raises:
            BundleError: the stage has no such input.
        """
        for tensor in self.inputs:
            if tensor.name == name:
                return tensor.shape
        raise BundleError(f"stage {self.name}: expected an input {name}; rebuild the bundle")

    def to_json(self) -> dict[str, Any]:
        return {
            "graph": self.graph.to_json(),
            "external_data": [f.to_json() for f in self.external_data],
            "precision": self.precision,
            "inputs": [t.to_json() for t in self.inputs],
            "outputs": [t.to_json() for t in self.outputs],
            "proof": dict(self.proof),
            "build_key": self.build_key,
            **({"cpu_graph": self.cpu_graph.to_json()} if self.cpu_graph else {}),
        }


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle. `open` has checked its structure; `verify` checks the bytes."""

    path: Path
    name: str
    trained: bool
    note: str
    geometry: CodecGeometry
    vocab_size: int
    mask_id: int
    prefix_dim: int
    max_seconds: float
    ref_chunk_samples: int
    stages: Mapping[str, StageEntry]
    files: Mapping[str, FileEntry]
    sources: tuple[Mapping[str, Any], ...]
    sha256: str

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and check `manifest.json` (not the other files' bytes: see `verify`).

        Raises:
            BundleError: no bundle there, a newer format, a manifest that is damaged or incomplete, or something other
                than a file where it names one.
        """
        folder = Path(path)
        manifest_path = folder / "manifest.json"
        # os.path, as the methods of Path raise where a name is too long or a folder is closed to us
        if not os.path.isfile(manifest_path):
            what = "no such folder"
            if os.path.isdir(folder):
                there = os.path.lexists(manifest_path)
                what = "its manifest.json is not a regular file" if there else "no manifest.json in it"
            raise BundleError(
                f"{folder}: expected a bundle folder, {what}; correct the path, or build it with: lada-rt build-engine"
            )
        try:
            data = read_json(manifest_path, MANIFEST_LIMIT_BYTES)
            if not isinstance(data, dict):
                raise ValueError("not an object")
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(
                f"{manifest_path}: expected a JSON manifest, {_one_line(error)}; fetch or rebuild the bundle"
            ) from None
        bundle = cls._parse(folder, data)
        for file in map(bundle.file_path, bundle.all_files()):
            # here and not in `verify` alone: a pipe is waited for, and a device may never end
            if os.path.exists(file) and not os.path.isfile(file):
                raise BundleError(f"{file}: cannot be read (not a regular file); fetch or rebuild the bundle")
        return bundle

    @classmethod
    def _parse(cls, folder: Path, data: dict[str, Any]) -> Bundle:
        name, version = data.get("format"), data.get("format_version")
        if name != FORMAT_NAME or isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise BundleError(
                f"{folder}/manifest.json: expected format {FORMAT_NAME!r} and a version from 1 on, got "
                f"{repr(name)[:80]} and {repr(version)[:80]}; rebuild the bundle"
            )
        if version > FORMAT_VERSION:
            raise BundleError(
                f"{folder}: bundle format {version} is newer than this lada-rt reads "
                f"({FORMAT_VERSION}); upgrade lada-rt"
            )
        try:
            stages = {name: parse_stage(name, entry) for name, entry in _mapping(data["stages"]).items()}
            files = {name: _parse_file(entry) for name, entry in _mapping(data["files"]).items()}
            bundle = cls(
                path=folder,
                name=_text(data["name"]),
                trained=_boolean(data["trained"]),
                note=_text(data["note"]),
                geometry=CodecGeometry.from_json(data["geometry"]),
                vocab_size=_positive(data["vocab_size"]),
                mask_id=_positive(data["mask_id"]),
                prefix_dim=_positive(data["prefix_dim"]),
                max_seconds=float(_positive(data["max_seconds"])),
                ref_chunk_samples=_positive(data["ref_chunk_samples"]),
                stages=stages,
                files=files,
                sources=tuple(_mapping(s) for s in data["sources"]),
                sha256=manifest_sha256(data),
            )
        except BundleError as error:
            raise BundleError(f"{folder}/manifest.json: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BundleError(
                f"{folder}/manifest.json: damaged or incomplete ({_one_line(error)}); rebuild the bundle"
            ) from None
        missing = [s for s in STAGES if s not in stages] + [
            f for f in ("tokenizer.json", "constants.npz") if f not in files
        ]
        if missing:
            raise BundleError(
                f"{folder}: the manifest lacks {', '.join(missing)}; build the bundle again without --stages"
            )
        return bundle

    def all_files(self) -> list[FileEntry]:
        return [f for stage in self.stages.values() for f in stage.files] + list(self.files.values())

    def verify(self) -> None:
        """Compare size and sha256 of every file with the manifest.

        Raises:
            BundleError: a file is missing, truncated or altered.
        """
        for entry in self.all_files():
            path = self.file_path(entry)
            try:
                size = path.stat().st_size
                if size != entry.bytes:
                    raise BundleError(
                        f"{path}: expected {entry.bytes} bytes, got {size}; the file is damaged, "
                        "fetch or rebuild the bundle"
                    )
                digest = file_sha256(path)
            except OSError as error:
                raise BundleError(f"{path}: cannot be read ({error.strerror}); fetch or rebuild the bundle") from None
            if digest != entry.sha256:
                raise BundleError(
                    f"{path}: expected sha256 {entry.sha256[:12]}…, got {digest[:12]}…; the file was "
                    "altered, fetch or rebuild the bundle"
                )

    def summary(self) -> dict[str, Any]:
        """What the manifest says, as plain data."""
        return {
            "name": self.name,
            "trained": self.trained,
            "note": self.note,
            "geometry": self.geometry.to_json(),
            "vocab_size": self.vocab_size,
            "mask_id": self.mask_id,
            "prefix_dim": self.prefix_dim,
            "max_seconds": self.max_seconds,
            "ref_chunk_samples": self.ref_chunk_samples,
            "stages": {name: stage.to_json() for name, stage in self.stages.items()},
            "files": {name: entry.to_json() for name, entry in self.files.items()},
            "sources": [dict(s) for s in self.sources],
        }

    def file_path(self, entry: FileEntry) -> Path:
        return self.path / entry.path

    def ref_hidden_size(self) -> int:
        """Width H of the reference encoder's `frame_sum` [1, H].

        Raises:
            BundleError: it has no such input.
        """
        shape = self.stages["ref_encoder"].input_shape("frame_sum")
        if len(shape) != 2 or not isinstance(shape[1], int):
            raise BundleError(f"stage ref_encoder: expected frame_sum [1, H], got {list(shape)}; rebuild the bundle")
        return shape[1]

    def constants(self) -> dict[str, np.ndarray]:
        """The arrays of `constants.npz`: latent_mean, latent_std, both float32 [latent_channels, latent_bins]."""
        path = self.file_path(self.files["constants.npz"])
        shape = (self.geometry.latent_channels, self.geometry.latent_bins)
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in ("latent_mean", "latent_std")}
        except DAMAGED_ARRAYS as error:
            raise BundleError(f"{path}: expected latent statistics, {_one_line(error)}; rebuild the bundle") from None
        for name, array in arrays.items():
            if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
                raise BundleError(
                    f"{path}: {name}: expected finite float32 {list(shape)}, got {array.dtype} "
                    f"{list(array.shape)}; rebuild the bundle"
                )
        return arrays


def demo_bundle_path() -> Path:
    """Folder of the embedded demo bundle."""
    return Path(__file__).parent / "demo.bundle"


def manifest_sha256(data: Mapping[str, Any]) -> str:
    """Hash that identifies a bundle: its manifest's in canonical form, which names the hash of every other file.

    What was measured when it was built is left out: the last digits of an error depend on the machine.
    """
    stages = data.get("stages")
    if isinstance(stages, dict):
        stages = {
            k: {n: v for n, v in s.items() if n != "proof"} if isinstance(s, dict) else s for k, s in stages.items()
        }
    canonical = json.dumps({**data, "stages": stages}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def open_regular(path: Path) -> BufferedReader:
    """Open an untrusted file to read.

    Raises:
        OSError: it cannot be opened, or is a pipe or a device, which is not tried: that alone may wait for ever.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return path.open("rb")


def read_json(path: Path, limit_bytes: int) -> Any:
    """JSON of an untrusted file.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read, is longer, or is something else.
    """
    with open_regular(path) as file:
        raw = file.read(limit_bytes + 1)
    if len(raw) > limit_bytes:
        raise ValueError(f"more than {limit_bytes} bytes")
    return json.loads(raw)


def file_sha256(path: Path) -> str:
    """Hash of a regular file; see `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_stage(name: str, data: Any) -> StageEntry:
    """A stage's entry from untrusted JSON.

    Raises:
        BundleError, KeyError, TypeError, ValueError: it is not one.
    """
    data = _mapping(data)
    return StageEntry(
        name=name,
        graph=_parse_file(data["graph"]),
        external_data=tuple(_parse_file(f) for f in data["external_data"]),
        precision=_text(data["precision"]),
        inputs=tuple(_parse_tensor(t) for t in data["inputs"]),
        outputs=tuple(_parse_tensor(t) for t in data["outputs"]),
        proof=parse_proof(data["proof"]),
        build_key=_text(data.get("build_key", "")),
        cpu_graph=_parse_file(data["cpu_graph"]) if "cpu_graph" in data else None,
    )


def parse_proof(data: Any) -> dict[str, Any]:
    """What was measured of a stage, from untrusted JSON: its `max_rel_error`, where it has one, is a number.

    Raises:
        TypeError, ValueError, OverflowError: it is not one.
    """
    proof = _mapping(data)
    if "max_rel_error" in proof:
        error = proof["max_rel_error"]
        if isinstance(error, bool) or not isinstance(error, int | float):
            raise ValueError(f"expected an error as a number, got {error!r}")
        float(error)
    return proof


def _parse_file(data: Any) -> FileEntry:
    data = _mapping(data)
    path = PurePosixPath(_text(data["path"]))
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in str(path) or "\0" in str(path):
        raise BundleError(f"file path {str(path)!r} leaves the bundle folder; do not use this bundle")
    digest = _text(data["sha256"])
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise ValueError(f"bad sha256 {digest[:80]!r}")
    size = data["bytes"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"bad size {size!r}")
    return FileEntry(str(path), digest, size)


def _parse_tensor(data: Any) -> TensorEntry:
    data = _mapping(data)
    if data["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {data['dtype']!r}")
    shape = tuple(d if isinstance(d, str) else _positive(d) for d in data["shape"])
    return TensorEntry(_text(data["name"]), data["dtype"], shape)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r}")
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return value


def _positive(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**53:
        raise ValueError(f"expected a positive integer, got {value!r}")
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
