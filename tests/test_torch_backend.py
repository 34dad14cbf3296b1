"""The torch backend on CPU: the device's denoising loop against the NumPy one, engines, packages."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_stages import (
    CPU,
    DENOISER,
    GEOMETRY,
    MASK,
    OUTPUTS,
    STATS,
    VOCAB,
    engines_of,
    exact_engine,
    exact_logits,
    small_modules,
    song,
)
from lada_rt import Pipeline
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.decode import SeededNoise, decode_latents
from lada_rt.denoise import FirstStep, RecordedNoise, denoise
from lada_rt.engines.base import loop_of
from lada_rt.engines.cache import EngineKey, write_engine
from lada_rt.engines.onnxruntime import OnnxEngine
from lada_rt.engines.torch import TorchEngine, load_package
from lada_rt.errors import BundleError, EngineError
from lada_rt.noise import flow_noise
from lada_rt.params import GenerationParams
from lada_rt.torch_loop import denoise as torch_denoise
from lada_rt.torch_loop.buckets import row_bucket
from lada_rt.torch_loop.denoise import DenoiseLoop
from lada_rt.torch_loop.device import GraphPool, Replay
from lada_rt.torch_loop.noise import flow_noise as device_noise
from lada_rt.torch_loop.path import engines_on_device
from lada_rt_export.build import BuildOptions
from lada_rt_export.demo.source import DEMO_WEIGHTS, TrainedSource
from lada_rt_export.models.mask_predictor import MaskPredictor
from lada_rt_export.models.stages_denoiser import DenoiserStage
from lada_rt_export.stages import StageSizes, stage_spec
from lada_rt_export.to_aoti import build_engine
from lada_rt_export.torch_stages import compile_blocks, part_engine, stage_parts
from stubs import render_window, stub_engines, sung, write_stub_bundle
from torch import Tensor, nn
from torch._inductor import config as inductor

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    return small_modules()


@pytest.mark.parametrize(("seed", "window", "n"), [(13, 0, 32 * 512 * 32), (2**63 + 5, 7, 1001), (0, 2**32 - 1, 3)])
def test_device_noise_has_the_bits_of_the_cpp_noise(seed: int, window: int, n: int) -> None:
    assert np.array_equal(device_noise(seed, window, (n,), CPU).numpy(), flow_noise(seed, window, (n,)))


@pytest.mark.parametrize("n_frames", [1, 2, 7, 8, 9, 64, 65, 4097, 9001])
def test_row_buckets_hold_their_rows_and_stay_few(n_frames: int) -> None:
    buckets = [row_bucket(n, n_frames) for n in range(1, n_frames + 1)]
    assert all(bucket >= n for n, bucket in enumerate(buckets, 1))
    assert all(bucket % 8 == 0 or bucket == n_frames for bucket in buckets)
    assert len(set(buckets)) <= 8
    assert max(buckets) == max(n_frames, 8)
    assert buckets == sorted(buckets)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "random", "schedule": "linear"},
        {"strategy": "fixed_position", "steps": 5},
        {"strategy": "one_shot"},
        {"top_k": None, "top_p": 1.0, "temperature": 0.8},
        {"mask_temperature": 0.0, "schedule": "power:2", "seed": 2**64 - 1},
        {"top_k": 1, "steps": 80},
    ],
)
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_device_loop_draws_the_codes_of_the_numpy_loop(options: dict[str, Any], impl: str) -> None:
    params = GenerationParams(**{"steps": 9, **options})
    vocal, prefix = song(61)
    steps: list[tuple[int, int]] = []
    loop = DenoiseLoop(exact_engine(), CPU, impl=impl)
    found = loop.denoise(vocal, prefix, params, MASK, on_step=lambda done, total: steps.append((done, total)))
    expected_steps: list[tuple[int, int]] = []
    expected = denoise(
        exact_engine(), vocal, prefix, params, MASK, on_step=lambda done, total: expected_steps.append((done, total))
    )
    assert np.array_equal(found, expected)
    assert steps == expected_steps


def test_device_loop_draws_within_a_span_around_known_codes() -> None:
    vocal, prefix = song(90)
    params = GenerationParams(steps=6)
    known = np.full(90, MASK)
    known[10:33] = np.arange(23)
    known[70:] = 7
    settings: dict[str, Any] = {"known": known, "span": (20, 80)}
    found = DenoiseLoop(exact_engine(), CPU).denoise(vocal, prefix, params, MASK, **settings)
    assert np.array_equal(found, denoise(exact_engine(), vocal, prefix, params, MASK, **settings))
    assert np.array_equal(found[20:33], known[20:33])
    assert (found[80:] == known[80:]).all()


def test_device_loop_shares_the_first_step_between_seeds() -> None:
    vocal, prefix = song(40)
    calls: list[int] = []

    def counted(**inputs: Tensor) -> Tensor:
        calls.append(len(inputs["rows"]))
        return exact_logits(**inputs)

    loop = DenoiseLoop(TorchEngine(counted, ["logits"], CPU), CPU)
    first = FirstStep()
    for seed in (1, 2):
        params = GenerationParams(steps=3, seed=seed)
        found = loop.denoise(vocal, prefix, params, MASK, first_step=first)
        assert np.array_equal(found, denoise(exact_engine(), vocal, prefix, params, MASK))
    assert len(calls) == 3 + 2


@pytest.mark.parametrize("strategy", ["low_confidence", "random"])
def test_device_loop_takes_recorded_noise(strategy: str) -> None:
    rng = np.random.default_rng(3)
    vocal, prefix = song(30)
    params = GenerationParams(steps=4, strategy=strategy)
    noise = RecordedNoise(
        rng.standard_exponential((4, 30, VOCAB)).astype(np.float32), rng.gumbel(size=(4, 30)).astype(np.float32)
    )
    found = DenoiseLoop(exact_engine(), CPU).denoise(vocal, prefix, params, MASK, recorded=noise)
    assert np.array_equal(found, denoise(exact_engine(), vocal, prefix, params, MASK, recorded=noise))


def test_bad_logits_are_an_error() -> None:
    vocal, prefix = song(20)

    def bad(**inputs: Tensor) -> Tensor:
        return exact_logits(**inputs) * float("nan")

    loop = DenoiseLoop(TorchEngine(bad, ["logits"], CPU), CPU)
    with pytest.raises(EngineError, match=r"denoiser, step 1: .*finite"):
        loop.denoise(vocal, prefix, GenerationParams(steps=3), MASK)


def test_a_failing_stage_is_an_engine_error(modules: dict[str, nn.Module]) -> None:
    engine = TorchEngine(modules["vocoder"], ["waveform"], CPU)
    with pytest.raises(EngineError, match="the run failed"):
        engine.run(mel=np.zeros((1, 3, 9), np.float32))


def test_replay_without_a_gpu_calls_the_function() -> None:
    x = torch.zeros(3)
    replay = Replay(lambda: x.add_(1), GraphPool(CPU))
    replay()
    assert replay() is x
    assert x.tolist() == [2.0, 2.0, 2.0]


def test_what_was_made_for_a_length_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: a graph's memory is gigabytes, and a cycle of references waits for the collector."""
    monkeypatch.setattr(torch_denoise, "MAX_LENGTHS", 2)
    loop = DenoiseLoop(exact_engine(), CPU)
    made: dict[int, Replay] = {}
    for n_frames in (20, 30, 20, 40):
        loop.denoise(*song(n_frames), GenerationParams(steps=1), MASK)
        made[n_frames] = next(iter(loop._lengths[n_frames, 2, 8]._replays.values()))
    assert [key[0] for key in loop._lengths] == [20, 40]
    with pytest.raises(AssertionError, match="released"):
        made[30]()
    assert made[20]() is not None


def test_compiled_blocks_are_marked_but_for_the_last_layer(modules: dict[str, nn.Module]) -> None:
    (part,) = stage_parts("denoiser", modules["denoiser"], ("logits",), precision="fp32", device=CPU)
    compile_blocks(part.module)
    assert isinstance(part.module, DenoiserStage)
    compiled = [layer._compiled_call_impl is not None for layer in part.module.mask_predictor.lm.layers]
    assert compiled == [True] * (DENOISER.n_layers - 1) + [False]


def test_torch_engines_equal_onnx_runtime_on_the_demo_networks() -> None:
    source = TrainedSource(DEMO_WEIGHTS)
    sizes = source.sizes
    graphs = demo_bundle_path() / "graphs"
    rng = torch.Generator().manual_seed(6)
    cases: dict[str, dict[str, Tensor]] = {
        "denoiser": {
            "vocal_codes": torch.randint(0, sizes.vocab_size, (1, 50), generator=rng),
            "codes": torch.full((1, 50), sizes.mask_id),
            "prefix": torch.randn(1, 2, sizes.feature_size, generator=rng),
            "rows": torch.arange(3, 50, 2),
        },
        "vocoder": {"mel": 0.1 * torch.randn(1, 256, 40, generator=rng)},
    }
    for name, inputs in cases.items():
        (part,) = stage_parts(name, source.module(name), OUTPUTS[name], precision="fp32", device=CPU)
        arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
        found = part_engine(part, CPU).run(**arrays)[OUTPUTS[name][0]]
        expected = OnnxEngine(graphs / f"{name}.onnx").run(**arrays)[OUTPUTS[name][0]]
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_package_builds_proves_and_drives_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(DENOISER, n_layers=1)
    torch.manual_seed(7)
    module = DenoiserStage(MaskPredictor(config).eval().requires_grad_(False), max_positions=256)
    sizes = StageSizes(
        GEOMETRY,
        vocab_size=VOCAB,
        mask_id=MASK,
        feature_size=8,
        ref_hidden_size=4,
        ref_chunk_samples=24_000,
        text_vocab_size=10,
        max_frames=200,
    )
    spec = stage_spec("denoiser", module, sizes)
    description = build_engine(spec, tmp_path, precision="fp32", device="cpu")
    assert description["proof"]["max_rel_error"] < 1e-5
    (part,) = description["parts"]
    # on another processor torch has a word to say at each load; what fits is told by the key
    with inductor.patch({"cpp.simdlen": 0}):
        package = load_package(tmp_path, part, CPU)
        assert not warnings_in(caplog)
        torch._inductor.aoti_load_package(str(tmp_path / part["file"]))
        assert ["AOTI_CPU_ISA" in warning for warning in warnings_in(caplog)] == [True]
    vocal, prefix = song(33)
    params = GenerationParams(steps=4, top_k=1, mask_temperature=0.0)
    eager = TorchEngine(module, ["logits"], CPU)
    found, expected = (DenoiseLoop(engine, CPU).denoise(vocal, prefix, params, MASK) for engine in (package, eager))
    assert np.array_equal(found, expected)

    # filed in a bundle, it is what the pipeline runs
    bundle = Bundle.open(
        write_stub_bundle(tmp_path / "stub.bundle", vocab_size=VOCAB, mask_id=MASK, geometry=GEOMETRY.to_json())
    )
    key = EngineKey(
        "denoiser",
        bundle.stages["denoiser"].sha256,
        "torch",
        version("torch"),
        description["device_key"],
        "fp32",
        spec.profile,
    )
    (tmp_path / "moved").mkdir()
    copy = Path(shutil.copy(tmp_path / part["file"], tmp_path / "moved"))
    write_engine(bundle.path / "engines", key, [copy], description["proof"], description)
    host = stub_engines()
    monkeypatch.setattr("lada_rt.engines._onnx_engine", lambda bundle, stage, *options: host[stage])
    pipe = Pipeline.load(bundle.path, backend="torch", device="cpu", warmup_s=0.5)
    assert (pipe.backend, pipe.device) == ("torch", "cpu")
    assert loop_of(pipe._engines["denoiser"]) is not None
    vocal = (sung(48_000), 48_000)
    filed = pipe.generate(vocal, text="soul", params=params)
    host["denoiser"] = eager
    by_hand = Pipeline(bundle, host, backend="host", device="cpu")  # type: ignore[arg-type]  # stubs
    assert np.array_equal(filed.codes, by_hand.generate(vocal, text="soul", params=params).codes)

    path = tmp_path / part["file"]
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleError, match="sha256"):
        load_package(tmp_path, part, CPU)
    with pytest.raises(BundleError, match="cannot be read"):
        load_package(tmp_path, {**part, "file": "gone.pt2"}, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("capture", [False, True])
def test_gpu_loop_draws_the_codes_of_the_numpy_loop(capture: bool) -> None:
    device = torch.device("cuda")
    loop = DenoiseLoop(exact_engine(device), device, capture=capture)
    cases: list[tuple[int, dict[str, Any]]] = [(61, {}), (500, {"strategy": "random"}), (61, {"seed": 5, "steps": 20})]
    for n_frames, options in cases:
        vocal, prefix = song(n_frames)
        params = GenerationParams(**{"steps": 9, **options})
        found = loop.denoise(vocal, prefix, params, MASK)
        assert np.array_equal(found, denoise(exact_engine(), vocal, prefix, params, MASK))


@pytest.mark.gpu
def test_gpu_loops_never_wait_for_the_device(modules: dict[str, nn.Module]) -> None:
    device = torch.device("cuda")
    path = engines_on_device(engines_of(modules, "bf16", device), GEOMETRY)
    params = GenerationParams(steps=12, flow_steps=4)
    vocal, prefix = song(100)

    def run() -> None:
        codes = denoise(path["denoiser"], vocal, prefix, params, MASK)
        noise = SeededNoise(1, GEOMETRY)
        for window in decode_latents(path["flow"], codes, STATS, GEOMETRY, n_steps=4, guidance=1.5, noise=noise):
            render_window(path, window, GEOMETRY.window_samples, GEOMETRY)

    run()  # captures the graphs
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_noise_has_the_bits_of_the_cpp_noise() -> None:
    shape = (32, 512, 32)
    assert np.array_equal(device_noise(13, 3, shape, torch.device("cuda")).cpu().numpy(), flow_noise(13, 3, shape))


def test_engines_for_a_gpu_are_bf16_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    half = {"denoiser", "flow"}

    def chosen(**options: str) -> set[str]:
        return {name for name, precision in BuildOptions(**options).precisions().items() if precision == "bf16"}

    assert chosen() == chosen(backend="torch", device="cpu") == set()
    monkeypatch.setattr("lada_rt.engines.torch.device_key", lambda device: "sm_90" if device == "cuda" else "cpu-x")
    assert chosen(backend="torch") == chosen(backend="torch", device="cuda") == half
    assert chosen() == chosen(backend="torch", device="cpu") == chosen(backend="torch", precision="fp32") == set()
    assert chosen(backend="torch", precision="bf16,flow=fp32") == {"denoiser"}


def test_a_backend_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="the package tensorrt is missing; install it with"):
        BuildOptions(backend="tensorrt")
