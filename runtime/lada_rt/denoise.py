"""The masked-diffusion loop: from an all-masked accompaniment to codes.

Source: LaDA-Band, arXiv 2604.11052; spec/lada_band d.3. How many positions stay masked after each step is known
before the loop, so each step evaluates and samples only the rows that are still masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lada_rt import _C
from lada_rt.engines.base import Engine
from lada_rt.params import GenerationParams
from lada_rt.schedule import mask_counts, selection_temperatures

__all__ = ["RecordedNoise", "denoise"]


@dataclass(frozen=True, slots=True)
class RecordedNoise:
    """Noise given from outside in place of the counter-based generator, to replay a known run.

    Attributes:
        draw: [n_steps, T, V] float32, Exp(1) variates of the token race.
        remask: [n_steps, T] float32, Gumbel or uniform variates of the remask choice.
    """

    draw: np.ndarray | None = None
    remask: np.ndarray | None = None


def denoise(
    engine: Engine,
    vocal_codes: np.ndarray,
    prefix: np.ndarray,
    params: GenerationParams,
    mask_id: int,
    *,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    recorded: RecordedNoise | None = None,
) -> np.ndarray:
    """Draw the accompaniment's codes for a vocal.

    Args:
        engine: the `denoiser` stage.
        vocal_codes: [T] int64.
        prefix: [P, D] float32, P = 0..2 condition slots.
        params: schedule, filters, temperatures and seed.
        mask_id: id of the mask token.
        on_step: called with (steps done, steps in all), first with 0.
        recorded: noise to use in place of the seed's own.

    Returns:
        [T] int64 codes, none of them masked.

    Raises:
        EngineError: the backend failed or returned logits that are not numbers.
    """
    n_frames = len(vocal_codes)
    n_steps = 1 if params.strategy == "one_shot" else params.steps
    counts = mask_counts(n_frames, n_steps, params.schedule)
    taus = selection_temperatures(n_steps, params.mask_temperature)
    noise = recorded or RecordedNoise()

    codes = np.full(n_frames, mask_id, np.int64)
    rows = np.arange(n_frames, dtype=np.int64)  # positions still masked, ascending
    on_step(0, n_steps)
    for step in range(n_steps):
        logits = engine.run(vocal_codes=vocal_codes[None], codes=codes[None], prefix=prefix[None], rows=rows)[
            "logits"
        ]  # [R, V]
        tokens, log_confidence = _C.sample(
            logits,
            rows,
            seed=params.seed,
            step=step,
            top_k=params.top_k or 0,
            top_p=params.top_p,
            temperature=params.temperature,
            exp_noise=None if noise.draw is None else noise.draw[step][rows],
        )  # [R], [R]
        rows = _C.remask(
            codes,
            rows,
            tokens,
            log_confidence,
            n_masked=int(counts[step]),
            tau=float(taus[step]),
            strategy="low_confidence" if params.strategy == "one_shot" else params.strategy,
            mask_id=mask_id,
            seed=params.seed,
            step=step,
            noise=None if noise.remask is None else noise.remask[step],
        )  # commits all but n_masked of the rows into codes
        on_step(step + 1, n_steps)
    return codes
