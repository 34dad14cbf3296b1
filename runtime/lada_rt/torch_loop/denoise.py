"""The masked-diffusion loop with nothing but launches: codes, rows, logits and noise stay on the device.

It draws the codes of lada_rt/denoise.py, given the same logits. How many rows each step has, and how strongly noise
stirs the choice, is known before the loop, so these go along as kernel arguments and no step waits for another.
Source: LaDA-Band, arXiv 2604.11052; spec/lada_band d.3.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from lada_rt_kernels import remask, sample
from torch import Tensor

from lada_rt.errors import EngineError, ParamError
from lada_rt.params import GenerationParams
from lada_rt.schedule import mask_counts, selection_temperatures
from lada_rt.torch_loop.buckets import row_bucket
from lada_rt.torch_loop.device import (
    DeviceEngine,
    GraphPool,
    Pace,
    Replay,
    Turn,
    engine_errors,
    on_device,
    to_device,
    to_host,
)

if TYPE_CHECKING:
    from lada_rt.denoise import FirstStep, RecordedNoise

__all__ = ["DenoiseLoop"]

#: song lengths whose graphs are kept
MAX_LENGTHS = 4


class _Length:
    """Fixed tensors and captured evaluations for spans of one length and prefixes of one size."""

    def __init__(self, engine: DeviceEngine, n_frames: int, prefix_shape: tuple[int, ...], pool: GraphPool) -> None:
        device = pool.device
        self._engine = engine
        self._pool = pool
        self.vocal_codes = torch.zeros(1, n_frames, dtype=torch.int64, device=device)
        self.codes = torch.zeros(1, n_frames, dtype=torch.int64, device=device)
        self.prefix = torch.zeros(1, *prefix_shape, dtype=torch.float32, device=device)
        #: frames still masked; past them any frame of the span, evaluated for nothing
        self.rows = torch.zeros(row_bucket(n_frames, n_frames), dtype=torch.int64, device=device)
        self._replays: dict[int, Replay] = {}

    def logits(self, n_rows: int) -> Tensor:
        """[n_rows, V] of the first rows, valid until the next call."""
        bucket = row_bucket(n_rows, self.codes.shape[1])
        if bucket not in self._replays:
            self._replays[bucket] = Replay(lambda: self._evaluate(bucket), self._pool)
        logits = self._replays[bucket]()
        assert logits is not None
        return logits[:n_rows]

    def release(self) -> None:
        for replay in self._replays.values():
            replay.release()

    def _evaluate(self, bucket: int) -> Tensor:
        return self._engine.run_device(
            vocal_codes=self.vocal_codes, codes=self.codes, prefix=self.prefix, rows=self.rows[:bucket]
        )["logits"]


class DenoiseLoop:
    """The loop around one `denoiser` engine, with its graphs. Thread-safe: songs take turns."""

    def __init__(
        self, engine: DeviceEngine, device: torch.device, *, capture: bool = True, impl: str | None = None
    ) -> None:
        """Args: engine: the stage; device: its device; capture: use CUDA graphs; impl: of the kernels."""
        self._engine = engine
        self._device = device
        self._impl = impl
        self._pool = GraphPool(device, capture=capture)
        self._turn = Turn(device)
        self._lengths: OrderedDict[tuple[int, ...], _Length] = OrderedDict()

    def denoise(
        self,
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
    ) -> np.ndarray:
        """Draw the accompaniment's codes for a vocal; arguments and result as for `lada_rt.denoise.denoise`.

        `on_step` counts steps queued; the device is at most four behind. `first_step` keeps its logits on the device.

        Raises:
            EngineError: the backend failed, ran out of memory or returned logits that are not numbers.
        """
        start, stop = span or (0, len(vocal_codes))
        given = np.full(len(vocal_codes), mask_id, np.int64) if known is None else known
        masked = start + np.flatnonzero(given[start:stop] == mask_id)
        if len(masked) == 0:
            return given.copy()
        n_steps = 1 if params.strategy == "one_shot" else params.steps
        waiting = partial(on_step, 0, n_steps)
        with engine_errors("denoiser"), self._turn.taken(waiting), on_device("denoise", self._device):
            song = self._length(stop - start, prefix.shape)
            song.vocal_codes[0].copy_(to_device(vocal_codes[start:stop], self._device))
            song.prefix[0].copy_(to_device(prefix, self._device))
            codes = to_device(given, self._device)  # [T]
            rows = to_device(masked, self._device)  # positions still masked, ascending
            codes = self._steps(song, codes, rows, start, params, mask_id, first_step, on_step, recorded)
            drawn = to_host(codes)
        if (drawn[start:stop] < 0).any():
            raise EngineError(
                "denoiser: expected logits that are numbers, got NaN or infinity; rebuild its engine, with "
                "--precision fp32 if it happens again"
            )
        return drawn

    def _steps(
        self,
        song: _Length,
        codes: Tensor,
        rows: Tensor,
        start: int,
        params: GenerationParams,
        mask_id: int,
        first_step: FirstStep | None,
        on_step: Callable[[int, int], None],
        recorded: RecordedNoise | None,
    ) -> Tensor:
        """Queue every step; nothing here waits, but for the pace. Returns the codes, all -1 after bad logits."""
        stop = start + song.codes.shape[1]
        one_shot = params.strategy == "one_shot"
        n_steps = 1 if one_shot else params.steps
        counts = mask_counts(len(rows), n_steps, params.schedule)
        counts[-1] = 0  # the last step commits all that is left
        taus = selection_temperatures(n_steps, params.mask_temperature)
        n_bad = torch.zeros((), dtype=torch.int64, device=self._device)
        pace = Pace(self._device)
        on_step(0, n_steps)
        for step in range(n_steps):
            song.codes[0].copy_(codes[start:stop])
            song.rows[: len(rows)].copy_(rows - start)
            with on_device("denoiser", self._device):
                logits = self._logits(song, len(rows), first_step if step == 0 else None)  # [R, V]
            with on_device("sample", self._device):
                draw, scores = self._recorded(recorded, step, rows)
                try:
                    tokens, log_confidence = sample(
                        logits,
                        rows,
                        seed=params.seed,
                        step=step,
                        top_k=params.top_k or 0,
                        top_p=params.top_p,
                        temperature=params.temperature,
                        exp_noise=draw,
                        impl=self._impl,
                        check_values=False,
                    )  # [R], [R]
                except ParamError as error:  # bad logits, on CPU alone: a GPU would have to be waited for
                    raise EngineError(f"denoiser, step {step + 1}: {error}") from None
                # Bad rows hold -1. As an index that would bring the device down, so count it and go on.
                n_bad += (tokens < 0).sum()
                rows = remask(
                    codes,
                    rows,
                    tokens.clamp_(min=0),
                    log_confidence,
                    n_masked=counts[step],
                    tau=taus[step],
                    strategy="low_confidence" if one_shot else params.strategy,
                    mask_id=mask_id,
                    seed=params.seed,
                    step=step,
                    noise=scores,
                    impl=self._impl,
                )  # commits all but counts[step] of the rows into codes
            pace.tick()
            on_step(step + 1, n_steps)
        return codes.masked_fill_(n_bad > 0, -1)

    @staticmethod
    def _logits(song: _Length, n_rows: int, first_step: FirstStep | None) -> Tensor:
        if first_step is None:
            return song.logits(n_rows)
        if first_step.logits is None:
            first_step.logits = song.logits(n_rows).clone()
        logits: Tensor = first_step.logits
        return logits

    def _length(self, n_frames: int, prefix_shape: tuple[int, ...]) -> _Length:
        key = (n_frames, *prefix_shape)
        if key not in self._lengths:
            while len(self._lengths) >= MAX_LENGTHS:
                self._lengths.popitem(last=False)[1].release()
            self._lengths[key] = _Length(self._engine, n_frames, prefix_shape, self._pool)
        self._lengths.move_to_end(key)
        return self._lengths[key]

    def _recorded(self, noise: RecordedNoise | None, step: int, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if noise is None:
            return None, None
        draw = None if noise.draw is None else to_device(noise.draw[step], self._device)[rows]
        return draw, None if noise.remask is None else to_device(noise.remask[step], self._device)
