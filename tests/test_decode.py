"""Flow solver, decoder windows, crossfade: the runtime's code driven by torch stages, against the released program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_io import assert_close, flow_stage_of, read_sidecar, read_tensors, weights_of
from golden_weights import mel_vae_state, select_weights
from lada_rt.decode import (
    Crossfade,
    LatentStats,
    SeededNoise,
    decode_latents,
    rendered_samples,
    solve_flow,
    window_codes,
)
from lada_rt.geometry import CodecGeometry
from lada_rt_export.models.mel_vae import MelVAE, MelVAEConfig
from lada_rt_export.models.stages_mucodec import MelDecoderStage, VocoderStage
from lada_rt_export.models.vocoder import Vocoder, VocoderConfig
from lada_rt_export.torch_engine import TorchEngine
from stubs import render_window


class Recorder:
    """Passes calls on and keeps them."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine
        self.calls: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        outputs = self.engine.run(**inputs)
        self.calls.append(({k: v.copy() for k, v in inputs.items()}, outputs))
        return outputs


def flow_engine(golden: Path, sidecar: dict, latent_frames: int) -> tuple[TorchEngine, LatentStats]:
    weights_case = (golden / sidecar["weights_file"]).with_suffix(".json")
    config = read_sidecar(weights_case)["config"]
    stage, norm = flow_stage_of(config["dit"], config["rvq"], weights_of(read_tensors(weights_case)), latent_frames)
    return TorchEngine(stage, ["velocity"]), LatentStats(*norm.frozen_stats())


def test_solve_flow_matches_golden(golden: Path, golden_case: Path) -> None:
    sidecar, tensors = read_sidecar(golden_case), read_tensors(golden_case)
    engine, stats = flow_engine(golden, sidecar, sidecar["latent_length"])
    recorder = Recorder(engine)
    head = tensors.get("true_latents_head", torch.zeros(1, 32, 0, 32))[:, :, : sidecar["incontext_length"]]
    noise = tensors["noise"][0].numpy()
    latents = stats.denormalise(
        solve_flow(
            recorder,
            tensors["codes"].flatten().numpy(),
            noise,
            stats.normalise(head[0].numpy()),
            n_steps=sidecar["num_steps"],
            guidance=sidecar["guidance_scale"],
        )
    )
    assert len(recorder.calls) == sidecar["num_steps"]
    for step, (inputs, outputs) in enumerate(recorder.calls):
        if f"step{step}_x" in tensors:
            assert_close(inputs["x"][0], tensors[f"step{step}_x"][0], 1e-4, 5e-5)
            assert_close(inputs["t"][:1], tensors[f"step{step}_t"], 1e-6, 1e-7)
            assert_close(outputs["velocity"], tensors[f"step{step}_v"], 1e-4, 5e-5)
    assert_close(latents, tensors["latents_out"][0], 1e-4, 5e-5)


test_solve_flow_matches_golden.golden_pattern = "mucodec_infer*_w[0-9]*.json"


def test_code2sound_matches_golden(golden: Path, golden_case: Path) -> None:
    """Codes to audio through the runtime's windows, solver, rendering and crossfade, window scaled down."""
    sidecar, tensors = read_sidecar(golden_case), read_tensors(golden_case)
    config = sidecar["config"]
    geometry = CodecGeometry(window_codes=config["window_codes"], hop_codes=config["hop_codes"])
    assert geometry.window_latents == config["latent_frames_per_window"]
    assert geometry.context_latents == config["incontext_latent_frames"]
    model_file, vae_file = (golden / name for name in sidecar["weights_files"])
    flow, norm = flow_stage_of(
        config["dit"], config["rvq"], weights_of(read_tensors(model_file)), geometry.window_latents
    )
    codec = weights_of(read_tensors(vae_file))
    vae_config = config["vae"]
    vae = MelVAE(
        MelVAEConfig(
            channels=vae_config["ch"],
            multiples=tuple(vae_config["ch_mult"]),
            n_res_blocks=vae_config["num_res_blocks"],
            latent_channels=vae_config["z_channels"],
            embed_channels=vae_config["embed_dim"],
        )
    )
    scale = torch.tensor(float(vae_config["scale_factor"]))
    vae.load_state_dict(
        mel_vae_state({"scale_factor": scale} | {f"first_stage_model.{k}": v for k, v in codec.items()})
    )
    vocoder_config = config["vocoder"]
    vocoder = Vocoder(
        VocoderConfig(
            initial_channels=vocoder_config["upsample_initial_channel"],
            resblock_kernels=tuple(vocoder_config["resblock_kernel_sizes"]),
            dilations=tuple(tuple(d) for d in vocoder_config["resblock_dilation_sizes"]),
        )
    )
    vocoder.load_state_dict(select_weights(codec, prefix="vocoder."))
    engines = {
        "flow": TorchEngine(flow, ["velocity"]),
        "mel_decoder": TorchEngine(MelDecoderStage(vae), ["mel"]),
        "vocoder": TorchEngine(VocoderStage(vocoder), ["waveform"]),
    }
    codes = tensors["codes"].flatten().numpy()
    n_samples = geometry.n_samples(len(codes))
    n_windows = geometry.n_windows(len(codes))
    assert n_windows == config["n_windows"]
    crossfade = Crossfade(geometry, n_samples)
    pieces = []
    windows = decode_latents(
        engines["flow"],
        codes,
        LatentStats(*norm.frozen_stats()),
        geometry,
        n_steps=config["num_steps"],
        guidance=config["guidance_scale"],
        noise=lambda window: tensors[f"noise_{window}"][0].numpy(),
    )
    for index, latents in enumerate(windows):
        assert_close(latents, tensors[f"latents_{index}"][0], 1e-4, 1e-4)
        if index == 0 and "mel_0_first64" in tensors:
            expected = tensors["mel_0_first64"]
            for channel, half in enumerate(np.split(latents, 2)):
                mel = engines["mel_decoder"].run(latents=half[None])["mel"][0, :, : expected.shape[2]]
                assert_close(mel.T, expected[channel, 0], 1e-4, 1e-4)
        window = render_window(engines, latents, rendered_samples(index, n_samples, geometry), geometry)
        pieces.append(crossfade.push(window, last=index + 1 == n_windows))
    audio = np.concatenate(pieces, axis=1)
    assert audio.shape == tuple(tensors["wav"].shape)
    assert_close(audio, tensors["wav"], 0.0, 2e-4)


test_code2sound_matches_golden.golden_pattern = "mucodec_code2sound.json"


def test_window_schedule_matches_golden(golden_case: Path) -> None:
    sidecar = read_sidecar(golden_case)
    geometry = CodecGeometry()
    crashing = {entry["n_codes"] for entry in sidecar["crashing"]}
    for case in sidecar["cases"]:
        n_codes = case["n_codes"]
        assert geometry.n_samples(n_codes) == case["samples_out"], n_codes
        if n_codes in crashing or "windows" not in case:
            continue
        assert geometry.n_windows(n_codes) == case["n_windows"], n_codes
        source = np.arange(n_codes)
        for index, window in enumerate(case["windows"]):
            expected = np.concatenate([np.arange(first, first + length) for first, length in window["codes"]])
            np.testing.assert_array_equal(window_codes(source, index, geometry), expected)
    off_by_one = [n for n in range(1, 9001) if geometry.n_samples(n) != 1920 * n]
    assert off_by_one == sidecar["target_len_off_by_one"]["values"]
    for n_codes in crashing:
        assert geometry.n_windows(n_codes) * geometry.hop_codes + geometry.overlap_codes >= n_codes


test_window_schedule_matches_golden.golden_pattern = "mucodec_code2sound_schedule.json"


@pytest.mark.parametrize("n_codes", [1, 25, 767, 768, 769, 1023, 1024, 1025, 1664, 1792, 1793, 3968, 4097, 6001])
def test_crossfade_covers_every_length(n_codes: int) -> None:
    """A constant survives the crossfade, pieces add up to the exact length, whatever the number of windows."""
    geometry = CodecGeometry()
    n_samples = geometry.n_samples(n_codes)
    n_windows = geometry.n_windows(n_codes)
    crossfade = Crossfade(geometry, n_samples)
    pieces = [
        crossfade.push(np.full((2, rendered_samples(i, n_samples, geometry)), 0.5, np.float32), last=i + 1 == n_windows)
        for i in range(n_windows)
    ]
    audio = np.concatenate(pieces, axis=1)
    assert audio.shape == (2, n_samples)
    np.testing.assert_array_equal(audio, np.float32(0.5))
    assert all(p.shape[1] for p in pieces)


def test_crossfade_is_linear_in_the_overlap() -> None:
    geometry = CodecGeometry(window_codes=8, hop_codes=6, encode_window_codes=8)
    n_samples = 14 * geometry.samples_per_code
    crossfade = Crossfade(geometry, n_samples)
    first = crossfade.push(np.zeros((2, geometry.window_samples), np.float32), last=False)
    second = crossfade.push(np.ones((2, geometry.window_samples), np.float32), last=True)
    ramp = np.linspace(0, 1, geometry.overlap_samples)
    np.testing.assert_array_equal(first, 0)
    np.testing.assert_array_equal(second[:, : geometry.overlap_samples], np.tile(ramp.astype(np.float32), (2, 1)))
    np.testing.assert_array_equal(second[:, geometry.overlap_samples :], 1)


@pytest.mark.parametrize("size", [1000, 1920, 3 * 1920 + 7, 100_000])
def test_a_window_in_pieces_fades_as_a_whole_one(size: int) -> None:
    """Overlaps of two codes, pieces that end within them, at their edges and past them; the same bits."""
    geometry = CodecGeometry(window_codes=8, hop_codes=6, encode_window_codes=8)
    n_codes = 19
    n_samples, n_windows = geometry.n_samples(n_codes), geometry.n_windows(n_codes)
    rng = np.random.default_rng(0)
    windows = [
        rng.standard_normal((2, rendered_samples(i, n_samples, geometry))).astype(np.float32) for i in range(n_windows)
    ]
    whole, parts = Crossfade(geometry, n_samples), Crossfade(geometry, n_samples)
    expected, found = [], []
    for i, window in enumerate(windows):
        last = i + 1 == n_windows
        expected.append(whole.push(window, last=last))
        pieces = [window[:, start : start + size] for start in range(0, window.shape[1], size)]
        found.append(np.concatenate([parts.push(piece, last=last) for piece in pieces], axis=1))
    assert n_windows == 3
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert sum(piece.shape[1] for piece in found) == n_samples


class Impulse:
    """A vocoder that shows which mel frame made each sample: no halo is needed, so blocks must line up exactly."""

    def run(self, *, mel: np.ndarray) -> dict[str, np.ndarray]:
        wave = np.repeat(mel[:, 0, :], 480, axis=1)
        return {"waveform": np.concatenate([wave, np.zeros((1, 16), np.float32)], axis=1)}


class RampMel:
    def run(self, *, latents: np.ndarray) -> dict[str, np.ndarray]:
        return {"mel": np.tile(np.arange(latents.shape[2] * 8, dtype=np.float32), (1, 256, 1))}


@pytest.mark.parametrize("n_samples", [1, 479, 480, 481, 512 * 480 + 1, 1_966_080])
@pytest.mark.parametrize("block_frames", [100, 512, 4096])
def test_vocoder_blocks_line_up(n_samples: int, block_frames: int) -> None:
    geometry = CodecGeometry()
    engines = {"mel_decoder": RampMel(), "vocoder": Impulse()}
    latents = np.zeros((32, 512, 32), np.float32)
    audio = render_window(engines, latents, n_samples, geometry, block_frames=block_frames)
    np.testing.assert_array_equal(audio, np.tile((np.arange(n_samples) // 480).astype(np.float32), (2, 1)))


def test_guidance_one_needs_half_the_work() -> None:
    class Linear:
        def __init__(self) -> None:
            self.batches: list[int] = []

        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            self.batches.append(len(inputs["conditional"]))
            return {"velocity": inputs["x"] * inputs["conditional"][:, None, None, None]}

    noise = np.ones((32, 4, 32), np.float32)
    empty = np.zeros((32, 0, 32), np.float32)
    engine = Linear()
    out = solve_flow(engine, np.zeros(8, np.int64), noise, empty, n_steps=2, guidance=1.0)
    np.testing.assert_allclose(out, 1.5 * 1.5, rtol=1e-6)
    assert engine.batches == [1, 1]


def test_seeded_noise_is_normal_and_differs_between_windows() -> None:
    noise = SeededNoise(13, CodecGeometry())
    first, again, second = noise(0), noise(0), noise(1)
    assert first.shape == (32, 512, 32)
    np.testing.assert_array_equal(first, again)
    assert abs(float(first.mean())) < 0.01
    assert abs(float(first.std()) - 1) < 0.01
    assert abs(float(np.corrcoef(first.ravel(), second.ravel())[0, 1])) < 0.01
