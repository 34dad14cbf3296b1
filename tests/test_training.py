"""The training pipeline at toy size, end to end: songs, every stage, restart, bundle, evaluation."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lada_rt.bundle import Bundle
from lada_rt.errors import ExportError, ParamError
from lada_rt.geometry import CodecGeometry
from lada_rt_export.build import build_bundle
from lada_rt_export.demo import evaluate
from lada_rt_export.demo.songs.form import Chord, Section
from lada_rt_export.demo.songs.song import Song, compose
from lada_rt_export.demo.source import TrainedSource, collect_weights
from lada_rt_export.demo.training import features, flow, loop, runner
from lada_rt_export.demo.training.codec import Codec
from lada_rt_export.demo.training.codes import CodecEngine
from lada_rt_export.demo.training.data import song_seed
from lada_rt_export.demo.training.predictor import (
    NO_LABEL,
    SILENCED,
    SUNG,
    UNSUNG,
    PredictorModules,
    PredictorSongs,
    PredictorTask,
    frame_labels,
    masked_loss,
)
from lada_rt_export.demo.training.sizes import PRESETS, Budget
from lada_rt_export.demo.training.style import StyleModules
from lada_rt_export.models.flow import Flow, FlowConfig
from lada_rt_export.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from lada_rt_export.models.muq import MuQ
from safetensors.torch import load_file

TOY = PRESETS["toy"]
SEED = 5
TRAINED = ("codec", "mel_vae", "style", "flow", "predictor", "refine", "lengthen")
RATE_HZ = 48_000


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    assert runner.train_all(TOY, loop.RunOptions(folder, SEED, log_every=1))
    return folder


@pytest.fixture(scope="module")
def weights(trained: Path) -> Path:
    path = collect_weights(TOY, trained, SEED)
    before = path.read_bytes()
    assert collect_weights(TOY, trained, SEED).read_bytes() == before
    return path


@pytest.fixture(scope="module")
def bundle(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "toy.bundle"
    assert build_bundle(path, TrainedSource(weights)) is not None
    return path


def _copy(trained: Path, to: Path, without: str) -> Path:
    shutil.copytree(trained, to, ignore=shutil.ignore_patterns(f"{without}.pt", f"{without}.losses.json"))
    return to


def test_collected_logits_are_sharper(weights: Path, trained: Path) -> None:
    modules = PredictorModules(TOY)
    loop.load_weights(trained, "lengthen", modules)
    collected = load_file(weights)["mask_predictor.to_logits.weight"]
    assert torch.equal(collected.float(), 2 * modules.net.to_logits.weight)


@pytest.mark.parametrize("stage", TRAINED)
def test_a_run_cut_at_every_step_ends_in_the_same_bits(stage: str, trained: Path, tmp_path: Path) -> None:
    folder = _copy(trained, tmp_path / "cut", stage)
    options = loop.RunOptions(folder, SEED, log_every=1, stop_after=1)
    n_runs = 1
    while not runner.run_stage(TOY, options, stage):
        n_runs += 1
    assert n_runs == TOY.budgets[stage].n_steps
    whole, cut = (torch.load(f / f"{stage}.pt", weights_only=True) for f in (trained, folder))
    assert whole["modules"].keys() == cut["modules"].keys()
    for part in ("modules", "average"):
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, cut[part][name]), name
    rows = [json.loads((f / f"{stage}.losses.json").read_text())["rows"] for f in (trained, folder)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("stage", TRAINED)
def test_losses_go_down(stage: str, trained: Path, tmp_path: Path) -> None:
    n_steps = 16
    budget = replace(TOY.budgets[stage], n_steps=n_steps, learning_rate=5e-3, average=0.0)
    sizes = replace(TOY, budgets={**TOY.budgets, stage: budget})
    options = loop.RunOptions(_copy(trained, tmp_path / "down", stage), SEED)

    def judged(task: loop.Task) -> float:
        """The mean loss of four fixed batches, none of them trained on."""
        total = 0.0
        for step in range(4):
            rng = loop.step_generators(SEED + 1, stage, step)
            with torch.no_grad():
                total += float(task.step(n_steps - 1, rng)["loss"])
        return total / 4

    task = runner._task(sizes, options, stage)
    before = judged(task)
    assert loop.train(task, options)
    assert judged(task) < 0.97 * before


def test_songs_of_training_and_evaluation_never_meet() -> None:
    demo = PRESETS["demo"]
    seeds = {
        song_seed(demo, seed, kind, i)
        for seed in (0, 1, 2**31)
        for kind, n in (("codec", demo.n_codec_songs), ("predictor", demo.n_predictor_songs + demo.n_long_songs))
        for i in (0, 1, n - 1)
    }
    assert len(seeds) == 18
    assert max(seeds) < demo.held_out == evaluate.Settings().seed


def test_the_encoder_stage_gives_the_codes_that_were_trained_on(trained: Path, weights: Path) -> None:
    codec = Codec(TOY)
    loop.load_weights(trained, "codec", codec)
    rng = np.random.default_rng(3)
    t = np.arange(TOY.geometry.encode_window_samples) / RATE_HZ
    glide = np.sin(2 * np.pi * (200 * t + 80 * t**2)) * (np.sin(2 * np.pi * 1.5 * t) > 0)
    audio = (0.3 * glide + 0.01 * rng.standard_normal((2, len(t)))).astype(np.float32)[None]
    codes = CodecEngine(codec).run(audio=audio)["codes"]
    with torch.no_grad():
        stage_codes = TrainedSource(weights).module("encoder")(torch.from_numpy(audio)).numpy()
    assert codes.shape == stage_codes.shape == (1, TOY.geometry.encode_window_codes)
    assert np.mean(codes == stage_codes) >= 0.99


def test_later_stages_learn_from_the_weights_that_are_shipped(trained: Path, weights: Path) -> None:
    """Parameters in half precision from the moment a stage is loaded; statistics as they are."""
    style = StyleModules(TOY)
    loop.load_weights(trained, "style", style)
    shipped = load_file(weights)
    assert {shipped[f"clamp3_text.{name}"].dtype for name, _ in style.text.named_parameters()} == {torch.float16}
    for name, parameter in style.text.named_parameters():
        assert torch.equal(shipped[f"clamp3_text.{name}"].float(), parameter), name
    assert shipped["normfeat.sum_x2"].dtype == torch.float32
    raw = torch.load(trained / "style.pt", weights_only=True)["modules"]["read.weight"]
    assert not torch.equal(raw, style.read.weight)
    torch.testing.assert_close(raw, style.read.weight, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize(("stage", "before"), runner.GOES_ON_FROM.items())
def test_later_training_starts_from_what_the_earlier_left(
    trained: Path, tmp_path: Path, stage: str, before: str
) -> None:
    folder = _copy(trained, tmp_path / "start", stage)
    assert not runner.run_stage(TOY, loop.RunOptions(folder, SEED, stop_after=0), stage)
    found = torch.load(folder / f"{stage}.pt", weights_only=True)["modules"]
    left = PredictorModules(TOY)
    loop.load_weights(folder, before, left)
    torch.testing.assert_close(found, dict(left.state_dict()), rtol=0, atol=0)


def test_two_stages_may_claim_a_new_folder_at_once(tmp_path: Path) -> None:
    options = loop.RunOptions(tmp_path / "new", SEED)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: runner.claim(TOY, options), range(64)))
    assert [path.name for path in options.folder.iterdir()] == ["run.json"]
    with pytest.raises(ParamError, match="choose another --out"):
        runner.claim(TOY, loop.RunOptions(tmp_path / "new", SEED + 1))


def test_encoder_mel_is_the_front_ends() -> None:
    muq = MuQ(TOY.muq)
    rng = np.random.default_rng(0)
    audio = torch.from_numpy(0.1 * rng.standard_normal((1, 2, 48_000)).astype(np.float32))
    found = features.encoder_mel(muq, audio)
    kernel = features.resample_kernel().expand(1, 2, -1) * 0.5
    expected = muq.front_end(features.resample_to_24k(audio, kernel).squeeze(1))
    assert found.shape == expected.shape == (1, 128, 100)
    assert float((found - expected).abs().max()) < 1e-3  # float32 FFT against a float32 convolution, in deviations


def test_latent_statistics_are_final_and_silence_the_unused_channels(trained: Path, weights: Path) -> None:
    source = TrainedSource(weights)
    stored = [np.load(path).astype(np.float64) for path in sorted((trained / "songs").glob("*/latents.npy"))]
    assert len(stored) == TOY.n_codec_songs
    z = np.stack(stored)  # [songs, 32, L, 32]
    active = np.flatnonzero(flow.carried_channels(TOY).numpy())
    silent = np.setdiff1d(np.arange(32), active)
    # two channels of sound and the frames' sign; then the bins' sign, then nothing
    assert list(active) == [0, 1, 2, 16, 17, 18]
    assert not source.latent_std[silent].any()
    np.testing.assert_array_equal(source.latent_mean[[3, 19]], [[1.0, -1.0] * 16] * 2)
    assert not source.latent_mean[np.setdiff1d(silent, [3, 19])].any()
    np.testing.assert_array_equal(z[:, 2, :, 5], [[1.0, -1.0] * (z.shape[2] // 2)] * len(z))
    np.testing.assert_allclose(source.latent_mean[active], z.mean(axis=(0, 2))[active], atol=2e-3)
    spread = z.std(axis=(0, 2))[active]
    seen = spread > 0.05  # below, float32 sums of squares in large counts round
    np.testing.assert_allclose(source.latent_std[active][seen], spread[seen], rtol=0.05)
    net = flow.FlowModules(TOY)
    loop.load_weights(trained, "flow", net)
    assert float(net.norm.counts) >= 100_000
    assert not net.flow.pos_embed.proj.weight[:, silent].any()
    assert not net.flow.proj_out.weight.unflatten(0, (4, 32))[:, silent].any()


def test_a_crop_of_the_flow_has_the_positions_of_the_window() -> None:
    torch.manual_seed(0)
    net = Flow(FlowConfig(n_layers=1, n_heads=1, head_dim=8, time_features=8, latent_frames=16))
    x, t = torch.randn(1, 96, 16, 32), torch.rand(1)
    assert torch.equal(flow.cropped(net, 0, 16)(x, t), net(x, t))
    view = flow.cropped(net, 6, 4)
    assert torch.equal(view.pos_embed.table, net.pos_embed.table[3 * 16 : 5 * 16])
    assert view.pos_embed.proj.weight is net.pos_embed.proj.weight
    assert view(x[:, :, :4], t).shape == (1, 32, 4, 32)
    assert net.config.latent_frames == 16


def test_masked_loss_of_a_net_that_knows_nothing() -> None:
    torch.manual_seed(0)
    config = MaskPredictorConfig(16, 1, 2, 2, 16, 32, 32, condition_size=8, rtd_head=True)
    net = MaskPredictor(config)
    for layer in (net.to_logits, net.rtd_head):
        torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(net.rtd_head.bias)
    codes = torch.randint(0, 32, (4, 50))
    codes[1, 30:] = config.pad_id
    vocal = torch.where(codes == config.pad_id, config.vocal_pad, torch.randint(0, 32, (4, 50)))
    found = masked_loss(net, vocal, codes, torch.zeros(4, 2, 8), 4)
    assert found.cross_entropy.item() == pytest.approx(math.log(32), rel=1e-5)
    assert found.detection.item() == pytest.approx(math.log(2), rel=1e-5)
    assert 0 <= found.right.item() < 0.2
    assert [tuple(x.shape) for x in found.states] == [(4, 50, 16)]
    assert masked_loss(net, vocal, codes, torch.zeros(4, 2, 8), 0).detection.item() == 0


def test_a_loss_over_the_frames_that_count_is_never_empty() -> None:
    torch.manual_seed(0)
    net = MaskPredictor(MaskPredictorConfig(16, 1, 2, 2, 16, 32, 32, condition_size=8, rtd_head=True))
    codes, ignored = torch.randint(0, 32, (1, 20)), torch.ones(1, 20, dtype=torch.bool)
    ignored[0, 7] = False
    for _ in range(30):
        # about an eighth of the draws leave frame 7 unmasked at first
        assert math.isfinite(masked_loss(net, codes, codes, torch.zeros(1, 2, 8), 0, ignored).cross_entropy.item())


def test_spans_of_the_vocal_are_taken_away(trained: Path) -> None:
    songs = PredictorSongs(TOY, trained / "predictor", SEED, "cpu")
    vocal, _, _, labels = songs.crops(np.random.default_rng(0), 40, 96)
    silences = [
        set(s["vocals"][:, : len(s["labels"][2])][:, s["labels"][2] == UNSUNG].ravel()) for s in map(songs.song, (0, 1))
    ]
    silenced = labels[:, 2] == SILENCED
    assert 10 <= int(silenced.any(dim=1).sum()) <= 30
    for codes, span in zip(vocal, silenced, strict=True):
        assert int(span.sum()) <= 96 // 3
        assert any(set(codes[span].tolist()) <= silence for silence in silences)


def test_long_songs_are_others_and_never_meet_those_of_one_length(trained: Path) -> None:
    for long, of_index in ((False, {0: TOY.song_s, 1: TOY.song_s}), (True, {2: TOY.long_song_s})):
        songs = PredictorSongs(TOY, trained / "predictor", SEED, "cpu", long=long)
        songs.crops(np.random.default_rng(0), 40, 32)
        lengths_s = {
            index: len(song["accompaniment"]) / TOY.geometry.code_rate_hz for index, song in songs._songs.items()
        }
        # to a frame, as the last one may be of a part
        assert lengths_s == pytest.approx(of_index, abs=0.05)


def test_the_place_is_learned_behind_early_layers_too(trained: Path) -> None:
    sizes = dataclasses.replace(TOY, predictor=dataclasses.replace(TOY.predictor, n_layers=4))
    torch.manual_seed(0)
    task = PredictorTask(sizes, PredictorSongs(sizes, trained / "predictor", SEED, "cpu"))
    losses = task.step(0, loop.step_generators(SEED, "predictor", 0))
    behind = {}
    for name in ("place", "early place"):
        task.modules.zero_grad()
        losses[name].backward(retain_graph=True)
        behind[name] = [
            i for i, layer in enumerate(task.modules.net.lm.layers) if layer.mlp.down_proj.weight.grad is not None
        ]
    # of four layers the second is the first that a quarter of the depth comes before
    assert behind == {"place": [0, 1, 2, 3], "early place": [0, 1]}


def test_frames_are_labelled_with_their_chord_and_sixteenth() -> None:
    score = compose(7, duration_s=12.0)
    n_frames, rate_hz = 320, 25.0
    chord, place, sung, tempo = frame_labels(score, n_frames, rate_hz)
    times = (np.arange(n_frames) + 0.5) / rate_hz
    for one in score.form.chords():
        inside = (times >= one.start_s) & (times < one.end_s)
        third = (one.pitch_classes[1] - one.root) % 12
        assert set(chord[inside]) <= {one.root + (12 if third == 3 else 0)}
    beats = score.form.beats_s()
    assert set(place[(times >= beats[0]) & (times < beats[-1])]) == set(range(16))
    for bar, start in enumerate(beats[:-5:4]):
        # the frame after a downbeat, and the last before the next
        assert place[np.searchsorted(times, start)] == 0, bar
        assert place[np.searchsorted(times, beats[4 * bar + 4]) - 1] == 15, bar
    for section in score.form.sections():
        inside = (times >= section.start_s) & (times < section.end_s)
        assert set(sung[inside]) == {SUNG if section.name in ("verse", "chorus") else UNSUNG}, section
    assert set(tempo + 70) == {score.form.tempo_bpm}
    outside = times >= max(score.form.chords()[-1].end_s, beats[-1])
    assert set(chord[outside]) | set(place[outside]) <= {NO_LABEL}


def test_crops_grow_and_wrong_folders_are_refused(trained: Path, tmp_path: Path) -> None:
    budget = Budget(10, 8, ((0.5, 100), (1.0, 400)), long_batch_size=2)
    assert [budget.crop(step) for step in (0, 4, 5, 9)] == [(8, 100), (8, 100), (2, 400), (2, 400)]
    with pytest.raises(ParamError, match="choose another --out"):
        runner.run_stage(TOY, loop.RunOptions(trained, SEED + 1), "codec")
    with pytest.raises(ExportError, match="run --stage songs first"):
        runner.run_stage(TOY, loop.RunOptions(tmp_path / "empty", SEED), "codec")
    for stage, needed in (("flow", "latents"), ("predictor", "codes")):
        folder = tmp_path / needed
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("latents.npy", "codes.npy", "predictor"))
        with pytest.raises(ExportError, match=f"run --stage {needed} first"):
            runner.run_stage(TOY, loop.RunOptions(folder, SEED), stage)
    folder = tmp_path / "restyled"
    shutil.copytree(trained, folder)
    style = torch.load(folder / "style.pt", weights_only=True)
    style["modules"]["read.bias"] += 1
    torch.save(style, folder / "style.pt")
    with pytest.raises(ExportError, match="encoded by another style;"):
        runner.run_stage(TOY, loop.RunOptions(folder, SEED), "predictor")
    shutil.rmtree(folder / "predictor")
    assert runner.run_stage(TOY, loop.RunOptions(folder, SEED), "codes")
    with pytest.raises(ExportError, match=r"predictor has learned from another style; remove predictor\.pt"):
        runner.run_stage(TOY, loop.RunOptions(folder, SEED), "predictor")
    with pytest.raises(ExportError, match=r"lengthen has learned from another style; remove lengthen\.pt"):
        collect_weights(TOY, folder, SEED)
    folder = _copy(trained, tmp_path / "short", "codec")
    assert not runner.run_stage(TOY, loop.RunOptions(folder, SEED, stop_after=1), "codec")
    with pytest.raises(ExportError, match="resume it first"):
        collect_weights(TOY, folder, SEED)
    with pytest.raises(ParamError, match="window"):
        replace(TOY, geometry=CodecGeometry())


def _song(chords: list[Chord], beats_s: np.ndarray, n: int) -> Song:
    silence = np.zeros((2, n), np.float32)
    sections = [Section("intro", 0.0, 2.0), Section("verse", 2.0, n / RATE_HZ)]
    return Song(silence, silence, beats_s, beats_s[::4], chords, sections, "rock", 120.0, "C major", ["rock"], [])


def _triad(midi: tuple[int, ...], n: int) -> np.ndarray:
    t = np.arange(n) / RATE_HZ
    tone = sum(np.sin(2 * np.pi * 440 * 2 ** ((m - 69) / 12) * t) for m in midi)
    return np.stack([0.1 * tone] * 2).astype(np.float32)


def test_chord_match_hears_the_chord_and_fullness_the_level() -> None:
    n = 4 * RATE_HZ
    beats = np.arange(8) * 0.5
    song = _song([Chord(0, 2, 0, "maj"), Chord(2, 4, 9, "min7")], beats, n)
    c_major, a_minor = _triad((60, 64, 67), n // 2), _triad((57, 60, 64), n // 2)
    assert evaluate.chord_match(np.concatenate([c_major, a_minor], axis=1), song) == 1
    assert evaluate.chord_match(np.concatenate([c_major, c_major], axis=1), song) == pytest.approx(0.5, abs=0.13)
    assert evaluate.chord_match(np.zeros((2, n), np.float32), song) == 0
    found = evaluate.fullness(0.5 * _triad((60,), n), _triad((60,), n), song)
    assert found["intro_level_db"] == pytest.approx(20 * math.log10(0.5), abs=0.01)
    assert found["intro_onset_ratio"] == 1
    assert "interlude_level_db" not in found


def test_the_classifier_learns_what_can_be_told_apart() -> None:
    rng = np.random.default_rng(0)

    def noise(dark: bool) -> np.ndarray:
        x = rng.standard_normal((2, RATE_HZ)).astype(np.float32)
        return np.cumsum(x, axis=1) * 0.01 if dark else x * 0.1

    labels = ["dark", "bright"] * 4
    hear = evaluate.StyleClassifier(np.stack([evaluate.style_features(noise(n == "dark")) for n in labels]), labels)
    assert [hear(noise(True)), hear(noise(False))] == ["dark", "bright"]


def test_times_nothing_is_no_number() -> None:
    """Another song's accompaniment sounds the right chord by chance: then the ratio to it has no meaning."""
    chance = evaluate.CHANCE

    def ratio(shuffled: list[float]) -> float | None:
        rows = [
            {"chord_match": 0.5, "chord_match_shuffled": s, "onset_f1": 0.6, "onset_f1_shuffled": 0.4} for s in shuffled
        ]
        found = evaluate._summary([row | {"chord_match_codec": 0.5, "onset_f1_codec": 0.6} for row in rows])
        assert found["onset_f1_of_shuffled"] == pytest.approx(1.5)
        return found["chord_match_of_shuffled"]

    assert ratio([chance - 0.04, chance + 0.07, chance - 0.03, chance + 0.02]) is None
    assert ratio([chance - 0.01] * 4) is None
    assert ratio([chance + 0.19, chance + 0.21, chance + 0.2]) == pytest.approx((0.5 - chance) / 0.2, rel=1e-3)


def test_evaluate_runs_on_the_bundle(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    assert not opened.trained
    assert opened.name == "lada-rt-toy"
    report_path = tmp_path / "report.json"
    argv = f"--bundle {bundle} --songs 2 --seconds 14 --steps 2 --flow-steps 1 --style-songs 1 --curve 1,2".split()
    assert evaluate.main([*argv, "--curve-songs", "1", "--json", str(report_path)]) == 0
    report = json.loads(report_path.read_text())
    for name in ("chord_match", "onset_f1", "style_accuracy"):
        for kind in ("", "_truth", "_codec"):
            assert 0 <= report["summary"][name + kind] <= 1
    assert report["summary"]["onset_f1_truth"] == 1
    assert report["summary"]["chord_match_truth"] > 0.5
    assert {"chord_match_shuffled", "intro_level_db", "rtf"} <= set(report["summary"])
    assert [point["steps"] for point in report["curve"]] == [1, 2]
    assert report["settings"]["seed"] >= TOY.held_out
    assert report_path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
