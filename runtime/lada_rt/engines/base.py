"""What the runtime asks of an engine: named arrays in, named arrays out."""

from __future__ import annotations

from typing import Protocol

import numpy as np

__all__ = ["Engine"]


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
