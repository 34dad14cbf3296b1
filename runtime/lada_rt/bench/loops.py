"""Loops that engines run on their own device give what the host's loops give: checked before they are timed.

The run that `check.py` takes apart goes through the host's loops, where each network's inputs and outputs can be
seen. The timed ones do not, and their networks see other shapes (rows are padded), so that a token may fall otherwise
within rounding and the songs part. Hence each loop starts here from the same: one draw of all codes, and the same codes
decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lada_rt.bench.check import TOLERANCES, Recorder
from lada_rt.bench.difference import relative_error
from lada_rt.bundle import Bundle
from lada_rt.decode import LatentStats, SeededNoise, decode_latents, render_windows
from lada_rt.denoise import denoise
from lada_rt.engines.base import Engine, loop_of
from lada_rt.errors import EngineError
from lada_rt.params import GenerationParams
from lada_rt.results import Result

__all__ = ["check_loops", "have_loops"]

#: share of tokens that rounding may turn in a single draw
DRAW_SHARE = 0.01


class _Plain:
    """An engine without its loop."""

    def __init__(self, engine: Engine) -> None:
        self.run = engine.run


def have_loops(engines: Mapping[str, Engine]) -> bool:
    return any(loop_of(engine) is not None for engine in engines.values())


def check_loops(
    bundle: Bundle, engines: Mapping[str, Engine], recorder: Recorder, params: GenerationParams, result: Result
) -> dict[str, float]:
    """Compare the loops of `engines` with the host's around the same engines.

    Args:
        bundle: of the engines.
        engines: to be timed.
        recorder: of a run through the host's loops.
        params: of that run.
        result: what it made.

    Returns:
        Name of each comparison to the error found.

    Raises:
        EngineError: an error is past what rounding explains.
    """
    given = recorder.calls["denoiser"][0][0]
    once = replace(params, strategy="one_shot")
    drawn, expected = (
        denoise(engine, given["vocal_codes"][0], given["prefix"][0], once, bundle.mask_id)
        for engine in (engines["denoiser"], _Plain(engines["denoiser"]))
    )
    geometry, constants = bundle.geometry, bundle.constants()
    n_windows, n_samples = geometry.n_windows(len(result.codes)), geometry.n_samples(len(result.codes))
    latents = decode_latents(
        engines["flow"],
        result.codes.astype(np.int64),
        LatentStats(constants["latent_mean"], constants["latent_std"]),
        geometry,
        n_steps=params.flow_steps,
        guidance=params.guidance,
        noise=SeededNoise(params.seed, geometry),
    )
    pieces = render_windows(engines, latents, geometry, windows=range(n_windows), stop_sample=n_samples)
    audio = np.concatenate(list(pieces), axis=1)
    allowed = max(TOLERANCES[bundle.stages[name].precision] for name in ("flow", "mel_decoder", "vocoder"))
    errors = {"loop, one draw": float(np.mean(drawn != expected)), "loop, audio": relative_error(audio, result.audio)}
    for (name, error), limit in zip(errors.items(), (DRAW_SHARE, allowed), strict=True):
        if not error <= limit:
            raise EngineError(
                f"check: {name}: expected an error of at most {limit:g} against the host's loop, got {error:.3g}; "
                "nothing is reported, run lada-rt doctor"
            )
    return errors
