"""A run on disk: codes, latents and what made them, so that parts of it can be drawn anew another day.

An uncompressed .npz: `meta` (JSON as bytes), `codes` [T] int32, `vocal_codes` [T] int64, `prefix` [P, D] float32,
`latents` [W, 32, L, 32] float32, the layers' windows in a row. Such a file is untrusted: no pickles, nothing
compressed (so that nothing small unfolds into something huge), every type, shape and range checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lada_rt.audio import replaced_file
from lada_rt.bundle import DAMAGED_ARRAYS, Bundle, open_regular
from lada_rt.errors import LadaError, ParamError
from lada_rt.params import GenerationParams
from lada_rt.results import Layer, Origin, Result

__all__ = ["SavedRun", "load_codes", "save_codes", "vocal_sha256"]

FORMAT_NAME, FORMAT_VERSION = "lada-rt codes", 1
META_LIMIT_BYTES = 1 << 20
#: member -> dtype, dimensions
MEMBERS = {
    "meta": (np.uint8, 1),
    "codes": (np.int32, 1),
    "vocal_codes": (np.int64, 1),
    "prefix": (np.float32, 2),
    "latents": (np.float32, 4),
}


@dataclass(frozen=True, slots=True)
class SavedRun:
    """A run as read from disk; `Pipeline.restore` brings it back.

    Attributes:
        codes: [T] int32.
        params: of the latest drawing.
        origin: see `Origin`.
        vocal: sha256 of the vocal's samples.
    """

    codes: np.ndarray
    params: GenerationParams
    origin: Origin
    vocal: str

    def check_against(self, bundle: Bundle) -> None:
        """Refuse what no run of `bundle` can have made.

        Raises:
            ParamError: sizes or ids do not fit.
        """
        geometry, origin, n_codes = bundle.geometry, self.origin, len(self.codes)
        window = (geometry.latent_channels, geometry.window_latents, geometry.latent_bins)
        n_windows, n_samples = geometry.n_windows(n_codes), geometry.n_samples(n_codes)
        base = origin.layers[0]
        for ok, what in (
            (bool((self.codes >= 0).all() and (self.codes < bundle.vocab_size).all()), "codes within the vocabulary"),
            (origin.vocal_codes.shape == (n_codes,), "a vocal code for each code"),
            (
                bool((origin.vocal_codes >= 0).all() and (origin.vocal_codes < bundle.vocab_size).all()),
                "vocal codes within the vocabulary",
            ),
            (len(origin.prefix) <= 2 and origin.prefix.shape[1] == bundle.prefix_dim, "the bundle's prefix size"),
            (bool(np.isfinite(origin.prefix).all()), "a finite prefix"),
            (all(layer.latents.shape[1:] == window for layer in origin.layers), "the bundle's latent size"),
            ((base.first_window, len(base.latents)) == (0, n_windows), "the whole song in the first layer"),
            ((base.start_sample, base.stop_sample) == (0, n_samples), "the whole song in the first layer"),
            (
                all(layer.first_window + len(layer.latents) <= n_windows for layer in origin.layers),
                "windows of the song",
            ),
            (all(layer.stop_sample <= n_samples for layer in origin.layers), "layers within the song"),
            (all(bool(np.isfinite(layer.latents).all()) for layer in origin.layers), "finite latents"),
        ):
            if not ok:
                raise ParamError(f"codes file: expected {what}; it is damaged or not of this bundle, save it again")


def vocal_sha256(samples: np.ndarray) -> str:
    """Hash of a vocal [C, M] float32 as it was read."""
    digest = hashlib.sha256(repr(samples.shape).encode())
    for channel in samples:
        digest.update(np.ascontiguousarray(channel).data)
    return digest.hexdigest()


def save_codes(path: str | os.PathLike[str], result: Result) -> None:
    """Write what `load_codes` reads, whole or not at all.

    Raises:
        ParamError: the result kept no latents, or the file cannot be written.
    """
    if result.origin is None:
        raise ParamError("result: expected one that kept its latents, got none; stream with keep_latents=True")
    origin = result.origin
    meta = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "params": asdict(result.params),
        "layers": [[x.first_window, len(x.latents), x.start_sample, x.stop_sample] for x in origin.layers],
        "flow_seed": origin.flow_seed,
        "bundle_sha256": origin.bundle_sha256,
        "vocal_sha256": vocal_sha256(result.vocal),
        "start_s": origin.start_s,
        "end_s": origin.end_s,
        "long": origin.long,
    }
    with replaced_file(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
            codes=result.codes.astype(np.int32),
            vocal_codes=origin.vocal_codes.astype(np.int64),
            prefix=origin.prefix.astype(np.float32),
            latents=np.concatenate([layer.latents for layer in origin.layers]),
        )


def load_codes(path: str | os.PathLike[str]) -> SavedRun:
    """Read a run written by `save_codes`, as data only.

    Raises:
        ParamError: no such file, or not one of ours, or of a newer format, or damaged.
    """
    try:
        meta, arrays = _read_members(Path(path))
        return _parse(meta, arrays)
    except LadaError as error:
        raise ParamError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise ParamError(f"{path}: no such file; make one with: lada-rt generate --save-codes {path}") from None
    except DAMAGED_ARRAYS as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ParamError(f"{path}: expected a file of --save-codes, got something else or damaged ({detail})") from None


def _read_members(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """What `meta` says, and all members."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        size = os.fstat(file.fileno()).st_size
        # before the others, which a newer format may have more of
        raw = _read_array(archive, "meta", size)
        if len(raw) > META_LIMIT_BYTES:
            raise ValueError("meta is too long")
        meta = json.loads(raw.tobytes())
        _check_version(meta)
        if sorted(archive.namelist()) != sorted(f"{name}.npy" for name in MEMBERS):
            raise ValueError("not the expected members")
        arrays = {name: _read_array(archive, name, size) for name in MEMBERS}
    if len(arrays["codes"]) == 0:
        raise ValueError("no codes")
    return meta, arrays


def _read_array(archive: zipfile.ZipFile, name: str, archive_bytes: int) -> np.ndarray:
    dtype, n_dims = MEMBERS[name]
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed")
    if info.file_size > archive_bytes:
        raise ValueError(f"{name} is larger than the file")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{name} has npy version {version}")
        shape, fortran_order, found = np.lib.format.read_array_header_1_0(file)
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if found != dtype or len(shape) != n_dims or fortran_order or n_bytes > info.file_size:
            raise ValueError(f"{name} is {found} {list(shape)}")
        data = bytearray(file.read(n_bytes + 1))  # one more byte than there may be: the checksum is read too
    if len(data) != n_bytes:
        raise ValueError(f"{name} has {len(data)} bytes, not {n_bytes}")
    return np.frombuffer(data, dtype).reshape(shape)


def _check_version(meta: Any) -> None:
    name, version = meta["format"], meta["format_version"]
    if name != FORMAT_NAME or isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"format {name!r} version {version!r}")
    if version > FORMAT_VERSION:
        raise ParamError(
            f"saved run of version {version} is newer than this lada-rt reads ({FORMAT_VERSION}); upgrade lada-rt"
        )


def _parse(meta: Any, arrays: dict[str, np.ndarray]) -> SavedRun:
    options = dict(meta["params"])
    if isinstance(options.get("schedule"), list):
        options["schedule"] = tuple(options["schedule"])
    layers, used = [], 0
    for first, count, start, stop in meta["layers"]:
        latents = arrays["latents"][used : used + _whole(count)]
        if len(latents) != count or count == 0 or not _whole(start) < _whole(stop):
            raise ValueError("layers and latents contradict each other")
        layers.append(Layer(_whole(first), latents, start, stop))
        used += count
    if used != len(arrays["latents"]) or not layers:
        raise ValueError("layers and latents contradict each other")
    for name in ("bundle_sha256", "vocal_sha256"):
        if not isinstance(meta[name], str):
            raise ValueError(f"{name} is not text")
    if not isinstance(meta["long"], bool):
        raise ValueError("long is not true or false")
    origin = Origin(
        vocal_codes=arrays["vocal_codes"],
        prefix=arrays["prefix"],
        layers=tuple(layers),
        flow_seed=_whole(meta["flow_seed"]),
        bundle_sha256=meta["bundle_sha256"],
        start_s=meta["start_s"],
        end_s=meta["end_s"],
        long=meta["long"],
    )
    return SavedRun(arrays["codes"], GenerationParams(**options), origin, meta["vocal_sha256"])


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(f"expected a whole number, got {value!r}")
    return value
