"""Backends that compile engines, by name: which are there, and how one stage becomes a proven engine of a bundle.

`onnxruntime` runs a bundle's graphs as they are and has no entry here. The others are loaded when they are asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from lada_rt.bundle import Bundle
from lada_rt.engines import BACKENDS, DEVICES, machine_for
from lada_rt.engines.cache import EngineEntry, EngineKey, list_engines, misfit, this_machine, write_engine
from lada_rt.errors import EngineError, ExportError, ParamError

from lada_rt_export.revision import EXPORTER
from lada_rt_export.stages import StageSpec

__all__ = ["BUILDERS", "COMPATIBILITY", "BuiltEngine", "EngineJob", "build_engine", "check_backend", "engine_device"]

#: what a TensorRT engine may be asked to run on beside its own release and GPUs of its own architecture
COMPATIBILITY: Final = ("later-versions", "ampere-plus")

#: backend -> (module, what it needs, how to get it)
BUILDERS: Final[Mapping[str, tuple[str, str, str]]] = {
    "tensorrt": ("lada_rt_export.to_tensorrt", "tensorrt", 'pip install "lada-rt[gpu]"'),
    "torch": ("lada_rt_export.torch_builder", "torch", 'pip install "lada-rt[export]"'),
}


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """What a builder returns.

    Attributes:
        key: what it was built from and for; the exporter is added to it.
        files: in the folder the builder was given.
        proof: what was measured; `max_rel_error` and `tolerance` at least.
        description: what the runtime's loader needs beside the key.
    """

    key: EngineKey
    files: Sequence[Path]
    proof: Mapping[str, Any]
    description: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineJob:
    """Build one stage's engine for one backend.

    Attributes:
        bundle: opened and verified, with the graph.
        stage: name.
        spec: makes the stage with its float32 module.
        backend: name.
        device: "cpu" or "cuda".
        compatibility: of "later-versions" and "ampere-plus", for TensorRT.
        memory_bytes: what the proof may take; sizes that need more are left out of it.
        log: told one line per step.
        profile: of `spec()`, where it is known without the weights; None asks `spec()`.
    """

    bundle: Bundle
    stage: str
    spec: Callable[[], StageSpec]
    backend: str
    device: str
    compatibility: frozenset[str]
    memory_bytes: int
    log: Callable[[str], None]
    profile: Mapping[str, tuple[int, int, int]] | None = None


class _Builder(Protocol):
    def build(self, job: EngineJob, folder: Path) -> BuiltEngine: ...


def engine_device(backend: str, device: str) -> str:
    """What "auto" means for a compiled backend: the GPU where there is one."""
    if device != "auto":
        return device
    return "cuda" if this_machine(backend).arch.startswith("sm_") else "cpu"


def check_backend(backend: str, device: str = "auto") -> None:
    """Refuse what cannot be built here before any work is done.

    Raises:
        ParamError: an unknown backend or device.
        EngineError: the backend, or the GPU or compiler it needs, is missing.
    """
    if backend not in BACKENDS:
        raise ParamError(f"--backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if device not in ("auto", *DEVICES):
        raise ParamError(f"--device: expected one of auto, {', '.join(DEVICES)}, got {device!r}")
    if backend == "onnxruntime":
        return
    _, needs, remedy = BUILDERS[backend]
    if importlib.util.find_spec(needs) is None:
        raise EngineError(f"backend {backend}: the package {needs} is missing; install it with: {remedy}")
    has_gpu = this_machine(backend).arch.startswith("sm_")
    if not has_gpu and (device == "cuda" or backend == "tensorrt"):
        raise EngineError(
            f"backend {backend}: no NVIDIA GPU found, engines are built on the GPU they run on; see: lada-rt doctor"
        )
    if backend == "tensorrt" and device == "cpu":
        raise EngineError("backend tensorrt: expected --device cuda, it runs on NVIDIA GPUs only")
    if has_gpu and device != "cpu":
        from lada_rt.engines.torch import device_key

        device_key("cuda")  # the driver may list a GPU that torch, which proves and runs engines, does not see
    if backend == "torch":
        from lada_rt_export.host_code import check_compiler

        check_compiler("cuda" if has_gpu and device != "cpu" else "cpu")


def build_engine(job: EngineJob) -> EngineEntry:
    """Build, prove and file one engine. One that is there already is kept if it fits, is as compatible as asked, whole,
    and what this exporter would build again; otherwise it goes.

    Raises:
        EngineError: the backend failed.
        ExportError: the engine misses its tolerance; it is not written.
    """
    kept = _up_to_date(job)
    if kept is not None:
        job.log(f"{job.stage}: {job.backend} engine up to date")
        _drop_rivals(job, kept)
        return kept
    builder: _Builder = importlib.import_module(BUILDERS[job.backend][0])
    engines = job.bundle.path / "engines"
    folder = engines / f"{job.stage}.building"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.monotonic()
    try:
        built = builder.build(job, folder)
        proof = built.proof
        if not proof["max_rel_error"] <= proof["tolerance"]:
            raise ExportError(
                f"{job.stage}: the {job.backend} engine differs from the float32 module by "
                f"{proof['max_rel_error']:.2e}, allowed {proof['tolerance']:.0e}; it was not kept, choose another "
                "--precision"
            )
        entry = write_engine(engines, replace(built.key, exporter=EXPORTER), built.files, proof, built.description)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _drop_rivals(job, entry)
    job.log(
        f"{job.stage}: {job.backend} engine for {entry.key.arch}, {sum(f.bytes for f in entry.files) / 1e6:.1f} MB, "
        f"error {proof['max_rel_error']:.1e} of {proof['tolerance']:.0e}, {time.monotonic() - start:.0f} s"
    )
    return entry


def _rivals(job: EngineJob) -> list[EngineEntry]:
    """The engines that are there and that the runtime could take here in place of the one that is asked for."""
    machine = machine_for(job.backend, job.device)
    wanted = (job.stage, job.backend, *(name in job.compatibility for name in COMPATIBILITY))

    def kind(key: EngineKey) -> tuple[str | bool, ...]:
        return (key.stage, key.backend, key.any_later_version, key.arch.endswith("+"))

    return [e for e in list_engines(job.bundle) if kind(e.key) == wanted and misfit(e, job.bundle, machine) is None]


def _up_to_date(job: EngineJob) -> EngineEntry | None:
    """An engine that is there and would be built the same again."""
    for entry in _rivals(job):
        profile = job.spec().profile if job.profile is None else job.profile
        if entry.key.exporter != EXPORTER or dict(entry.key.profile) != dict(profile):
            job.log(f"{job.stage}: {job.backend} engine out of date: another exporter or profile")
            continue
        try:
            entry.verify()
        except EngineError:
            job.log(f"{job.stage}: {job.backend} engine out of date: its files are missing or altered")
            continue
        return entry
    return None


def _drop_rivals(job: EngineJob, entry: EngineEntry) -> None:
    for other in _rivals(job):
        if other.folder != entry.folder:
            shutil.rmtree(other.folder, ignore_errors=True)
