"""Codes to sound on the device, on CPU: solver, windows, batches and audio against the NumPy path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from device_stages import (
    CPU,
    GEOMETRY,
    STATS,
    VOCAB,
    engines_of,
    small_modules,
    whole_engines,
)
from lada_rt.bench.roofline import ModelSizes
from lada_rt.decode import SeededNoise, decode_latents, render_pieces, solve_flow
from lada_rt.engines.base import loop_of
from lada_rt.euler import EulerTable
from lada_rt.geometry import CodecGeometry
from lada_rt.torch_loop import flow
from lada_rt.torch_loop.decode import DeviceStats, WindowLatents, decode_songs
from lada_rt.torch_loop.flow import FlowSolver
from lada_rt.torch_loop.memory import memory_plan
from lada_rt.torch_loop.noise import flow_noise
from lada_rt.torch_loop.path import engines_on_device
from lada_rt_export.models.channels_last import ChannelsLastMelDecoder, ChannelsLastVocoder
from lada_rt_export.models.flow_step import split_flow
from lada_rt_export.models.stages_mucodec import FlowStage, MelDecoderStage, VocoderStage
from lada_rt_export.torch_stages import stage_parts
from stubs import render_window
from torch import nn

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    return small_modules()


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


def device_windows(engines: dict[str, Any], codes: np.ndarray, **settings: Any) -> list[Any]:
    options = {"n_steps": 3, "guidance": 1.5, "noise": SeededNoise(11, GEOMETRY), **settings}
    return list(decode_latents(engines["flow"], codes, STATS, GEOMETRY, **options))


def test_windows_and_audio_equal_the_numpy_path(modules: dict[str, nn.Module]) -> None:
    codes = np.random.default_rng(8).integers(0, VOCAB, 100)  # two windows, the second padded
    whole, steps = whole_engines(modules), []
    engines = engines_on_device(engines_of(modules), GEOMETRY)
    expected = device_windows(whole, codes)
    found = device_windows(engines, codes, on_step=lambda done, total: steps.append((done, total)))
    assert {type(window) for window in expected} == {np.ndarray}
    assert {type(window) for window in found} == {WindowLatents}
    assert len(found) == len(expected) == 2
    assert steps == [(0, 6), (1, 6), (2, 6), (3, 6), (4, 6), (5, 6), (6, 6)]
    for window, reference, n_samples in zip(found, expected, (GEOMETRY.window_samples, 12_345), strict=True):
        array = np.asarray(window)
        assert np.abs(array - reference).max() < 2e-6 * np.abs(reference).max()
        audio = render_window(engines, window, n_samples, GEOMETRY)
        sound = render_window(whole, reference, n_samples, GEOMETRY)
        assert audio.shape == sound.shape == (2, n_samples)
        # measured 4e-7
        assert np.abs(audio - sound).max() < 1e-5 * np.abs(sound).max()
        # latents that were saved sound as they did
        assert np.array_equal(render_window(engines, array, n_samples, GEOMETRY), audio)


def test_noise_from_outside_is_copied_to_the_device(modules: dict[str, nn.Module]) -> None:
    codes = np.random.default_rng(8).integers(0, VOCAB, 20)
    engines = engines_on_device(engines_of(modules), GEOMETRY)
    (seeded,) = device_windows(engines, codes)
    (given,) = device_windows(engines, codes, noise=lambda window: SeededNoise(11, GEOMETRY)(window))
    (other,) = device_windows(engines, codes, noise=SeededNoise(12, GEOMETRY))
    assert np.array_equal(np.asarray(seeded), np.asarray(given))
    assert not np.array_equal(np.asarray(seeded), np.asarray(other))


def test_statistics_on_the_device_have_the_bits_of_the_host() -> None:
    latents = np.random.default_rng(2).standard_normal((32, 9, 32)).astype(np.float32)
    stats = DeviceStats.of(STATS, CPU)
    for name in ("normalise", "denormalise"):
        found = getattr(stats, name)(torch.from_numpy(latents)).numpy()
        assert np.array_equal(found, getattr(STATS, name)(latents)), name


def test_pieces_of_the_vocoder_equal_the_blocks(modules: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lada_rt.torch_loop.decode.VOCODER_BLOCK_FRAMES", 80)
    whole = whole_engines(modules)
    engines = engines_on_device(whole, GEOMETRY)
    latents = np.random.default_rng(9).standard_normal((32, 32, 32)).astype(np.float32)
    first = 80 * 480
    for n_samples in (1, 480, first, first + 1, 60_001, GEOMETRY.window_samples):
        blocks = render_window(whole, latents, n_samples, GEOMETRY, block_frames=64)
        pieces = list(render_pieces(engines, latents, n_samples, GEOMETRY))
        assert [piece.shape[1] for piece in pieces] == [n for n in (min(first, n_samples), n_samples - first) if n > 0]
        assert np.abs(blocks - np.concatenate(pieces, axis=1)).max() < 1e-6


def test_windows_resume_after_earlier_ones(modules: dict[str, nn.Module]) -> None:
    codes = np.random.default_rng(8).integers(0, VOCAB, 150)
    engines = engines_on_device(engines_of(modules), GEOMETRY)
    everything = device_windows(engines, codes)
    assert len(everything) == 3
    for before in (everything[0], np.asarray(everything[0])):
        later = device_windows(engines, codes, windows=range(1, 3), before=before)
        for window, reference in zip(later, everything[1:], strict=True):
            assert np.array_equal(np.asarray(window), np.asarray(reference))


def test_only_stages_that_can_stay_on_the_device_get_loops(modules: dict[str, nn.Module]) -> None:
    """The loops of the others run on the host, whichever engines the device has."""

    class HostOnly:
        def __init__(self, engine: Any) -> None:
            self.run = engine.run

    whole = whole_engines(modules)
    for on_host, looped in (
        (set(), {"denoiser", "flow", "mel_decoder"}),
        ({"vocoder"}, {"denoiser", "flow"}),
        ({"denoiser", "flow"}, {"mel_decoder"}),
        (set(whole), set()),
    ):
        mixed = {name: HostOnly(engine) if name in on_host else engine for name, engine in whole.items()}
        stages = engines_on_device(mixed, GEOMETRY)
        assert set(stages) == set(whole)
        assert {name for name, engine in stages.items() if loop_of(engine) is not None} == looped
        (window,) = device_windows(stages, np.arange(64))
        assert np.isfinite(render_window(stages, window, 4000, GEOMETRY)).all()


def test_graphs_are_kept_for_few_forms(modules: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "MAX_WINDOWS", 2)
    solver = FlowSolver(engines_of(modules), CPU)
    noise = torch.zeros(1, 32, 32, 32)
    for n_steps in (1, 2, 1, 3):
        solver.solve(torch.zeros(1, 64, dtype=torch.int64), noise, noise[:, :, :0], n_steps=n_steps, guidance=1.5)
    assert [key[-1] for key in solver._windows] == [1, 3]


def test_songs_in_one_batch_equal_songs_alone(modules: dict[str, nn.Module]) -> None:
    rng = np.random.default_rng(12)
    songs = [rng.integers(0, VOCAB, n) for n in (150, 40, 100)]
    shape = SeededNoise(0, GEOMETRY).shape
    solver = FlowSolver(engines_of(modules), CPU)
    stats = DeviceStats.of(STATS, CPU)
    settings: dict[str, Any] = {"n_steps": 2, "guidance": 1.5}
    seen = 0
    together = decode_songs(
        solver, songs, stats, GEOMETRY, CPU, noise=lambda s, w: flow_noise(s, w, shape, CPU), **settings
    )

    def decoded_alone(index: int) -> list[WindowLatents]:
        windows = decode_songs(
            solver,
            [songs[index]],
            stats,
            GEOMETRY,
            CPU,
            noise=lambda s, w: flow_noise(index, w, shape, CPU),
            **settings,
        )
        return [latents[0] for _, latents in windows]

    alone = [decoded_alone(index) for index in range(3)]
    for index, found in together:
        assert list(found) == [s for s in range(3) if index < len(alone[s])]
        for s, window in found.items():
            reference = alone[s][index].latents
            assert (window.latents - reference).abs().max() < 1e-4 * reference.abs().max()
            seen += 1
    assert seen == 3 + 1 + 2


def test_memory_plan_grows_with_the_song_and_counts_its_parts() -> None:
    short, long = (memory_plan(10**9, CodecGeometry(), seconds) for seconds in (30.0, 163.84))
    assert long.denoise > 4 * short.denoise
    assert (long.flow, long.vocoder) == (short.flow, short.vocoder)
    assert long.peak == 10**9 + long.denoise + long.flow + max(long.mel_decoder, long.vocoder)
    assert memory_plan(0, CodecGeometry(), 30.0, n_songs=2).flow == 2 * short.flow
    wide = memory_plan(0, CodecGeometry(), 30.0, half_bytes=4, sound_bytes=2)
    assert wide.denoise > short.denoise
    assert wide.flow > 1.5 * short.flow
    assert 2 * wide.vocoder == short.vocoder
    unknown = ModelSizes(denoiser=None, flow=None, mel_decoder=None, vocoder=None)
    assert memory_plan(10**9, CodecGeometry(), 30.0, unknown) == short


@pytest.mark.gpu
def test_gpu_graphs_repeat_the_plain_calls(modules: dict[str, nn.Module]) -> None:
    device = torch.device("cuda")
    engines = engines_of(modules, "bf16", device)
    codes = np.arange(100) % VOCAB
    stats = DeviceStats.of(STATS, device)
    results = []
    shape = SeededNoise(4, GEOMETRY).shape
    for capture in (False, True):
        solver = FlowSolver(engines, device, capture=capture)
        settings: dict[str, Any] = {
            "n_steps": 5,
            "guidance": 1.5,
            "noise": lambda s, w: flow_noise(4, w, shape, device),
        }
        windows = decode_songs(solver, [codes], stats, GEOMETRY, device, **settings)
        results.append([np.asarray(latents[0]) for _, latents in windows])
    for plain, captured in zip(*results, strict=True):
        assert np.array_equal(plain, captured)
