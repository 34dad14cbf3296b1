"""The masked-diffusion loop: from an all-masked accompaniment to codes.

Source: LaDA-Band, arXiv 2604.11052; spec/lada_band d.3. How many positions stay masked after each step is known
before the loop, so each step evaluates and samples only the rows that are still masked. An engine on a GPU brings this
loop along (torch_loop/denoise.py), with the same codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lada_rt import _C
from lada_rt.cpus import cpu_count
from lada_rt.engines.base import Engine, loop_of
from lada_rt.errors import EngineError, ParamError
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


@dataclass(slots=True)
class FirstStep:
    """Logits of the first step, which see only masks and so are the same whatever the seed: filled once, then reused.

    Attributes:
        logits: [T, V], held while variations of one vocal are made; where the denoiser's loop runs.
    """

    logits: Any = None


def denoise(
    engine: Engine,
    vocal_codes: np.ndarray,
    prefix: np.ndarray,
    params: GenerationParams,
    mask_id: int,
    *,
    known: np.ndarray | None = None,
    span: tuple[int, int] | None = None,
    first_step: FirstStep | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    recorded: RecordedNoise | None = None,
    n_threads: int | None = None,
) -> np.ndarray:
    """Draw the accompaniment's codes for a vocal.

    Args:
        engine: the `denoiser` stage.
        vocal_codes: [T] int64.
        prefix: [P, D] float32, P = 0..2 condition slots.
        params: schedule, filters, temperatures and seed.
        mask_id: id of the mask token.
        known: [T] int64 codes to keep, `mask_id` where one is to be drawn; None draws all. The schedule runs over the
            number of positions to draw.
        span: [start, stop) that the denoiser sees, the whole song by default; only its positions are drawn. Noise is
            numbered by the position in the song, so no two spans share it.
        first_step: where to find, or leave, the logits of the first step; only with nothing known.
        on_step: called with (steps done, steps in all), first with 0.
        recorded: noise to use in place of the seed's own.
        n_threads: of the sampler on the CPU, which changes no code; None is every CPU this process may use.

    Returns:
        [T] int64 codes, none of them masked within the span.

    Raises:
        EngineError: the backend failed or returned logits that are not numbers.
    """
    loop = loop_of(engine)
    if loop is not None:
        return loop(
            vocal_codes,
            prefix,
            params,
            mask_id,
            known=known,
            span=span,
            first_step=first_step,
            on_step=on_step,
            recorded=recorded,
        )
    start, stop = span or (0, len(vocal_codes))
    codes = np.full(len(vocal_codes), mask_id, np.int64) if known is None else known.copy()
    rows = start + np.flatnonzero(codes[start:stop] == mask_id)  # positions still masked, ascending
    if len(rows) == 0:
        return codes
    n_steps = 1 if params.strategy == "one_shot" else params.steps
    counts = mask_counts(len(rows), n_steps, params.schedule)
    taus = selection_temperatures(n_steps, params.mask_temperature)
    noise = recorded or RecordedNoise()
    n_threads = n_threads or cpu_count()

    on_step(0, n_steps)
    for step in range(n_steps):
        shared = first_step if step == 0 else None
        logits = None if shared is None else shared.logits
        if logits is None:
            logits = engine.run(
                vocal_codes=vocal_codes[None, start:stop],
                codes=codes[None, start:stop],
                prefix=prefix[None],
                rows=rows - start,
            )["logits"]  # [R, V]
        if shared is not None:
            shared.logits = logits
        try:
            tokens, log_confidence = _C.sample(
                logits,
                rows,
                seed=params.seed,
                step=step,
                top_k=params.top_k or 0,
                top_p=params.top_p,
                temperature=params.temperature,
                exp_noise=None if noise.draw is None else noise.draw[step][rows],
                n_threads=n_threads,
            )  # [R], [R]
        except ParamError as error:
            raise EngineError(f"denoiser, step {step + 1}: {error}") from None
        rows = _C.remask(
            codes,
            rows,
            tokens,
            log_confidence,
            # the last step's tokens all stay, whatever a list of ratios says (spec/lada_band d.3)
            n_masked=int(counts[step]) if step + 1 < n_steps else 0,
            tau=float(taus[step]),
            strategy="low_confidence" if params.strategy == "one_shot" else params.strategy,
            mask_id=mask_id,
            seed=params.seed,
            step=step,
            noise=None if noise.remask is None else noise.remask[step],
        )  # commits all but n_masked of the rows into codes
        on_step(step + 1, n_steps)
    return codes
