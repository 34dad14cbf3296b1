"""The FLOP model against every number of the specs' cost tables, and the floor it implies."""

from __future__ import annotations

import pytest
from lada_rt.bench.roofline import (
    DenoiserSizes,
    EncoderSizes,
    FlowSizes,
    MelDecoderSizes,
    ModelSizes,
    Peaks,
    RefEncoderSizes,
    TextEncoderSizes,
    VocoderSizes,
    Work,
    floor_seconds,
    song_work,
)
from lada_rt.errors import ParamError
from lada_rt.geometry import CodecGeometry

TERA, GIGA = 1e12, 1e9
GEOMETRY = CodecGeometry()
LM_1B = DenoiserSizes()
LM_3B = DenoiserSizes(hidden=3072, n_layers=28, kv_width=1024)


def digits(text: str) -> float:
    """Half a unit in the last place that a table prints."""
    return 0.5000001 * 10.0 ** -len(text.partition(".")[2])


@pytest.mark.parametrize(
    ("model", "n_frames", "linear", "attention", "logits", "total", "steps_20", "steps_60", "steps_80"),
    [
        (LM_1B, 750, "1.464", "0.074", "0.050", "1.588", 32, 95, 127),
        (LM_1B, 4096, "7.975", "2.201", "0.275", "10.452", 209, 627, 836),
        (LM_1B, 6000, "11.681", "4.722", "0.403", "16.805", 336, 1008, 1344),
        (LM_3B, 750, "4.239", "0.195", "0.076", "4.509", 90, 271, 361),
        (LM_3B, 4096, "23.101", "5.778", "0.413", "29.292", 586, 1757, 2343),
        (LM_3B, 6000, "33.834", "12.395", "0.604", "46.833", 937, 2810, 3747),
    ],
)
def test_denoiser(
    model: DenoiserSizes,
    n_frames: int,
    linear: str,
    attention: str,
    logits: str,
    total: str,
    steps_20: int,
    steps_60: int,
    steps_80: int,
) -> None:
    parts = model.step_parts(n_frames)
    for name, printed in (("linear", linear), ("attention", attention), ("logits", logits)):
        assert parts[name] / TERA == pytest.approx(float(printed), abs=digits(printed)), name
    step = model.step(n_frames).flops / TERA
    assert step == pytest.approx(float(total), abs=digits(total))
    for n_steps, printed_total in ((20, steps_20), (60, steps_60), (80, steps_80)):
        assert n_steps * step == pytest.approx(printed_total, abs=0.5)


@pytest.mark.parametrize(("model", "layer_linears"), [(LM_1B, 973_078_528), (LM_3B, 2_818_572_288)])
def test_denoiser_parameters(model: DenoiserSizes, layer_linears: int) -> None:
    assert model.n_layers * model.layer_params == layer_linears


@pytest.mark.parametrize(("model", "gigabytes"), [(LM_1B, 4.03), (LM_3B, 11.48)])
def test_denoiser_weight_bytes(model: DenoiserSizes, gigabytes: float) -> None:
    weights = 4 * (model.n_layers * model.layer_params + model.hidden * model.vocab)
    assert weights / GIGA == pytest.approx(gigabytes, abs=0.005)


@pytest.mark.parametrize(
    ("n_steps", "useful"), [(8, 69.7), (20, 66.1), (36, 65.0), (60, 64.5), (80, 64.3), (100, 64.2)]
)
def test_masked_rows_only(n_steps: int, useful: float) -> None:
    """The saving of a run is that of its logits and of the last layer, over the mean masked fraction of the spec."""
    full, lean = LM_1B.step(4096) * n_steps, LM_1B.run(4096, n_steps)
    per_row = (full.flops - LM_1B.step(4096, 0).flops * n_steps) / (4098 * n_steps)
    rows = n_steps * 4098 - (full.flops - lean.flops) / per_row
    assert 100 * rows / (n_steps * 4096) == pytest.approx(useful, abs=0.06)


def test_last_layer_saving_is_three_percent() -> None:
    full, lean = (LM_1B.step(4096) * 60).flops, LM_1B.run(4096, 60).flops
    logits_share = LM_1B.step_parts(4096)["logits"] / LM_1B.step(4096).flops
    assert 100 * (1 - lean / full - 0.355 * logits_share) == pytest.approx(2, abs=1)


def test_encoder() -> None:
    lean, reference = EncoderSizes(), EncoderSizes(n_layers=12)
    assert lean.front_end_flops(1024) / TERA == pytest.approx(1.119, abs=0.0005)
    assert lean.layer_flops(1024) / TERA == pytest.approx(0.0538, abs=0.00005)
    assert lean.window(1024, 1_966_560).flops / TERA == pytest.approx(1.443, abs=0.0005)
    head = 2.0 * 1024 * 4096 * 1024
    assert (reference.window(1024, 1_966_560).flops + head) / TERA == pytest.approx(1.774, abs=0.0005)


def test_flow() -> None:
    flow = FlowSizes()
    parts = flow.row_parts(4096)
    assert 2 * parts["linear"] / TERA == pytest.approx(11.84, abs=0.005)
    assert 2 * parts["attention"] / TERA == pytest.approx(5.10, abs=0.005)
    assert flow.step(4096, 2).flops / TERA == pytest.approx(16.955, abs=0.0005)
    assert (flow.step(4096, 2) * 20).flops / TERA == pytest.approx(339.10, abs=0.005)


def test_mel_decoder() -> None:
    mel = MelDecoderSizes()
    assert 2 * mel.channel(512, 32).flops / TERA == pytest.approx(29.50, abs=0.005)
    assert pytest.approx(2.2, abs=0.05) == 2 * 4.0 * 16384**2 * 1024 / TERA
    assert 2 * mel.attention_flops(16384) / TERA == pytest.approx(2.2 + 2 * 8 * 1024**2 * 16384 / TERA, abs=0.05)


def test_vocoder() -> None:
    vocoder = VocoderSizes()
    # 14.1635: one unit of the last digit, as the spec may leave out the 16 samples past the last frame
    assert 2 * vocoder.frames(1024).flops / TERA == pytest.approx(14.163, abs=0.001)
    assert 13 * 2 * vocoder.frames(1024).flops / TERA == pytest.approx(184.13, abs=0.02)
    assert 2 * vocoder.frames(4096).flops / TERA == pytest.approx(56.65, abs=0.005)


def test_conditioning() -> None:
    mert = RefEncoderSizes()
    assert mert.n_frames(983_040) == 3071
    assert mert.n_frames(1_440_000) == 4499
    for n_samples, conv, linear, attention, positions in (
        (983_040, 302, 522, 348, 29),
        (1_440_000, 442, 764, 746, 43),
    ):
        parts = mert.chunk_parts(n_samples)
        found = [parts[name] / GIGA for name in ("conv", "linear", "attention", "positions")]
        assert found == pytest.approx([conv, linear, attention, positions], abs=0.6)
    song = [1_440_000] * 6 + [207_360]
    assert sum(mert.n_frames(n) for n in song) == 27_641
    assert sum(mert.chunk(n).flops for n in song) / TERA == pytest.approx(12.2, abs=0.05)
    assert mert.clamp_flops() / GIGA == pytest.approx(0.14, abs=0.005)
    text = TextEncoderSizes()
    assert text.tokens(128).flops / GIGA == pytest.approx(22.3, abs=0.06)
    assert text.tokens(32).flops / GIGA == pytest.approx(5.5, abs=0.05)


@pytest.mark.parametrize(
    ("n_samples", "n_codes", "windows", "decode_windows", "encode", "flow", "mel"),
    [
        (1_440_000, 751, 1, 1, 1.44, 339.1, 29.5),
        (7_864_320, 4097, 5, 6, 7.2, 2034.6, 177.0),
        (11_520_000, 6001, 6, 8, 8.7, 2712.8, 236.0),
    ],
)
def test_songs(
    n_samples: int, n_codes: int, windows: int, decode_windows: int, encode: float, flow: float, mel: float
) -> None:
    work = song_work(ModelSizes(), GEOMETRY, n_samples=n_samples, n_steps=60, flow_steps=20, n_tokens=32)
    assert GEOMETRY.n_codes(n_samples) == n_codes
    assert GEOMETRY.n_windows(n_codes) == decode_windows
    assert work["encoder"].flops / TERA == pytest.approx(encode, abs=0.05)
    assert work["encoder"].flops == pytest.approx(windows * EncoderSizes().window(1024, 1_966_560).flops)
    assert work["flow"].flops / TERA == pytest.approx(flow, abs=0.05)
    assert work["mel_decoder"].flops / TERA == pytest.approx(mel, abs=0.06)
    # rendered up to the song's end only: never more than a whole pass over every window, never less than the song
    whole_pass = decode_windows * 56.65
    song_only = 56.65 * GEOMETRY.n_samples(n_codes) / GEOMETRY.window_samples
    assert song_only * 0.999 < work["vocoder"].flops / TERA < whole_pass * 1.001


def test_half_precision_moves_half_the_weights() -> None:
    """1B: 2.01 GB of weights a step in bf16 (spec/lada_band g)."""

    def work(**value_bytes: int) -> dict[str, float]:
        options = {"n_samples": 480_000, "n_steps": 1, "flow_steps": 1}
        return {k: w.bytes for k, w in song_work(ModelSizes(), GEOMETRY, **options, value_bytes=value_bytes).items()}

    full = work()
    half = work(denoiser=2, flow=2, mel_decoder=2, vocoder=2)
    assert full["denoiser"] == 2 * half["denoiser"]
    assert half["denoiser"] == pytest.approx(2.01e9, rel=0.01)
    assert full["encoder"] == half["encoder"]
    for name in ("flow", "mel_decoder", "vocoder"):  # states and sound stay float32
        assert 0.5 * full[name] < half[name] < full[name]


def test_work_is_linear_in_steps_and_halved_without_guidance() -> None:
    def flow(flow_steps: int, guided: bool) -> float:
        work = song_work(
            ModelSizes(), GEOMETRY, n_samples=480_000, n_steps=8, flow_steps=flow_steps, guided=guided, n_tokens=None
        )
        assert "text_encoder" not in work
        return work["flow"].flops

    assert flow(20, True) == pytest.approx(2 * flow(10, True))
    assert flow(10, True) == pytest.approx(2 * flow(10, False))


def test_floor_is_the_slower_of_the_two() -> None:
    peaks = Peaks(flops_per_s=100.0, bytes_per_s=10.0)
    assert floor_seconds(Work(200.0, 10.0), peaks) == 2.0
    assert floor_seconds(Work(200.0, 50.0), peaks) == 5.0
    with pytest.raises(ParamError, match="positive"):
        Peaks(0.0, 1.0)


def test_ideal_time_of_the_spec() -> None:
    """spec/lada_band g: 60 steps at 500 TFLOP/s sustained take 0.19, 1.25 and 2.0 s (1B)."""
    peaks = Peaks(500e12, 4.8e12)
    for n_frames, seconds in ((750, 0.19), (4096, 1.25), (6000, 2.0)):
        assert 60 * floor_seconds(LM_1B.step(n_frames, value_bytes=2), peaks) == pytest.approx(seconds, abs=0.02)
