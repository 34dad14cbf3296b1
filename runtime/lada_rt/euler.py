"""The times at which the flow is evaluated. Known before the first evaluation, like the denoiser's schedule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["EulerTable"]

SIGMA_MIN = np.float32(1e-4)


@dataclass(frozen=True, slots=True)
class EulerTable:
    """What the solver needs at each step, [n_steps] float32 each.

    Attributes:
        t: time of the step's evaluation.
        dt: its length.
        fade: weight of the noise in the in-context frames at time t.
    """

    t: np.ndarray
    dt: np.ndarray
    fade: np.ndarray

    @classmethod
    def of(cls, n_steps: int) -> EulerTable:
        """The released solver accumulates t and takes dt from the accumulated value (spec/mucodec 3.4)."""
        times = np.linspace(0.0, 1.0, n_steps + 1, dtype=np.float32)
        t, dt = times[0], times[1] - times[0]
        rows = []
        for step in range(n_steps):
            rows.append((t, dt, 1 - (1 - SIGMA_MIN) * t))
            t = t + dt
            if step + 2 <= n_steps:
                dt = times[step + 2] - t
        return cls(*np.array(rows, np.float32).T.copy())
