"""AOTInductor packages of a stage as an engine of a bundle."""

from __future__ import annotations

from pathlib import Path

from lada_rt.engines.cache import EngineKey

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
    description = build_engine(spec, folder, precision=spec.precision, device=job.device)
    key = EngineKey(
        stage=job.stage,
        graph_sha256=stage.graph.sha256,
        backend="torch",
        backend_version=description["torch"],
        arch=description["device_key"],
        precision=stage.precision,
        profile=spec.profile,
    )
    proof = {"method": f"AOTInductor package on {job.device}", **description["proof"]}
    return BuiltEngine(key, [folder / part["file"] for part in description["parts"]], proof, description)
