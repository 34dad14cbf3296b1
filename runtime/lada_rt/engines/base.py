"""What the runtime asks of an engine: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

__all__ = ["Engine", "loop_of", "released"]


class Engine(Protocol):
    """One loaded stage. `run` may be called from several threads at once."""

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Evaluate the stage.

        Args:
            inputs: one C-contiguous array for each input the manifest names, of its dtype and shape.

        Returns:
            One array for each output the manifest names.

        Raises:
            EngineError: the backend failed, or an input does not fit.
        """
        ...


def loop_of(engine: Engine) -> Callable[..., Any] | None:
    """The loop around a stage where the engine runs it itself, on its own device; None where `run` is all it has.

    Such an engine has an attribute `loop`, which takes what follows the engine in the arguments of `denoise.denoise`
    (denoiser), `decode.decode_latents` (flow) or `decode.render_pieces` (mel decoder, the vocoder included), and gives
    what they give. Those functions hand over to it, so that each of their callers runs on the device without knowing.
    """
    return getattr(engine, "loop", None)


@contextmanager
def released(engine: Engine) -> Iterator[None]:
    """Afterwards, let an engine give back what the sizes of its runs made it reserve, where it reserves anything."""
    try:
        yield
    finally:
        release = getattr(engine, "release", None)
        if release is not None:
            release()
