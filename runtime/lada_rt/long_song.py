"""Songs longer than the denoiser takes: overlapping spans, each continuing from codes already drawn.

A span sees `max_codes` frames of the song. The codes it shares with the span before are fixed when it starts, so both
spans hold the same ones, and what is new is drawn to fit them. Memory is that of one span, whatever the song's length.
Decoding needs no such care: its windows are of one size anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lada_rt.denoise import FirstStep, denoise
from lada_rt.engines.base import Engine
from lada_rt.params import GenerationParams

__all__ = ["denoise_spans", "spans"]

#: part of a span that is already drawn when it starts
OVERLAP = 0.25


def spans(n_codes: int, max_codes: int) -> list[tuple[int, int]]:
    """Where the spans of a song start and stop.

    Args:
        n_codes: length of the song.
        max_codes: length of a span; at least 1.

    Returns:
        (start, stop) pairs. One for a song that fits; else all are of `max_codes`, and the last ends with the song, so
        that it sees as much of what is known as the others do.
    """
    if n_codes <= max_codes:
        return [(0, n_codes)]
    hop = max_codes - int(max_codes * OVERLAP)
    starts = [*range(0, n_codes - max_codes, hop), n_codes - max_codes]
    return [(start, start + max_codes) for start in starts]


def denoise_spans(
    engine: Engine,
    vocal_codes: np.ndarray,
    prefix: np.ndarray,
    params: GenerationParams,
    mask_id: int,
    *,
    max_codes: int,
    known: np.ndarray | None = None,
    first_step: FirstStep | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    n_threads: int | None = None,
) -> np.ndarray:
    """`denoise`, span by span. A song that fits in one span is denoised at once.

    Args:
        engine, vocal_codes, prefix, params, mask_id, known, first_step, n_threads: see `denoise`.
        max_codes: longest span.
        on_step: called with (steps done, steps in all) over all spans, first with 0.

    Returns:
        [T] int64 codes, none of them masked.
    """
    codes = np.full(len(vocal_codes), mask_id, np.int64) if known is None else known.copy()
    todo = _spans_to_draw(codes == mask_id, max_codes)
    for index, span in enumerate(todo):
        codes = denoise(
            engine,
            vocal_codes,
            prefix,
            params,
            mask_id,
            known=codes,
            span=span,
            first_step=first_step if index == 0 else None,
            on_step=_steps_of_span(on_step, index, len(todo)),
            n_threads=n_threads,
        )
    return codes


def _spans_to_draw(masked: np.ndarray, max_codes: int) -> list[tuple[int, int]]:
    """Where the denoiser is to look. What fits into one span is drawn in one, in the middle of all that it can see: a
    region of a finished song is to lead from what is before it to what comes after."""
    where = np.flatnonzero(masked)
    if len(where) == 0:
        return []
    first, stop = int(where[0]), int(where[-1]) + 1
    if stop - first <= max_codes:
        start = max(0, min((first + stop - max_codes) // 2, len(masked) - max_codes))
        return [(start, min(start + max_codes, len(masked)))]
    todo, drawn_to = [], 0
    for start, end in spans(len(masked), max_codes):
        if masked[max(start, drawn_to) : end].any():  # else all its codes are known
            todo.append((start, end))
            drawn_to = end
    return todo


def _steps_of_span(on_step: Callable[[int, int], None], index: int, n_spans: int) -> Callable[[int, int], None]:
    """Count steps over all spans. A later span's first 0 has been told, as the last step of the one before; those that
    follow while it waits for its turn are told, as whoever listens may stop the run."""
    told = index == 0

    def of_span(done: int, total: int) -> None:
        nonlocal told
        if done or told:
            on_step(index * total + done, n_spans * total)
        told = True

    return of_span
