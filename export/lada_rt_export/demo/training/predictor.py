"""Mask predictor stage: the paper's objective (arXiv 2604.11052; spec/lada_band d.10) on cached codes.

Masked reconstruction: the share of masked frames is cos(pi r / 2), r spread over the batch and, beyond the paper,
much denser near 0, as the first steps of the denoising settle key, metre and style, and with a few codes visible the
beat is read from them, not counted on from the voice; the loss is the mean cross-entropy over
masked frames. Replaced-token detection, weight 0.2: masked frames are filled with the likeliest codes and a head tells
which differ from the truth. As in the paper its gradient reaches the backbone; the released code trains the head alone.
It runs on a quarter of the rows, for the price of a second forward. Reference and text slots are dropped independently,
the text less often. Crops are short at first and then whole songs.

Beyond the paper, heads that inference does without read the chord from every last hidden state, the tempo from those of
the middle layer, whose successors count with it, and the place in the bar behind all but the first layers, always in
the same way, so that each can take up where the one before it left off and carry the beat further from the voice; the
generator knows all three. Codes say harmony and metre only between the lines: with the codes' loss alone a network of
this size had learned after 4000 steps to sound the right chord on a quarter of the beats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lada_rt_export.demo.songs.song import MAX_TEMPO_BPM, MIN_TEMPO_BPM, Score
from lada_rt_export.demo.training.data import predictor_score
from lada_rt_export.demo.training.loop import Losses
from lada_rt_export.demo.training.sizes import TrainingSizes
from lada_rt_export.models.mask_predictor import MaskPredictor

__all__ = ["Masked", "PredictorModules", "PredictorSongs", "PredictorTask", "frame_labels", "masked_loss"]

RTD_WEIGHT = 0.2
#: exponent of a uniform r
_EARLY = 4.0
_CHORD_WEIGHT, _PLACE_WEIGHT, _TEMPO_WEIGHT = 0.5, 2.0, 1.0
#: of a frame where nobody sings, in the losses of chord and place: there the beat must be counted on from afar, which
#: is not learned otherwise
_UNSUNG_WEIGHT = 4.0
#: how often the reference and the text slot are empty: the common request is a text alone
_DROP_SLOTS = (0.6, 0.25)
#: major triads from C, minor triads from C; sixteenths of a bar; whole beats a minute
N_CHORDS, N_PLACES, N_TEMPI = 24, 16, MAX_TEMPO_BPM - MIN_TEMPO_BPM + 1
#: of a frame outside the chords or the beats, which no loss counts
NO_LABEL = -100
#: what is sung in a frame: nothing in its section, its section, or the section but the training took it away
UNSUNG, SUNG, SILENCED = 0, 1, 2
#: rows of a batch of which a span of the vocal is taken away, so that counting on is learned at any distance
_SILENCED_SHARE = 0.5


def frame_labels(score: Score, n_frames: int, rate_hz: float) -> np.ndarray:
    """Chord, place in the bar, whether somebody sings, and tempo, of each frame.

    Returns:
        [4, n_frames] int64: `Chord.triad`, and 0..15 for the sixteenth of the bar, NO_LABEL where there is none; UNSUNG
        or SUNG; the tempo over the slowest in bpm.
    """
    times = (np.arange(n_frames) + 0.5) / rate_hz
    labels = np.full((4, n_frames), NO_LABEL, np.int64)
    labels[2] = UNSUNG
    labels[3] = round(score.form.tempo_bpm) - MIN_TEMPO_BPM
    for section in score.form.sections():
        if section.has_vocal:
            labels[2, (times >= section.start_s) & (times < section.end_s)] = SUNG
    for chord in score.form.chords():
        inside = (times >= chord.start_s) & (times < chord.end_s)
        labels[0, inside] = chord.triad
    beats = score.form.beats_s()
    beat = np.searchsorted(beats, times, side="right") - 1
    known = (beat >= 0) & (beat < len(beats) - 1)
    first, length = beats[beat[known]], np.diff(beats)[beat[known]]
    quarter = np.minimum(3, 4 * (times[known] - first) / length).astype(np.int64)
    labels[1, known] = 4 * (beat[known] % 4) + quarter
    return labels


class PredictorSongs:
    """Random crops of the cached songs, kept in memory: 30 kB each. Of the songs of one length, or of the long ones."""

    def __init__(self, sizes: TrainingSizes, folder: Path, seed: int, device: str, *, long: bool = False) -> None:
        self.sizes, self.folder, self.seed, self.device = sizes, folder, seed, device
        n = sizes.n_predictor_songs
        self._indices = range(n, n + sizes.n_long_songs) if long else range(n)
        self._songs: dict[int, dict[str, np.ndarray]] = {}

    def song(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of one song, see `codes`, and the `labels` of its frames."""
        if index not in self._songs:
            with np.load(self.folder / f"{index:05d}.npz") as file:
                arrays = dict(file)
            score = predictor_score(self.sizes, self.seed, index)
            labels = frame_labels(score, len(arrays["accompaniment"]), self.sizes.geometry.code_rate_hz)
            self._songs[index] = arrays | {"labels": labels}
        return self._songs[index]

    def crops(self, rng: np.random.Generator, batch: int, n_frames: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """vocal and accompaniment codes [B, n] int64, padded where a song is shorter, prefix [B, 2, F] in the runtime's
        order: reference, text; and labels [B, 4, n] int64."""
        config = self.sizes.predictor
        vocal = np.full((batch, n_frames), config.vocal_pad, np.int64)
        codes = np.full((batch, n_frames), config.pad_id, np.int64)
        prefix = np.zeros((batch, 2, config.condition_size), np.float32)
        labels = np.full((batch, 4, n_frames), NO_LABEL, np.int64)
        for row in range(batch):
            song = self.song(self._indices[int(rng.integers(len(self._indices)))])
            take, reference, text = (int(rng.integers(len(song[k]))) for k in ("vocals", "references", "texts"))
            total = len(song["accompaniment"])
            start = int(rng.integers(max(0, total - n_frames) + 1))
            n = min(n_frames, total - start)
            vocal[row, :n] = song["vocals"][take, start : start + n]
            codes[row, :n] = song["accompaniment"][start : start + n]
            labels[row, :, :n] = song["labels"][:, start : start + n]
            silence = song["vocals"][take, :total][song["labels"][2] == UNSUNG]
            if rng.random() < _SILENCED_SHARE and len(silence):
                span = _draw_span(rng, n)
                vocal[row, span] = np.resize(silence, span.stop - span.start)
                labels[row, 2, span] = SILENCED
            keep = rng.random(2) >= _DROP_SLOTS
            prefix[row] = np.stack([song["references"][reference], song["texts"][text]]) * keep[:, None]
        arrays = (torch.from_numpy(x).to(self.device) for x in (vocal, codes, prefix, labels))
        return next(arrays), next(arrays), next(arrays), next(arrays)


def _draw_span(rng: np.random.Generator, n: int) -> slice:
    """A part of n frames, up to a third of them, that may touch either end."""
    length = int(rng.integers(n // 20, n // 3 + 1))
    start = int(rng.integers(-length // 2, n - length // 2))
    return slice(max(0, start), min(n, start + length))


@dataclass(frozen=True, slots=True)
class Masked:
    """Of a batch: mean cross-entropy over masked frames, mean binary cross-entropy of the detection, share of right
    codes among the masked, and the states [B, n, H] of the frames behind each layer, not normalised."""

    cross_entropy: Tensor
    detection: Tensor
    right: Tensor
    states: list[Tensor]


def masked_loss(
    net: MaskPredictor, vocal: Tensor, codes: Tensor, prefix: Tensor, n_detected: int, ignored: Tensor | None = None
) -> Masked:
    """The objective over a batch; masks are drawn from torch's global generator.

    Args:
        net: with a replaced-token head.
        vocal, codes: [B, n] int64, padded.
        prefix: [B, P, F].
        n_detected: rows that replaced-token detection runs on; without any its loss is zero.
        ignored: [B, n] bool, frames whose codes are not learned; never all of a row.
    """
    config = net.config
    batch, n = codes.shape
    valid = codes != config.pad_id
    r = (torch.randperm(batch, device=codes.device) + torch.rand(batch, device=codes.device)) / batch
    share = (math.pi / 2 * r**_EARLY).cos()[:, None]
    masked = (torch.rand(batch, n, device=codes.device) < share) & valid
    free = valid if ignored is None else valid & ~ignored
    # a row that escaped is masked at its first frame, so that no loss is empty
    masked[torch.arange(batch, device=codes.device), free.int().argmax(dim=1)] |= ~(masked & free).any(dim=1)
    given = torch.where(masked, config.mask_id, codes)
    key_mask = None if bool(valid.all()) else valid
    first: dict[str, Tensor] = {}
    logits = net(vocal, given, prefix, key_mask=key_mask, collect=first)[:, prefix.shape[1] :].float()
    counted = masked & free
    cross_entropy = F.cross_entropy(logits[counted], codes[counted])
    guesses = logits.detach().argmax(dim=2)
    right = (guesses == codes)[masked].float().mean()
    detection = cross_entropy.new_zeros(())
    if n_detected:
        rows = slice(0, n_detected)
        filled = torch.where(masked, guesses, codes)[rows]
        collected: dict[str, Tensor] = {}
        net(vocal[rows], filled, prefix[rows], key_mask=None if key_mask is None else key_mask[rows], collect=collected)
        found = net.rtd_logits(collected["hidden"])[:, prefix.shape[1] :].float()
        replaced = (filled != codes[rows]).float()
        detection = F.binary_cross_entropy_with_logits(found[valid[rows]], replaced[valid[rows]])
    states = [first[f"layer{i}_out"][:, prefix.shape[1] :] for i in range(config.n_layers)]
    return Masked(cross_entropy, detection, right, states)


class PredictorModules(nn.Module):
    """The mask predictor, and the heads that only training needs."""

    def __init__(self, sizes: TrainingSizes) -> None:
        super().__init__()
        self.net = MaskPredictor(sizes.predictor)
        self.chord = nn.Linear(sizes.predictor.hidden_size, N_CHORDS)
        self.place = nn.Linear(sizes.predictor.hidden_size, N_PLACES)
        self.tempo = nn.Linear(sizes.predictor.hidden_size, N_TEMPI)


class PredictorTask:
    """Trains `PredictorModules`, in stage `predictor` from nothing, in stage `refine` from what that left, on whole
    songs: where a section comes back, the first time tells what the second is like. Stage `lengthen` goes on from there
    with songs of many lengths: what is further apart than any two frames of one length never met before it."""

    def __init__(self, sizes: TrainingSizes, songs: PredictorSongs, name: str = "predictor") -> None:
        self.name, self.songs, self.budget = name, songs, sizes.budgets[name]
        self.modules = PredictorModules(sizes)
        for embedding in (self.modules.net.voc_embed, self.modules.net.acc_embed):
            nn.init.normal_(embedding.weight, std=0.1)

    def step(self, step: int, rng: np.random.Generator) -> Losses:
        batch, n_frames = self.budget.crop(step)
        vocal, codes, prefix, labels = self.songs.crops(rng, batch, n_frames)
        # small batches take turns: over time it is a quarter of the rows, and their mean
        n_detected = (step + 1) * batch // 4 - step * batch // 4
        # codes of a verse are no example of what to play where nobody sings
        found = masked_loss(self.modules.net, vocal, codes, prefix, n_detected, labels[:, 2] == SILENCED)
        detection = found.detection * max(1, 4 / batch)
        weights = torch.where(labels[:, 2] == SUNG, 1.0, _UNSUNG_WEIGHT)
        n_layers, normalise = len(found.states), self.modules.net.lm.norm
        chord = _labelled_loss(self.modules.chord(normalise(found.states[-1])), labels[:, 0], weights)
        places = [
            _labelled_loss(self.modules.place(normalise(x)), labels[:, 1], weights)
            for x in found.states[n_layers // 4 :]
        ]
        middle = found.states[n_layers // 2]
        tempo = _labelled_loss(self.modules.tempo(F.rms_norm(middle, middle.shape[2:])), labels[:, 3], 1.0)
        loss = found.cross_entropy + RTD_WEIGHT * detection
        loss = loss + _CHORD_WEIGHT * chord + _PLACE_WEIGHT * torch.stack(places).mean() + _TEMPO_WEIGHT * tempo
        return {
            "loss": loss,
            "masked": found.cross_entropy,
            "replaced": detection,
            "right": found.right,
            "chord": chord,
            "place": places[-1],
            "early place": places[0],
            "tempo": tempo,
        }


def _labelled_loss(logits: Tensor, labels: Tensor, weights: Tensor | float) -> Tensor:
    """Weighted mean cross-entropy of logits [B, n, C] over the frames that have a label; zero if none has."""
    each = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=NO_LABEL, reduction="none")
    return (each * weights).sum() / (weights * (labels != NO_LABEL)).sum().clamp(min=1)
