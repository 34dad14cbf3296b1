"""The hooks by which the main path runs on a device: engines that also know their loop.

denoise.py and decode.py hand the work over to an engine that has `denoise` or `decode_latents`, and to latents that
have `render`. So every caller of these functions, whatever it does with spans, layers or windows, runs on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lada_rt.engines.base import Engine
from lada_rt.geometry import CodecGeometry
from lada_rt.params import GenerationParams
from lada_rt.torch_loop.decode import DeviceStats, Renderer, WindowLatents, decode_latents
from lada_rt.torch_loop.denoise import DenoiseLoop
from lada_rt.torch_loop.device import DeviceEngine, to_device, to_host
from lada_rt.torch_loop.flow import FlowSolver
from lada_rt.torch_loop.noise import SeededNoise

__all__ = ["DenoiserOnDevice", "FlowOnDevice", "WholeFlow", "engines_on_device", "warm_up"]


class DenoiserOnDevice:
    """The `denoiser` stage with `denoise` beside `run`."""

    def __init__(self, engine: Any, device: torch.device, *, capture: bool) -> None:
        self._engine = engine
        self.run = engine.run
        self.run_device = engine.run_device
        #: see `DenoiseLoop.denoise`
        self.denoise = DenoiseLoop(engine, device, capture=capture).denoise


class WholeFlow:
    """The `flow` stage from its two parts, each row at its own time."""

    def __init__(self, prepare: DeviceEngine, step: DeviceEngine, device: torch.device) -> None:
        self._prepare = prepare
        self._step = step
        self._device = device

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Evaluate the stage on arrays, row by row: the parts take one time for all rows."""
        tensors = {name: to_device(array, self._device) for name, array in inputs.items()}
        rows = [self._row({name: t[i : i + 1] for name, t in tensors.items()}) for i in range(len(inputs["t"]))]
        return {"velocity": to_host(torch.cat(rows))}

    def _row(self, row: Mapping[str, Tensor]) -> Tensor:
        tables = self._prepare.run_device(
            context=row["context"], codes=row["codes"], conditional=row["conditional"], times=row["t"]
        )
        return self._step.run_device(
            x=row["x"],
            condition=tables["condition"],
            modulation=tables["modulation"][0],
            closing=tables["closing"][0],
        )["velocity"]


class FlowOnDevice:
    """The `flow` stage with `decode_latents` and `seeded_noise` beside `run`."""

    def __init__(
        self,
        engines: Mapping[str, Any],
        renderer: Renderer,
        device: torch.device,
        *,
        capture: bool,
    ) -> None:
        if "flow" in engines:
            self.run = engines["flow"].run
        else:
            self.run = WholeFlow(engines["flow_prepare"], engines["flow_step"], device).run
        self._renderer = renderer
        self._device = device
        self._solver = FlowSolver(engines, device, capture=capture)

    def seeded_noise(self, seed: int, geometry: CodecGeometry) -> SeededNoise:
        """Like `lada_rt.decode.seeded_noise`, drawn on the device: the same bits."""
        return SeededNoise(seed, geometry, self._device)

    def decode_latents(
        self,
        codes: np.ndarray,
        stats: Any,
        geometry: CodecGeometry,
        *,
        n_steps: int,
        guidance: float,
        noise: Callable[[int], Any],
        windows: range | None = None,
        before: Any = None,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[WindowLatents]:
        """Latents of each window in turn, on the device; arguments as for `lada_rt.decode.decode_latents`.

        `noise` may give arrays or device tensors; one that has a `seed` is drawn on the device instead, with the same
        bits. `before` may be an array or an earlier result.
        """

        seed = getattr(noise, "seed", None)

        def uploaded(window: int) -> Tensor:
            drawn = noise(window)
            return drawn if isinstance(drawn, Tensor) else to_device(drawn, self._device)

        return decode_latents(
            self._solver,
            to_device(codes, self._device),
            DeviceStats.of(stats.mean, stats.std, self._device),
            geometry,
            n_steps=n_steps,
            guidance=guidance,
            noise=uploaded if seed is None else SeededNoise(seed, geometry, self._device),
            windows=windows,
            before=None if before is None else to_device(np.asarray(before), self._device),
            renderer=self._renderer,
            on_step=on_step,
        )


def engines_on_device(
    engines: Mapping[str, Any], geometry: CodecGeometry, device: torch.device, *, capture: bool = True
) -> dict[str, Engine]:
    """One engine for each stage of the manifest, from engines of any backend.

    The denoiser, and the flow together with mel decoder and vocoder, get their loops where they have `run_device`; a
    stage without stays as it is, and its loop on the host.

    Args:
        engines: stage -> engine; the flow as `flow`, or as `flow_prepare` and `flow_step`, or as all three.
        geometry: rates and window sizes.
        device: where the engines compute.
        capture: use CUDA graphs.
    """
    stages: dict[str, Engine] = {name: e for name, e in engines.items() if name not in ("flow_prepare", "flow_step")}
    able = {name for name, engine in engines.items() if hasattr(engine, "run_device")}
    if "denoiser" in able:
        stages["denoiser"] = DenoiserOnDevice(engines["denoiser"], device, capture=capture)
    if {"mel_decoder", "vocoder"} <= able and ("flow" in able or "flow_step" in able):
        renderer = Renderer(engines, geometry, device)
        stages["flow"] = FlowOnDevice(engines, renderer, device, capture=capture)
    return stages


def warm_up(
    engines: Mapping[str, Any],
    stats: Any,
    geometry: CodecGeometry,
    mask_id: int,
    prefix_dim: int,
    *,
    seconds: float = 30.0,
    params: GenerationParams | None = None,
) -> None:
    """Run every costly part once at the size of a song of `seconds`: load kernels, size workspaces, capture graphs.

    Args:
        engines: from `engines_on_device`.
        stats: of the latents, `lada_rt.decode.LatentStats`.
        geometry: rates and window sizes.
        mask_id: id of the mask token.
        prefix_dim: width of a condition slot.
        seconds: length of the songs to come. The denoiser's graphs fit one length; those of another are captured when
            it first comes, which takes about as long as eight steps.
        params: of the runs to come; their numbers of steps matter.
    """
    params = params or GenerationParams()
    n_codes = geometry.n_codes(round(seconds * geometry.sample_rate_hz))
    slots = np.zeros((2, prefix_dim), np.float32)
    codes = engines["denoiser"].denoise(np.zeros(n_codes, np.int64), slots, params, mask_id)
    latents = engines["flow"].decode_latents(
        codes,
        stats,
        geometry,
        n_steps=params.flow_steps,
        guidance=params.guidance,
        noise=engines["flow"].seeded_noise(params.seed, geometry),
        windows=range(1),
    )
    next(latents).render(min(geometry.window_samples, geometry.n_samples(n_codes)))
