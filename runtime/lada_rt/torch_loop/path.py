"""From engines to a main path that stays on their device: each stage that has a loop gets it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lada_rt.engines.base import Engine
from lada_rt.geometry import CodecGeometry
from lada_rt.torch_loop.decode import DecodeLoop, Renderer
from lada_rt.torch_loop.denoise import DenoiseLoop
from lada_rt.torch_loop.device import DeviceEngine, engine_errors, on_device, to_device, to_host

__all__ = ["WholeFlow", "engines_on_device"]


class _Looped:
    """A stage with its loop beside it (`engines.base.loop_of`)."""

    def __init__(self, engine: Engine, loop: Callable[..., Any]) -> None:
        self.run = engine.run
        self.loop = loop


class WholeFlow:
    """The `flow` stage from its two parts, each row at its own time."""

    def __init__(self, prepare: DeviceEngine, step: DeviceEngine) -> None:
        self._prepare = prepare
        self._step = step

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Evaluate the stage on arrays, row by row: the parts take one time for all rows."""
        with engine_errors("flow"), on_device("flow", self._step.device):
            tensors = {name: to_device(array, self._step.device) for name, array in inputs.items()}
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


def engines_on_device(
    engines: Mapping[str, Any], geometry: CodecGeometry, *, capture: bool = True
) -> dict[str, Engine]:
    """One engine for each stage of the manifest, with a loop wherever all that it calls can stay on the device.

    Args:
        engines: stage -> engine of any backend; the flow as `flow`, or as `flow_prepare` and `flow_step`. Those that
            are a `DeviceEngine` get loops, the others are passed on.
        geometry: rates and window sizes.
        capture: use CUDA graphs.
    """
    stages: dict[str, Engine] = {name: e for name, e in engines.items() if name not in ("flow_prepare", "flow_step")}
    able = {name: engine for name, engine in engines.items() if hasattr(engine, "run_device")}
    if "flow_step" in able:
        stages["flow"] = WholeFlow(able["flow_prepare"], able["flow_step"])
    if "denoiser" in able:
        loop = DenoiseLoop(able["denoiser"], able["denoiser"].device, capture=capture)
        stages["denoiser"] = _Looped(stages["denoiser"], loop.denoise)
    estimator = able.get("flow_step", able.get("flow"))
    if estimator is not None:
        stages["flow"] = _Looped(stages["flow"], DecodeLoop(able, estimator.device, capture=capture).decode_latents)
    if {"mel_decoder", "vocoder"} <= able.keys():
        renderer = Renderer(able, geometry, able["vocoder"].device)
        stages["mel_decoder"] = _Looped(stages["mel_decoder"], renderer.render)
    return stages
