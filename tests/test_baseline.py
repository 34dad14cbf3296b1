"""The opponent of the benchmark: its sampler, windows and noise by themselves, and the whole against the runtime."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lada_rt import _C
from lada_rt.bench.check import Recorder
from lada_rt.bundle import Bundle, file_sha256
from lada_rt.errors import CheckpointError, EngineError, ParamError
from lada_rt.params import GenerationParams
from lada_rt.pipeline import Pipeline
from lada_rt_export import baseline as baseline_module
from lada_rt_export.baseline import Baseline, draw_tokens, philox_exponential, philox_gumbel, released_windows
from lada_rt_export.demo.training.sizes import PRESETS
from lada_rt_export.models.clamp3 import Clamp3Audio, Clamp3Text
from lada_rt_export.models.flow import Flow
from lada_rt_export.models.latent_norm import LatentNorm
from lada_rt_export.models.mask_predictor import MaskPredictor
from lada_rt_export.models.mel_vae import MelVAE
from lada_rt_export.models.mert import Mert
from lada_rt_export.models.mucodec_common import GroupNormF32
from lada_rt_export.models.muq import MuQ
from lada_rt_export.models.stages_mucodec import EncoderStage
from lada_rt_export.models.vocoder import Vocoder
from lada_rt_export.models.vq import VQ, condition_linear
from lada_rt_export.release import Release
from lada_rt_export.release_modules import ReleaseSource
from lada_rt_export.stages import stage_spec
from lada_rt_export.synthetic_release import write_synthetic_release
from lada_rt_export.torch_engine import TorchEngine
from safetensors.torch import save_file
from stubs import sung, write_stub_bundle

RATE = 48_000
TEXT = "soul"
PARAMS = GenerationParams(steps=3, flow_steps=2, seed=5)


@pytest.mark.parametrize(
    ("n_samples", "n_windows"),
    [(48_000, 2), (1_440_000, 2), (1_966_080, 3), (1_966_560, 2), (1_968_000, 2), (4_800_000, 3), (7_864_320, 5)],
)
def test_windows_are_the_released_ones(n_samples: int, n_windows: int) -> None:
    """Counts of spec/mucodec 2.2; the cuts are the song repeated without end."""
    audio = torch.arange(n_samples, dtype=torch.float32).expand(2, -1)
    windows = released_windows(audio, 1_966_080, 1_966_560)
    assert windows.shape == (n_windows, 2, 1_966_560)
    for index in range(n_windows):
        first = index * 1_966_560
        assert windows[index, 0, 0] == first % n_samples
        assert windows[index, 1, -1] == (first + 1_966_559) % n_samples


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(100, 0.9, 1.0), (5, 0.5, 0.7), (None, 0.9, 1.0), (40, 1.0, 1.3), (1, 0.9, 1.0)]
)
def test_sampler_draws_what_the_runtime_draws(top_k: int | None, top_p: float, temperature: float) -> None:
    params = GenerationParams(top_k=top_k, top_p=top_p, temperature=temperature, seed=77)
    logits = (3 * torch.randn(40, 500, generator=torch.Generator().manual_seed(1))).float()
    positions = np.arange(40, dtype=np.int64) * 3
    noise = baseline_module._own_noise(params.seed, positions)
    tokens, confidence = draw_tokens(logits, params, 4, noise)
    expected, log_confidence = _C.sample(
        logits.numpy(), positions, seed=77, step=4, top_k=top_k or 0, top_p=top_p, temperature=temperature
    )
    np.testing.assert_array_equal(tokens.numpy(), expected)
    np.testing.assert_allclose(np.log(confidence.numpy()), log_confidence, atol=2e-5)


def test_multinomial_draws_only_what_the_filters_leave() -> None:
    params = GenerationParams(top_k=10, top_p=0.8)
    torch.manual_seed(0)
    logits = (2 * torch.randn(1, 200)).float().expand(4000, -1)
    tokens, confidence = draw_tokens(logits, params, 0)
    probs = _C.filtered_probs(logits[:1].contiguous().numpy(), top_k=10, top_p=0.8, temperature=1.0)[0]
    counts = np.bincount(tokens.numpy(), minlength=200)
    assert (probs[counts > 0] > 0).all()
    # five standard deviations of each count
    np.testing.assert_array_less(np.abs(counts - 4000 * probs), 5 * np.sqrt(4000 * probs * (1 - probs)) + 1)
    np.testing.assert_allclose(confidence.numpy(), probs[tokens.numpy()], rtol=1e-5)


def test_noise_is_the_runtimes() -> None:
    for step, position, token in ((0, 0, 0), (7, 123, 16_383), (59, 9_000, 5)):
        word = _C.philox4x32([step, position, token, 0], [13, 0])[0]
        uniform = (word + 0.5) / 2**32
        found = philox_exponential(13, step, np.array([position]), np.array([token]))[0]
        assert found == pytest.approx(-np.log1p(-uniform), rel=1e-6)
        remask = _C.philox4x32([step, position, 0, 1], [13, 0])[0]
        expected = -np.log(-np.log1p(-(remask + 0.5) / 2**32))
        assert philox_gumbel(13, step, np.array([position]))[0] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ReleaseSource:
    made = write_synthetic_release(tmp_path_factory.mktemp("release"), "tiny", seed=3)
    return ReleaseSource(Release.locate(made.checkpoint, made.pretrained_root), max_seconds=30)


@pytest.fixture(scope="module")
def bundle(source: ReleaseSource, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A manifest that fits the release; its graphs are not read here."""
    sizes = source.sizes
    return Bundle.open(
        write_stub_bundle(
            tmp_path_factory.mktemp("bundle") / "release.bundle",
            vocab_size=sizes.vocab_size,
            mask_id=sizes.mask_id,
            prefix_dim=sizes.feature_size,
        )
    )


@pytest.fixture(scope="module")
def recorded(source: ReleaseSource, bundle: Bundle) -> tuple[Recorder, object]:
    """A run of the runtime's loops on the release's modules."""
    names = ("encoder", "text_encoder", "denoiser", "flow", "mel_decoder", "vocoder")
    engines = {}
    for name in names:
        module = source.module(name)
        engines[name] = TorchEngine(module, stage_spec(name, module, source.sizes).outputs)
    recorder = Recorder(engines, PARAMS.steps, PARAMS.flow_steps)
    pipeline = Pipeline(bundle, recorder.engines, backend="torch modules", device="cpu")
    pipeline._loaded.stats.mean[:] = source.latent_mean
    pipeline._loaded.stats.std[:] = source.latent_std
    return recorder, pipeline.generate((sung(RATE), RATE), text=TEXT, params=PARAMS)


def test_same_noise_same_result(source: ReleaseSource, bundle: Bundle, recorded: tuple[Recorder, object]) -> None:
    opponent = Baseline(source, bundle)
    recorder, result = recorded
    errors = opponent.check(sung(RATE)[None], RATE, TEXT, PARAMS, recorder, result)  # type: ignore[arg-type]  # a Result
    assert errors["codes"] <= 1 / 26  # near ties of random codewords: an FFT and a matrix round differently
    assert errors["draws"] <= 1 / 26
    assert errors["latents"] < 1e-4
    assert errors["audio"] < 1e-4
    assert 0 < errors["chunked audio"] < 0.1


def test_the_release_runs_layers_nobody_needs(source: ReleaseSource, bundle: Bundle) -> None:
    opponent = Baseline(source, bundle)
    stage = source.module("encoder")
    assert isinstance(stage, EncoderStage)
    assert isinstance(opponent._muq, MuQ)
    assert len(opponent._muq.conformer.layers) == 2 * len(stage.muq.conformer.layers)
    assert opponent._head is not None


def test_each_norm_of_the_mel_decoder_is_one_operator(
    source: ReleaseSource, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the release: spelt out for ONNX Runtime, as the exported stage has it, it costs eager torch more passes."""
    calls: list[int] = []
    group_norm = torch.nn.functional.group_norm
    monkeypatch.setattr(torch.nn.functional, "group_norm", lambda *a, **k: calls.append(1) or group_norm(*a, **k))
    opponent = Baseline(source, bundle)
    latents = torch.randn(1, 32, 4, 32, generator=torch.Generator().manual_seed(0))
    stage = source.module("mel_decoder")
    with torch.inference_mode():
        found = opponent.mel(latents)
        n_norms = sum(isinstance(module, GroupNormF32) for module in stage.modules())
        assert len(calls) == n_norms > 20
        wanted = stage(torch.cat(latents.chunk(2, dim=1)))
    assert len(calls) == n_norms  # the stage's are still spelt out
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_bundle_brings_its_tokenizer(source: ReleaseSource, tmp_path: Path) -> None:
    """It may have been built with --tokenizer, from a root that holds none."""
    made = write_synthetic_release(tmp_path / "release", "tiny", seed=3)
    shutil.rmtree(made.pretrained_root / "hub")
    folder = write_stub_bundle(tmp_path / "a.bundle", vocab_size=source.sizes.vocab_size, mask_id=source.sizes.mask_id)
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "tokenizer.json"
    path.write_bytes(source.tokenizer_json)
    manifest["files"][path.name] |= {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert Baseline.for_bundle(Bundle.open(folder), made.checkpoint, made.pretrained_root)


def test_a_run_reports_every_stage(source: ReleaseSource, bundle: Bundle) -> None:
    seconds = Baseline(source, bundle).run(sung(RATE)[None], RATE, TEXT, PARAMS)
    stages = [value for name, value in seconds.items() if name != "total"]
    assert set(seconds) == {"encoder", "text_encoder", "denoiser", "flow", "mel_decoder", "vocoder", "total"}
    assert min(stages) > 0
    assert sum(stages) <= seconds["total"]
    assert sum(stages) == pytest.approx(seconds["total"], rel=0.05, abs=0.05)


def test_other_weights_are_found(
    source: ReleaseSource, bundle: Bundle, recorded: tuple[Recorder, object], tmp_path: Path
) -> None:
    made = write_synthetic_release(tmp_path, "tiny", seed=4)
    other = Baseline(ReleaseSource(Release.locate(made.checkpoint, made.pretrained_root), max_seconds=30), bundle)
    recorder, result = recorded
    with pytest.raises(EngineError, match="differ"):
        other.check(sung(RATE)[None], RATE, TEXT, PARAMS, recorder, result)  # type: ignore[arg-type]  # a Result


def test_a_bundle_of_unknown_origin_needs_its_files(bundle: Bundle) -> None:
    with pytest.raises(ParamError, match="--checkpoint, and for a release --pretrained-root"):
        Baseline.for_bundle(bundle, None, None)


def test_a_trained_demo_needs_one_file(tmp_path: Path) -> None:
    """A file of the training's form, with the weights that networks start from."""
    sizes = PRESETS["toy"]
    torch.manual_seed(2)
    networks: dict[str, torch.nn.Module] = {
        "muq": MuQ(sizes.muq),
        "vq": VQ(sizes.vq),
        "condition": condition_linear(sizes.vq),
        "mask_predictor": MaskPredictor(replace(sizes.predictor, rtd_head=False)),
        "clamp3_text": Clamp3Text(sizes.text),
        "mert": Mert(sizes.mert),
        "clamp3_audio": Clamp3Audio(sizes.audio),
        "mel_vae": MelVAE(sizes.mel_vae),
        "vocoder": Vocoder(sizes.vocoder),
        "flow": Flow(sizes.flow),
        "normfeat": LatentNorm(32, 32),
    }
    tensors = {f"{name}.{key}": t.clone() for name, net in networks.items() for key, t in net.state_dict().items()}
    tensors["normfeat.counts"] = torch.full((1,), 1e6)
    weights = tmp_path / "trained.safetensors"
    save_file(tensors, weights, {"training": json.dumps({"preset": "toy", "seed": 2})})
    changes = {
        "geometry": sizes.geometry.to_json(),
        "vocab_size": sizes.predictor.n_codes,
        "mask_id": sizes.predictor.mask_id,
        "prefix_dim": sizes.text.output_size,
    }
    toy = Bundle.open(write_stub_bundle(tmp_path / "toy.bundle", **changes))
    opponent = Baseline.for_bundle(toy, weights, None)
    with torch.inference_mode():
        vocal_codes = opponent.encode(sung(2 * RATE)[None], RATE)
        codes = opponent.denoise(vocal_codes, opponent.prefix(TEXT, PARAMS), PARAMS)
    assert len(vocal_codes) == len(codes) == 51
    assert int(codes.max()) < sizes.predictor.mask_id
    weights.write_bytes(b"none")
    with pytest.raises(CheckpointError, match="expected trained weights"):
        Baseline.for_bundle(toy, weights, None)
