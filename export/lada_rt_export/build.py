"""Build a bundle: plan, resume, export and prove one stage at a time, write the manifest, give it its name.

Work goes on in `<out>.building`; only a complete, proven bundle takes the name `<out>`. A stage is identified by
everything its graph depends on, so an interrupted build goes on where it was, and a changed file rebuilds only its
stages.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import io
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import lada_rt
import numpy as np
import torch
from lada_rt.bundle import FORMAT_NAME, FORMAT_VERSION, STAGES, Bundle, FileEntry, StageEntry, file_sha256
from lada_rt.engines.cache import ENGINE_FORMAT, EngineEntry, list_engines
from lada_rt.errors import BundleError, ExportError, ParamError

from lada_rt_export.bundle_source import BundleHeader, BundleSource
from lada_rt_export.engine_builders import COMPATIBILITY, EngineJob, build_engine, check_backend, engine_device
from lada_rt_export.revision import EXPORTER_REVISION
from lada_rt_export.stage_graph import GraphJob, build_graph
from lada_rt_export.stages import StageSpec, stage_precisions, stage_spec
from lada_rt_export.to_onnx import OPSET
from lada_rt_export.workspace import Workspace, available_memory, check_disk, check_memory, locked, take

__all__ = ["BuildOptions", "build_bundle"]

#: distributions that write a graph, beside torch
_EXPORTERS: Final = ("onnx", "onnxscript", "onnx_ir")
#: interpreter, torch, exporter
_PROCESS_BYTES: Final = 1 << 30
#: exporting has a cost that does not grow with the weights
_STAGE_COST_BYTES: Final = 32 << 20

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What to build.

    Attributes:
        backend: "onnxruntime" runs the graphs themselves; "tensorrt" and "torch" add compiled engines.
        precision: see `stages.stage_precisions`; None is bf16 where engines for a GPU are built, else fp32.
        stages: those to build; the others are taken over if they are up to date.
        device: where compiled engines are to run: "auto" (a GPU if there is one), "cpu" or "cuda".
        compatibility: of "later-versions" (of TensorRT) and "ampere-plus" (GPUs), for slower engines that run on more.
        memory_bytes: what a build may take; sizes of the proof that would need more are left out and named in the
            manifest.

    Raises:
        ParamError: an unknown backend, precision or stage.
    """

    backend: str = "onnxruntime"
    precision: str | None = None
    stages: Sequence[str] = STAGES
    device: str = "auto"
    compatibility: Sequence[str] = ()
    memory_bytes: int = 16_000_000_000

    def __post_init__(self) -> None:
        if self.precision is not None:
            stage_precisions(self.precision)
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown or not self.stages:
            raise ParamError(f"--stages: expected some of {', '.join(STAGES)}, got {', '.join(unknown) or 'none'}")
        wrong = [name for name in self.compatibility if name not in COMPATIBILITY]
        if wrong or (self.compatibility and self.backend != "tensorrt"):
            raise ParamError(
                f"--compatibility: expected some of {', '.join(COMPATIBILITY)} with --backend tensorrt, "
                f"got {', '.join(self.compatibility)} with {self.backend}"
            )
        check_backend(self.backend, self.device)

    def precisions(self) -> dict[str, str]:
        """The precision of every stage."""
        if self.precision is not None:
            return stage_precisions(self.precision)
        on_gpu = self.backend != "onnxruntime" and engine_device(self.backend, self.device) == "cuda"
        return stage_precisions("bf16" if on_gpu else "fp32")


def build_bundle(
    out: Path, source: BundleSource, options: BuildOptions | None = None, log: Log = lambda line: None
) -> Bundle | None:
    """Build a bundle folder, or go on with one.

    Args:
        out: where it goes; an existing bundle there is replaced once the new one is complete.
        source: checkpoints, or what stands for them.
        options: None builds every stage for ONNX Runtime in float32.
        log: told one line per step.

    Returns:
        The new bundle, opened and verified; None if `options.stages` leaves stages out that are not up to date.

    Raises:
        ParamError: an option is wrong.
        EngineError: the backend is missing.
        CheckpointError: a source file is damaged.
        ExportError: a stage cannot be exported or misses its tolerance, disk or memory do not suffice, another process
            builds the same bundle, or `out` is something else.
    """
    options = options or BuildOptions()
    out = _own_name(out)
    if out.exists() and not (out / "manifest.json").is_file():
        raise ExportError(f"{out} exists and is not a bundle; choose another --out or remove it")
    with locked(out):
        return _Build(out, source, options, log).run()


class _Build:
    """One run of `build_bundle`, inside the lock."""

    def __init__(self, out: Path, source: BundleSource, options: BuildOptions, log: Log) -> None:
        self.out, self.source, self.options, self.log = out, source, options, log
        self.precisions = options.precisions()
        self.work = Workspace(out)
        self.old = _old_bundle(out)

    def run(self) -> Bundle | None:
        hashes = self._hash_sources()
        keys = {name: self._key(name, hashes) for name in STAGES}
        entries = {name: self._finished(name, keys[name]) for name in STAGES}
        todo = [name for name in self.options.stages if entries[name] is None]
        costs = {name: self.source.parameter_bytes(name) for name in todo}
        check_disk(self.out.parent, sum(costs.values()))
        started, done = time.monotonic(), 0
        for index, name in enumerate(todo):
            left = ""
            if done:
                rate = (time.monotonic() - started) / done
                remaining = sum(costs[n] + _STAGE_COST_BYTES for n in todo[index:])
                left = f", about {_duration(rate * remaining)} left"
            self.log(
                f"{name} ({index + 1} of {len(todo)}): {costs[name] / 4e6:.1f} M weights, {self.precisions[name]}{left}"
            )
            entries[name] = self._build_stage(name, keys[name], costs[name])
            done += costs[name] + _STAGE_COST_BYTES
        missing = [name for name, entry in entries.items() if entry is None]
        if missing:
            self.log(f"finished {', '.join(self.options.stages)}; still to be built: {', '.join(missing)}")
            return None
        return self._publish([e for e in entries.values() if e is not None], hashes)

    def _hash_sources(self) -> dict[Path, str]:
        files = self.source.source_files()
        new = [path.stat().st_size for path in files if not self.work.remembers(path)]
        if sum(new) > 1 << 30:
            self.log(f"hashing {len(new)} source files, {sum(new) / 1e9:.1f} GB")
        return {path: self.work.sha256(path) for path in files}

    def _key(self, name: str, hashes: Mapping[Path, str]) -> str:
        depends = {
            "stage": name,
            "files": [hashes[path] for path in self.source.source_files(name)],
            "facts": self.source.facts(name),
            "precision": self.precisions[name],
            "opset": OPSET,
            "versions": [
                lada_rt.__version__,
                torch.__version__,
                *map(importlib.metadata.version, _EXPORTERS),
                EXPORTER_REVISION,
            ],
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()

    def _finished(self, name: str, key: str) -> StageEntry | None:
        entry = self.work.finished(name, key)
        if entry is None and self.old is not None and name in self.old.stages:
            entry = self.old.stages[name]
            if entry.build_key != key or not self.work.adopt(entry, key, self.old.path):
                return None
        if entry is not None:
            self.log(f"{name}: up to date")
        return entry

    def _build_stage(self, name: str, key: str, weight_bytes: int) -> StageEntry:
        check_memory(name, weight_bytes + _PROCESS_BYTES)
        self.work.forget(name)
        start = time.monotonic()
        budget = min(available_memory(), self.options.memory_bytes) - 2 * weight_bytes - _PROCESS_BYTES
        spec = self._spec(name)
        entry = replace(build_graph(GraphJob(spec, self.work.bundle, max(budget, 0), self.log)), build_key=key)
        proof = entry.proof
        self.log(
            f"{name}: {entry.bytes / 1e6:.2f} MB, {entry.precision}, error {proof['max_rel_error']:.1e} of "
            f"{proof['tolerance']:.0e}, {_duration(time.monotonic() - start)}"
        )
        self.work.finish(entry, key)
        del spec
        gc.collect()
        return entry

    def _spec(self, name: str) -> StageSpec:
        return stage_spec(name, self.source.module(name), self.source.sizes, self.precisions[name])

    def _publish(self, stages: list[StageEntry], hashes: Mapping[Path, str]) -> Bundle:
        folder = self.work.bundle
        source = self.source
        files = [
            _write(folder, "tokenizer.json", source.tokenizer_json),
            _write(folder, "constants.npz", npz_bytes(latent_mean=source.latent_mean, latent_std=source.latent_std)),
        ]
        write_manifest(folder, source.header(hashes), stages, files)
        bundle = Bundle.open(folder)
        bundle.verify()
        self._keep_engines(bundle)
        for stage in self.options.stages if self.options.backend != "onnxruntime" else ():
            device = engine_device(self.options.backend, self.options.device)
            build_engine(
                EngineJob(
                    bundle,
                    stage,
                    partial(self._spec, stage),
                    self.options.backend,
                    device,
                    frozenset(self.options.compatibility),
                    self.options.memory_bytes,
                    self.log,
                    # what a profile holds does not depend on the weights
                    stage_spec(stage, torch.nn.Module(), self.source.sizes).profile,
                )
            )
            gc.collect()
        self._clear_leftovers(bundle)
        self.work.publish(self.out)
        return Bundle.open(self.out)

    def _clear_leftovers(self, bundle: Bundle) -> None:
        """Remove what interrupted builds left in the folder: files that the manifest does not name, engines that are
        half built, of another network or of an older lada-rt."""
        named = {file.path for file in bundle.all_files()} | {"manifest.json"}
        for path in [p for p in bundle.path.rglob("*") if p.is_file()]:
            inside = path.relative_to(bundle.path)
            if inside.parts[0] != "engines" and inside.as_posix() not in named:
                path.unlink()
        current = {engine.folder for engine in list_engines(bundle) if _is_current(engine, bundle)}
        for folder in (bundle.path / "engines").glob("*"):
            if folder.is_dir() and folder not in current:
                shutil.rmtree(folder)

    def _keep_engines(self, bundle: Bundle) -> None:
        """Engines of the old bundle whose network has not changed move over: building them took hours."""
        if self.old is None:
            return
        for timings in (self.old.path / "engines").glob("timings-*.cache"):
            take(timings, bundle.path / "engines" / timings.name)
        for engine in list_engines(self.old):
            if _is_current(engine, bundle):
                target = bundle.path / "engines" / engine.folder.name
                for file in engine.folder.iterdir():
                    if file.is_file():
                        take(file, target / file.name)


def _own_name(out: Path) -> Path:
    """Where a bundle is in truth: beside it there is a place to build, on the same disk, and a link to it stays."""
    try:
        return out.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle, which is a RuntimeError before Python 3.13
        raise ExportError(f"{out}: expected a place for a bundle, got {error}; choose another --out") from None


def _is_current(engine: EngineEntry, bundle: Bundle) -> bool:
    """Whether an engine was built from the bundle's own network, and not for an older lada-rt alone."""
    stage = bundle.stages.get(engine.key.stage)
    return stage is not None and stage.sha256 == engine.key.network_sha256 and engine.format_version >= ENGINE_FORMAT


def _old_bundle(out: Path) -> Bundle | None:
    try:
        return Bundle.open(out)
    except BundleError:
        return None


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def write_manifest(
    folder: Path, header: BundleHeader, stages: Iterable[StageEntry], files: Iterable[FileEntry]
) -> None:
    data: dict[str, Any] = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "written_by": f"lada-rt {lada_rt.__version__}",
        **header.to_json(),
        "stages": {s.name: s.to_json() for s in stages},
        "files": {f.path: f.to_json() for f in files},
    }
    _write(folder, "manifest.json", (json.dumps(data, indent=1) + "\n").encode())


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
        raise ExportError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another --out"
        ) from None
    return FileEntry(name, file_sha256(path), len(data))
