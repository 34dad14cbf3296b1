"""What `lada-rt build-engine` does, behind the command line's options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lada_rt.bundle import STAGES, Bundle

from lada_rt_export.build import BuildOptions, build_bundle
from lada_rt_export.bundle_source import BundleSource
from lada_rt_export.demo.source import DEMO_WEIGHTS, TrainedSource
from lada_rt_export.release import Release
from lada_rt_export.release_modules import ReleaseSource

__all__ = ["build"]


def build(
    out: Path,
    *,
    checkpoint: Path | None = None,
    pretrained_root: Path | None = None,
    tokenizer: Path | None = None,
    backend: str = "onnxruntime",
    precision: str | None = None,
    device: str = "auto",
    compatibility: str | None = None,
    max_seconds: int = 360,
    memory_gb: float = 16.0,
    stages: str | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Bundle | None:
    """Build a bundle from released files, or the demo bundle when none are given.

    Args:
        out: the bundle's folder.
        checkpoint, pretrained_root, tokenizer: see `Release.locate`.
        backend, precision, device: see `BuildOptions`.
        compatibility: names joined by commas; None is none.
        max_seconds: longest song.
        memory_gb: see `BuildOptions.memory_bytes`.
        stages: names joined by commas; None is all.
        log: told one line per step.

    Returns:
        The bundle; None if stages are still to be built.

    Raises:
        ParamError, EngineError, CheckpointError, ExportError: see `build_bundle`.
    """
    chosen = STAGES if stages is None else tuple(name.strip() for name in stages.split(","))
    options = BuildOptions(
        backend=backend,
        precision=precision,
        stages=chosen,
        device=device,
        compatibility=() if compatibility is None else tuple(name.strip() for name in compatibility.split(",")),
        memory_bytes=int(memory_gb * 1e9),
    )
    source: BundleSource
    if checkpoint is None or pretrained_root is None:
        source = TrainedSource(DEMO_WEIGHTS)
    else:
        source = ReleaseSource(Release.locate(checkpoint, pretrained_root, tokenizer), max_seconds)
    return build_bundle(out, source, options, log)
