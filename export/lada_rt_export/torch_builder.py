"""AOTInductor packages of a stage as an engine of a bundle."""

from __future__ import annotations

from pathlib import Path

from lada_rt.engines.cache import EngineKey, this_machine

from lada_rt_export.engine_builders import BuiltEngine, EngineJob
from lada_rt_export.to_aoti import build_engine

__all__ = ["build"]


def build(job: EngineJob, folder: Path) -> BuiltEngine:
    """Compile the stage with torch and compare it with the float32 module.

    Args:
        job: stage, bundle and options.
        folder: empty, for this stage; the packages are written there.

    Raises:
        EngineError: the device is missing.
        ExportError: torch cannot compile the stage, or it misses its tolerance.
    """
    spec = job.spec()
    stage = job.bundle.stages[job.stage]
    description = build_engine(spec, folder, precision=spec.precision, device=job.device, memory_bytes=job.memory_bytes)
    # Not torch.__version__, which may have a suffix that the distribution's version has not: the runtime, which looks
    # before it imports torch, compares the latter.
    version = this_machine("torch", job.device).backend_version
    assert version is not None
    key = EngineKey(
        stage=job.stage,
        network_sha256=stage.sha256,
        backend="torch",
        backend_version=version,
        arch=description["device_key"],
        precision=stage.precision,
        profile=spec.profile,
    )
    proof = {"method": f"AOTInductor package on {job.device}", **description["proof"]}
    return BuiltEngine(key, [folder / part["file"] for part in description["parts"]], proof, description)
