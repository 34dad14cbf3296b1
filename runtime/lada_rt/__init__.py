"""lada-rt: a sung vocal in, a full-song accompaniment out.

    from lada_rt import Pipeline, GenerationParams
    result = Pipeline.load("song.bundle").generate("vocal.wav", text="warm city pop")

Importing this package loads neither a backend nor numpy's heavier neighbours; they come with `Pipeline.load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lada_rt.errors import (
    AudioError,
    BundleError,
    CheckpointError,
    EngineError,
    ExportError,
    GenerationCancelled,
    LadaError,
    ParamError,
)

if TYPE_CHECKING:
    from lada_rt.params import GenerationParams
    from lada_rt.pipeline import Pipeline
    from lada_rt.progress import Progress
    from lada_rt.results import Chunk, Result, Song, Timings
    from lada_rt.run import Stream
    from lada_rt.saved_run import load_codes, save_codes

__version__ = "0.1.0"

__all__ = [
    "AudioError",
    "BundleError",
    "CheckpointError",
    "Chunk",
    "EngineError",
    "ExportError",
    "GenerationCancelled",
    "GenerationParams",
    "LadaError",
    "ParamError",
    "Pipeline",
    "Progress",
    "Result",
    "Song",
    "Stream",
    "Timings",
    "__version__",
    "load_codes",
    "save_codes",
]

_LAZY = {
    "Chunk": "lada_rt.results",
    "GenerationParams": "lada_rt.params",
    "Pipeline": "lada_rt.pipeline",
    "Progress": "lada_rt.progress",
    "Result": "lada_rt.results",
    "Song": "lada_rt.results",
    "Stream": "lada_rt.run",
    "Timings": "lada_rt.results",
    "load_codes": "lada_rt.saved_run",
    "save_codes": "lada_rt.saved_run",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
