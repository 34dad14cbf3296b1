"""Assemble a bundle: export and prove each stage, write the constants, then the manifest.

Work goes on in `<out>.building`; only a complete, proven bundle takes the name `<out>`.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lada_rt
import numpy as np
from lada_rt.bundle import FORMAT_NAME, FORMAT_VERSION, STAGES, Bundle, FileEntry, StageEntry, file_sha256
from lada_rt.errors import BundleError, ExportError
from lada_rt.geometry import CodecGeometry

from lada_rt_export.stages import StageSpec
from lada_rt_export.to_onnx import export_stage

__all__ = ["BundleHeader", "build_bundle"]


@dataclass(frozen=True, slots=True)
class BundleHeader:
    """The part of a manifest that is not about files."""

    name: str
    trained: bool
    note: str
    geometry: CodecGeometry
    vocab_size: int
    mask_id: int
    prefix_dim: int
    max_seconds: int
    ref_chunk_samples: int
    sources: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return data | {"geometry": self.geometry.to_json(), "sources": [dict(s) for s in self.sources]}


def build_bundle(
    out: Path,
    header: BundleHeader,
    specs: Mapping[str, StageSpec],
    *,
    tokenizer_json: bytes,
    latent_mean: np.ndarray,
    latent_std: np.ndarray,
    log: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """Build a bundle folder.

    Args:
        out: where it goes; an existing bundle there is replaced once the new one is complete.
        header: names, sizes, sources.
        specs: one for each stage.
        tokenizer_json: the text tokenizer's file.
        latent_mean, latent_std: [channels, bins] float32.
        log: told one line per stage.

    Returns:
        The new bundle, opened and verified.

    Raises:
        ExportError: a stage is missing, cannot be exported or misses its tolerance, or `out` is something else.
    """
    missing = [name for name in STAGES if name not in specs]
    if missing:
        raise ExportError(f"bundle: expected every stage, missing {', '.join(missing)}")
    if out.exists() and not (out / "manifest.json").is_file():
        raise ExportError(f"{out} exists and is not a bundle; choose another --out or remove it")
    work = out.with_name(out.name + ".building")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        stages = []
        for name in STAGES:
            entry = export_stage(specs[name], work)
            log(f"{name}: {entry.bytes / 1e6:.2f} MB, largest relative error {entry.proof['max_rel_error']:.1e}")
            stages.append(entry)
        files = [
            _write(work, "tokenizer.json", tokenizer_json),
            _write(work, "constants.npz", npz_bytes(latent_mean=latent_mean, latent_std=latent_std)),
        ]
        write_manifest(work, header, stages, files)
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    bundle = Bundle.open(out)
    bundle.verify()
    return bundle


def write_manifest(
    folder: Path, header: BundleHeader, stages: Iterable[StageEntry], files: Iterable[FileEntry]
) -> None:
    data = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "written_by": f"lada-rt {lada_rt.__version__}",
        **header.to_json(),
        "stages": {s.name: s.to_json() for s in stages},
        "files": {f.path: f.to_json() for f in files},
    }
    (folder / "manifest.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def npz_bytes(**arrays: np.ndarray) -> bytes:
    """An .npz whose bytes depend on the arrays alone: numpy's own writer stamps the time into it."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, np.ascontiguousarray(array, dtype=np.float32))
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return archive.getvalue()


def _write(folder: Path, name: str, data: bytes) -> FileEntry:
    path = folder / name
    try:
        path.write_bytes(data)
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another --out"
        ) from None
    return FileEntry(name, file_sha256(path), len(data))
