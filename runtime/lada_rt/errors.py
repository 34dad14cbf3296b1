"""Every error lada-rt raises on purpose. A message says what was expected, what came, and the remedy, in one line."""

from __future__ import annotations

__all__ = [
    "AudioError",
    "BundleError",
    "CheckpointError",
    "EngineError",
    "ExportError",
    "GenerationCancelled",
    "LadaError",
    "ParamError",
]


class LadaError(Exception):
    """Base of all lada-rt errors."""

    #: exit code of the command line for this error
    exit_code = 1

    def __init__(self, message: str = "") -> None:
        # one line, whatever a value's repr brings along
        super().__init__(" ".join(str(message).split()))


class ParamError(LadaError, ValueError):
    """An option or argument is out of range, of the wrong type or shape, or an output cannot be written."""

    exit_code = 2


class AudioError(LadaError):
    """An audio input cannot be used."""

    exit_code = 3


class BundleError(LadaError):
    """A bundle is missing, damaged, of a newer format, or incomplete."""

    exit_code = 4


class CheckpointError(LadaError):
    """A checkpoint file is damaged, unsafe, or does not hold the expected tensors."""

    exit_code = 4


class ExportError(LadaError):
    """A stage could not be exported, or an engine missed its tolerance."""

    exit_code = 4


class EngineError(LadaError):
    """A backend or device is missing, an engine does not fit this machine, or a run failed or ran out of memory."""

    exit_code = 5


class GenerationCancelled(LadaError):
    """The progress callback returned False, or the caller closed the stream."""

    exit_code = 130


def missing_for_export(what: str, error: ImportError) -> EngineError:
    """What to say where a package of the export extra is not installed."""
    import importlib.util

    # `cpu` beside the GPU build of ONNX Runtime would take its place: both live in one folder
    extras = "export" if importlib.util.find_spec("onnxruntime") is not None else "export,cpu"
    return EngineError(f'{what}: {error.name} is missing; install it with: pip install "lada-rt[{extras}]"')
