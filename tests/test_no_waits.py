"""No step of the device's loops waits for the device: seen without one, on tensors that have no data.

A GPU is waited for when a value comes to the host, and when pageable memory is copied to it. On torch's `meta` device
the first is impossible, since there are no values, and the second shows as an operation on tensors of two devices. The
loops run there whole, but for the copies at the ends, which go through pinned memory, and Triton's launches, which do
nothing. What this cannot see is the driver: tests marked `gpu` ask torch.cuda.set_sync_debug_mode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from device_stages import GEOMETRY, MASK, OUTPUTS, STATS, exact_logits, small_modules
from lada_rt.decode import SeededNoise
from lada_rt.engines.torch import TorchEngine
from lada_rt.params import GenerationParams
from lada_rt.torch_loop import decode as device_decode
from lada_rt.torch_loop import denoise as device_denoise
from lada_rt.torch_loop import flow
from lada_rt.torch_loop.decode import DecodeLoop, Renderer
from lada_rt.torch_loop.denoise import DenoiseLoop
from lada_rt_export.torch_stages import part_engine, stage_parts
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
VOCAL, PREFIX = np.zeros(100, np.int64), np.zeros((2, 8), np.float32)


class Mixed(TorchDispatchMode):
    """Notes operations on tensors of two devices, as copies are; numbers without dimensions go along with a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.n_calls = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        self.n_calls += 1
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in _pytree.tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if len({t.device.type for t in tensors if t.dim() > 0 or "copy" in name}) > 1:
            self.found.append(name)
        return result


class Launcher:
    """A Triton kernel that does nothing."""

    n_launches = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            Launcher.n_launches += 1

        return launch


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mixed]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets tensors that are not on CUDA go to Triton
    for name in ("sample", "remask"):
        # the package's own attribute of that name is the function
        monkeypatch.setattr(sys.modules[f"lada_rt_kernels.{name}"], f"_{name}_kernel", Launcher())
    monkeypatch.setattr(Launcher, "n_launches", 0)
    mode = Mixed()

    def noting(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(data: Any, **options: Any) -> Tensor:
            if torch.device(options.get("device") or "cpu").type != "cpu":
                mode.found.append(make.__name__)  # copies, unseen by the mode
            return make(data, **options)

        return made

    for make in (torch.tensor, torch.as_tensor):
        monkeypatch.setattr(torch, make.__name__, noting(make))

    def to_device(array: np.ndarray, device: torch.device) -> Tensor:
        return torch.empty(array.shape, dtype=getattr(torch, str(array.dtype)), device=device)

    def to_host(tensor: Tensor) -> np.ndarray:
        return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    for module in (device_denoise, device_decode, flow):
        monkeypatch.setattr(module, "to_device", to_device)
        monkeypatch.setattr(module, "to_host", to_host, raising=False)
    with mode:
        yield mode


def meta_engines() -> dict[str, Any]:
    parts = [
        part
        for name, module in small_modules().items()
        for part in stage_parts(name, module, OUTPUTS[name], precision="bf16", device=META)
    ]
    return {part.name: part_engine(part, META) for part in parts}


@pytest.mark.parametrize("strategy", ["low_confidence", "random", "one_shot"])
def test_denoising_hands_nothing_over(mixed: Mixed, strategy: str) -> None:
    loop = DenoiseLoop(meta_engines()["denoiser"], META, impl="triton")
    mixed.n_calls, mixed.found = 0, []
    params = GenerationParams(steps=6, strategy=strategy)
    codes = loop.denoise(VOCAL, PREFIX, params, MASK)
    assert codes.shape == (100,)
    assert Launcher.n_launches == 2 * (1 if strategy == "one_shot" else 6)
    assert mixed.n_calls > 50
    assert mixed.found == []


@pytest.mark.parametrize("split", [True, False])
def test_decoding_hands_nothing_over(mixed: Mixed, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lada_rt.torch_loop.decode.VOCODER_BLOCK_FRAMES", 100)
    engines = meta_engines()
    if not split:
        engines["flow"] = TorchEngine(small_modules()["flow"].to(META), OUTPUTS["flow"], META)
        del engines["flow_prepare"], engines["flow_step"]
    loop, renderer = DecodeLoop(engines, META), Renderer(engines, GEOMETRY, META)
    mixed.n_calls, mixed.found = 0, []
    noise = SeededNoise(3, GEOMETRY)
    windows = loop.decode_latents(VOCAL, STATS, GEOMETRY, n_steps=3, guidance=1.5, noise=noise)
    audio = [piece.shape for window in windows for piece in renderer.render(window, GEOMETRY.window_samples)]
    assert audio == [(2, 100 * 480), (2, GEOMETRY.window_samples - 100 * 480)] * 2
    assert mixed.n_calls > 500
    assert mixed.found == []


@pytest.mark.parametrize(
    ("wait", "seen"),
    [
        (lambda codes: codes.copy_(torch.zeros(codes.shape, dtype=torch.int64)), "aten.copy_.default"),
        (lambda codes: torch.as_tensor(3, device=codes.device), "as_tensor"),
        (lambda codes: int(codes.sum()), "meta"),
        (lambda codes: codes[codes > 0], "meta"),
    ],
)
def test_a_wait_would_be_seen(mixed: Mixed, wait: Callable[[Tensor], Any], seen: str) -> None:
    def waiting(**inputs: Tensor) -> Tensor:
        wait(inputs["codes"])
        return exact_logits(**inputs)

    loop = DenoiseLoop(TorchEngine(waiting, ["logits"], META), META, impl="triton")
    if seen == "meta":  # there is no value
        with pytest.raises(Exception, match=r"(?i)meta|data-dependent"):
            loop.denoise(VOCAL, PREFIX, GenerationParams(steps=1), MASK)
    else:
        loop.denoise(VOCAL, PREFIX, GenerationParams(steps=1), MASK)
        assert mixed.found == [seen]
