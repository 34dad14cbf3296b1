"""The torch backend on CPU: the device's loops against the NumPy ones, split stages against whole ones, packages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lada_rt.bundle import demo_bundle_path
from lada_rt.decode import LatentStats, decode_latents, render_window, seeded_noise, solve_flow
from lada_rt.denoise import FirstStep, RecordedNoise, denoise
from lada_rt.engines.onnxruntime import OnnxEngine
from lada_rt.engines.torch import TorchEngine, load_package
from lada_rt.errors import BundleError, EngineError, LadaError
from lada_rt.geometry import CodecGeometry
from lada_rt.noise import flow_noise
from lada_rt.params import GenerationParams
from lada_rt.torch_loop.decode import DeviceStats, WindowLatents, decode_songs
from lada_rt.torch_loop.denoise import DenoiseLoop, row_bucket
from lada_rt.torch_loop.device import GraphPool, Replay
from lada_rt.torch_loop.flow import EulerTable, FlowSolver
from lada_rt.torch_loop.memory import memory_plan
from lada_rt.torch_loop.noise import SeededNoise
from lada_rt.torch_loop.noise import flow_noise as device_noise
from lada_rt.torch_loop.path import engines_on_device, warm_up
from lada_rt_export.demo.bundle import FEATURE_SIZE, demo_modules
from lada_rt_export.models.channels_last import ChannelsLastMelDecoder, ChannelsLastVocoder
from lada_rt_export.models.flow import Flow, FlowConfig
from lada_rt_export.models.flow_step import split_flow
from lada_rt_export.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from lada_rt_export.models.mel_vae import MelVAE, MelVAEConfig
from lada_rt_export.models.stages_denoiser import DenoiserStage
from lada_rt_export.models.stages_mucodec import FlowStage, MelDecoderStage, VocoderStage
from lada_rt_export.models.vocoder import Vocoder, VocoderConfig
from lada_rt_export.models.vq import VQ, VQConfig, condition_linear
from lada_rt_export.stages import StageSizes, stage_spec
from lada_rt_export.to_aoti import build_engine
from lada_rt_export.torch_stages import compile_blocks, part_engine, stage_parts
from torch import Tensor, nn

CPU = torch.device("cpu")
VOCAB, MASK = 300, 300
#: windows of 64 codes: 32 latent frames, 256 mel frames
GEOMETRY = CodecGeometry(window_codes=64, hop_codes=48)
QUANTISER = VQConfig(dim=32, codebook_size=VOCAB, codebook_dim=8)
DENOISER = MaskPredictorConfig(
    hidden_size=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    intermediate_size=24,
    n_vocal_codes=VOCAB,
    n_codes=VOCAB,
    condition_size=8,
)
STATS = LatentStats(
    np.linspace(-0.5, 0.5, 32 * 32, dtype=np.float32).reshape(32, 32),
    np.linspace(0.5, 2.0, 32 * 32, dtype=np.float32).reshape(32, 32),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_modules() -> dict[str, nn.Module]:
    """Every network of the device path at the test's geometry, random weights from one seed."""
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    modules: dict[str, nn.Module] = {
        "denoiser": DenoiserStage(MaskPredictor(DENOISER), max_positions=512),
        "flow": FlowStage(
            Flow(FlowConfig(n_layers=2, n_heads=2, head_dim=16, latent_frames=32)),
            VQ(QUANTISER),
            condition_linear(QUANTISER),
        ),
        "mel_decoder": MelDecoderStage(MelVAE(MelVAEConfig(channels=8, multiples=(1, 1, 1, 2), norm_groups=4))),
        "vocoder": VocoderStage(Vocoder(VocoderConfig(initial_channels=32))),
    }
    torch.random.set_rng_state(state)
    return {name: module.eval().requires_grad_(False) for name, module in modules.items()}


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    return small_modules()


OUTPUTS = {"denoiser": ("logits",), "flow": ("velocity",), "mel_decoder": ("mel",), "vocoder": ("waveform",)}


def engines_of(modules: dict[str, nn.Module], precision: str = "fp32", device: torch.device = CPU) -> dict[str, Any]:
    parts = [
        part
        for name, module in modules.items()
        for part in stage_parts(name, module, OUTPUTS[name], precision=precision, device=device)
    ]
    return {part.name: part_engine(part, device) for part in parts}


def whole_engines(modules: dict[str, nn.Module]) -> dict[str, Any]:
    return {name: TorchEngine(module, OUTPUTS[name], CPU) for name, module in modules.items()}


def exact_logits(vocal_codes: Tensor, codes: Tensor, prefix: Tensor, rows: Tensor) -> Tensor:
    """Logits made of small integers: the same bits on every device, row by row, with many ties."""
    known = (codes * (codes < VOCAB)).sum() % 9973
    shift = (prefix.sum() * 8).to(torch.int64)
    ids = torch.arange(VOCAB, device=rows.device)
    base = (vocal_codes[0][rows] * 31 + rows * 17 + known * 5 + shift)[:, None]
    return ((base + ids * (rows[:, None] * 7 + 13) + ids * ids) % 97).to(torch.float32) / 8


def exact_engine(device: torch.device = CPU) -> TorchEngine:
    return TorchEngine(exact_logits, ["logits"], device)


def song(n_frames: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCAB, n_frames), rng.integers(-8, 9, (2, 8)).astype(np.float32) / 8


@pytest.mark.parametrize(("seed", "window", "n"), [(13, 0, 32 * 512 * 32), (2**63 + 5, 7, 1001), (0, 2**32 - 1, 3)])
def test_device_noise_has_the_bits_of_the_cpp_noise(seed: int, window: int, n: int) -> None:
    assert np.array_equal(device_noise(seed, window, (n,), CPU).numpy(), flow_noise(seed, window, (n,)))


@pytest.mark.parametrize("n_frames", [1, 2, 7, 64, 65, 4097])
def test_row_buckets_hold_their_rows_and_stay_few(n_frames: int) -> None:
    buckets = [row_bucket(n, n_frames) for n in range(1, n_frames + 1)]
    assert all(bucket >= n and bucket % 8 == 0 for n, bucket in enumerate(buckets, 1))
    assert len(set(buckets)) <= 8
    assert max(buckets) < n_frames * 9 / 8 + 8 * 8


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
    with pytest.raises(LadaError, match="finite"):
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


@pytest.mark.parametrize("n_steps", [1, 2, 20, 57])
def test_euler_table_ends_at_one(n_steps: int) -> None:
    table = EulerTable.of(n_steps)
    assert table.t[0] == 0
    assert table.fade[0] == 1
    assert np.all(np.diff(table.t) > 0)
    assert table.t[-1] + table.dt[-1] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("n_context", "guidance", "n_steps"), [(0, 1.5, 4), (8, 1.5, 5), (8, 1.0, 1), (8, -0.5, 2)])
def test_solver_repeats_the_numpy_solver_bit_for_bit(
    modules: dict[str, nn.Module], n_context: int, guidance: float, n_steps: int
) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, VOCAB, 64)
    noise = rng.standard_normal((32, 32, 32)).astype(np.float32)
    context = rng.standard_normal((32, n_context, 32)).astype(np.float32)
    engines = whole_engines(modules)
    expected = solve_flow(engines["flow"], codes, noise, context, n_steps=n_steps, guidance=guidance)
    tensors = (torch.from_numpy(a)[None] for a in (codes, noise, context))
    found = FlowSolver(engines, CPU).solve(*tensors, n_steps=n_steps, guidance=guidance)[0].numpy()
    assert np.array_equal(found, expected)
    split = FlowSolver(engines_of(modules), CPU)
    tensors = (torch.from_numpy(a)[None] for a in (codes, noise, context))
    found = split.solve(*tensors, n_steps=n_steps, guidance=guidance)[0].numpy()
    # measured 3e-7: patches of state and condition are summed in another order
    assert np.abs(found - expected).max() < 5e-6 * np.abs(expected).max()
    assert np.array_equal(found[:, :n_context], context)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 4e-2)])
def test_split_flow_equals_the_stage(modules: dict[str, nn.Module], precision: str, tolerance: float) -> None:
    stage = modules["flow"]
    prepare, step = (part.module for part in stage_parts("flow", stage, ("velocity",), precision=precision, device=CPU))
    rng = torch.Generator().manual_seed(2)
    x, context = torch.randn(2, 3, 32, 32, 32, generator=rng)
    codes = torch.randint(0, VOCAB, (3, 64), generator=rng)
    conditional = torch.tensor([0.0, 1.0, 1.0])
    times = torch.tensor([0.0, 0.35, 0.95])
    with torch.inference_mode():
        condition, modulation, closing = prepare(context, codes, conditional, times)
        for index, t in enumerate(times):
            expected = stage(x, context, codes, conditional, t.expand(3))
            found = step(x, condition, modulation[index], closing[index])
            assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_split_flow_leaves_the_stage_alone(modules: dict[str, nn.Module]) -> None:
    before = {name: tensor.clone() for name, tensor in modules["flow"].state_dict().items()}
    stage_parts("flow", modules["flow"], ("velocity",), precision="bf16", device=CPU)
    after = modules["flow"].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_split_parts_own_all_live_weights(modules: dict[str, nn.Module]) -> None:
    stage = modules["flow"]
    assert isinstance(stage, FlowStage)
    prepare, step = split_flow(stage)
    rng = torch.Generator().manual_seed(2)
    inputs = {
        "context": torch.randn(1, 32, 32, 32, generator=rng),
        "codes": torch.randint(0, VOCAB, (1, 64), generator=rng),
        "conditional": torch.ones(1),
        "times": torch.tensor([0.5]),
    }
    x = torch.randn(1, 32, 32, 32, generator=rng)
    condition, modulation, closing = prepare(**inputs)
    before = step(x, condition, modulation[0], closing[0])
    for tensor in (*prepare.parameters(), *step.parameters()):
        tensor.data.mul_(1.01)
    condition, modulation, closing = prepare(**inputs)
    assert not torch.allclose(step(x, condition, modulation[0], closing[0]), before, rtol=1e-3)
    fresh = small_modules()["flow"]
    stage.load_state_dict(fresh.state_dict())


def test_channels_last_stages_equal_the_stages(modules: dict[str, nn.Module]) -> None:
    rng = torch.Generator().manual_seed(4)
    vocoder, mel_decoder = modules["vocoder"], modules["mel_decoder"]
    assert isinstance(vocoder, VocoderStage)
    assert isinstance(mel_decoder, MelDecoderStage)
    mel = torch.randn(2, 256, 31, generator=rng) - 5
    latents = torch.randn(1, 16, 32, 32, generator=rng)
    with torch.inference_mode():
        for stage, other, given in (
            (vocoder, ChannelsLastVocoder(vocoder), mel),
            (mel_decoder, ChannelsLastMelDecoder(mel_decoder), latents),
        ):
            expected, found = stage(given), other(given)
            assert found.shape == expected.shape
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_compiled_blocks_are_marked_but_for_the_last_layer(modules: dict[str, nn.Module]) -> None:
    (part,) = stage_parts("denoiser", modules["denoiser"], ("logits",), precision="fp32", device=CPU)
    compile_blocks(part.module)
    assert isinstance(part.module, DenoiserStage)
    compiled = [layer._compiled_call_impl is not None for layer in part.module.mask_predictor.lm.layers]
    assert compiled == [True] * (DENOISER.n_layers - 1) + [False]


def device_windows(engines: dict[str, Any], codes: np.ndarray, **settings: Any) -> list[WindowLatents]:
    flow: Any = engines["flow"]
    options = {"n_steps": 3, "guidance": 1.5, "noise": flow.seeded_noise(11, GEOMETRY), **settings}
    return list(flow.decode_latents(codes, STATS, GEOMETRY, **options))


def test_windows_and_audio_equal_the_numpy_path(modules: dict[str, nn.Module]) -> None:
    codes = np.random.default_rng(8).integers(0, VOCAB, 100)  # two windows, the second padded
    whole, steps = whole_engines(modules), []
    engines = engines_on_device(engines_of(modules), GEOMETRY, CPU)
    expected = list(
        decode_latents(whole["flow"], codes, STATS, GEOMETRY, n_steps=3, guidance=1.5, noise=seeded_noise(11, GEOMETRY))
    )
    found = device_windows(engines, codes, on_step=lambda done, total: steps.append((done, total)))
    assert len(found) == len(expected) == 2
    assert steps == [(0, 6), (1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]
    for window, reference, n_samples in zip(found, expected, (GEOMETRY.window_samples, 12_345), strict=True):
        array = np.asarray(window)
        assert np.abs(array - reference).max() < 2e-6 * np.abs(reference).max()
        audio = window.render(n_samples)
        sound = render_window(whole, reference, n_samples, GEOMETRY)
        assert audio.shape == sound.shape == (2, n_samples)
        # measured 4e-7
        assert np.abs(audio - sound).max() < 1e-5 * np.abs(sound).max()


def test_one_pass_vocoder_equals_the_blocks(modules: dict[str, nn.Module]) -> None:
    whole = whole_engines(modules)
    engines = engines_on_device(whole, GEOMETRY, CPU)
    latents = np.random.default_rng(9).standard_normal((32, 32, 32)).astype(np.float32)
    renderer = next(iter(device_windows(engines, np.arange(64)))).renderer
    assert renderer is not None
    for n_samples in (1, 480, 60_001, GEOMETRY.window_samples):
        blocks = render_window(whole, latents, n_samples, GEOMETRY, block_frames=64)
        once = renderer.render(WindowLatents.queued(torch.from_numpy(latents)), n_samples)
        assert np.abs(blocks - once).max() < 1e-6


def test_windows_resume_after_earlier_ones(modules: dict[str, nn.Module]) -> None:
    codes = np.random.default_rng(8).integers(0, VOCAB, 150)
    engines = engines_on_device(engines_of(modules), GEOMETRY, CPU)
    everything = device_windows(engines, codes)
    assert len(everything) == 3
    later = device_windows(engines, codes, windows=range(1, 3), before=everything[0])
    for window, reference in zip(later, everything[1:], strict=True):
        assert np.array_equal(np.asarray(window), np.asarray(reference))


def test_songs_in_one_batch_equal_songs_alone(modules: dict[str, nn.Module]) -> None:
    rng = np.random.default_rng(12)
    songs = [torch.from_numpy(rng.integers(0, VOCAB, n)) for n in (150, 40, 100)]
    noises = [SeededNoise(seed, GEOMETRY, CPU) for seed in (1, 2, 3)]
    solver = FlowSolver(engines_of(modules), CPU)
    stats = DeviceStats.of(STATS.mean, STATS.std, CPU)
    settings: dict[str, Any] = {"n_steps": 2, "guidance": 1.5}
    seen = 0
    together = decode_songs(solver, songs, stats, GEOMETRY, noise=lambda s, w: noises[s](w), **settings)

    def decoded_alone(index: int) -> list[WindowLatents]:
        windows = decode_songs(solver, [songs[index]], stats, GEOMETRY, noise=lambda s, w: noises[index](w), **settings)
        return [latents[0] for _, latents in windows]

    alone = [decoded_alone(index) for index in range(3)]
    for index, found in together:
        assert list(found) == [s for s in range(3) if index < len(alone[s])]
        for s, window in found.items():
            reference = alone[s][index].latents
            assert (window.latents - reference).abs().max() < 1e-4 * reference.abs().max()
            seen += 1
    assert seen == 3 + 1 + 2


def test_warm_up_runs_every_part(modules: dict[str, nn.Module]) -> None:
    called: set[str] = set()

    def noting(name: str, engine: TorchEngine) -> TorchEngine:
        def run(**inputs: Tensor) -> tuple[Tensor, ...]:
            called.add(name)
            return tuple(engine.run_device(**inputs).values())

        return TorchEngine(run, engine._output_names, CPU)

    engines = {name: noting(name, engine) for name, engine in engines_of(modules).items()}
    path = engines_on_device(engines, GEOMETRY, CPU)
    params = GenerationParams(steps=2, flow_steps=2)
    warm_up(path, STATS, GEOMETRY, MASK, DENOISER.condition_size, seconds=1.0, params=params)
    assert called == set(engines)


def test_memory_plan_grows_with_the_song_and_counts_its_parts() -> None:
    short, long = (memory_plan(10**9, CodecGeometry(), seconds) for seconds in (30.0, 163.84))
    assert long.denoise > 4 * short.denoise
    assert (long.flow, long.vocoder) == (short.flow, short.vocoder)
    assert long.peak == 10**9 + long.denoise + long.flow + max(long.mel_decoder, long.vocoder)
    assert memory_plan(0, CodecGeometry(), 30.0, n_songs=2).flow == 2 * short.flow


def test_torch_engines_equal_onnx_runtime_on_the_demo_networks() -> None:
    modules = demo_modules(261)
    graphs = demo_bundle_path() / "graphs"
    rng = torch.Generator().manual_seed(6)
    cases: dict[str, dict[str, Tensor]] = {
        "denoiser": {
            "vocal_codes": torch.randint(0, 16384, (1, 50), generator=rng),
            "codes": torch.full((1, 50), 16384),
            "prefix": torch.randn(1, 2, FEATURE_SIZE, generator=rng),
            "rows": torch.arange(3, 50, 2),
        },
        "vocoder": {"mel": torch.randn(1, 256, 40, generator=rng) - 5},
    }
    for name, inputs in cases.items():
        (part,) = stage_parts(name, modules[name], OUTPUTS[name], precision="fp32", device=CPU)
        arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
        found = part_engine(part, CPU).run(**arrays)[OUTPUTS[name][0]]
        expected = OnnxEngine(graphs / f"{name}.onnx").run(**arrays)[OUTPUTS[name][0]]
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_package_builds_proves_and_drives_the_loop(tmp_path: Path) -> None:
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
    package = load_package(tmp_path, part, CPU)
    vocal, prefix = song(33)
    params = GenerationParams(steps=4, top_k=1, mask_temperature=0.0)
    eager = TorchEngine(module, ["logits"], CPU)
    found, expected = (DenoiseLoop(engine, CPU).denoise(vocal, prefix, params, MASK) for engine in (package, eager))
    assert np.array_equal(found, expected)

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
    path: Any = engines_on_device(engines_of(modules, "bf16", device), GEOMETRY, device)
    params = GenerationParams(steps=12, flow_steps=4)
    vocal, prefix = song(100)

    def run() -> None:
        codes = path["denoiser"].denoise(vocal, prefix, params, MASK)
        noise = path["flow"].seeded_noise(1, GEOMETRY)
        for window in path["flow"].decode_latents(codes, STATS, GEOMETRY, n_steps=4, guidance=1.5, noise=noise):
            window.render(GEOMETRY.window_samples)

    run()  # captures the graphs
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_graphs_repeat_the_plain_calls(modules: dict[str, nn.Module]) -> None:
    device = torch.device("cuda")
    engines = engines_of(modules, "bf16", device)
    codes = torch.arange(100, device=device) % VOCAB
    stats = DeviceStats.of(STATS.mean, STATS.std, device)
    results = []
    noise = SeededNoise(4, GEOMETRY, device)
    for capture in (False, True):
        solver = FlowSolver(engines, device, capture=capture)
        settings: dict[str, Any] = {"n_steps": 5, "guidance": 1.5, "noise": lambda s, w: noise(w)}
        windows = decode_songs(solver, [codes], stats, GEOMETRY, **settings)
        results.append([np.asarray(latents[0]) for _, latents in windows])
    for plain, captured in zip(*results, strict=True):
        assert np.array_equal(plain, captured)


@pytest.mark.gpu
def test_gpu_noise_has_the_bits_of_the_cpp_noise() -> None:
    shape = (32, 512, 32)
    assert np.array_equal(device_noise(13, 3, shape, torch.device("cuda")).cpu().numpy(), flow_noise(13, 3, shape))
