"""Text and reference encoder, trained together so that either one names the style.

Texts are the generator's own descriptions, audio is crops of its accompaniments. Features of one style attract each
other across the two branches (CLIP's loss, arXiv 2103.00020, with every pair of one style a match), and one linear
layer must read the style from both. The empty text is to say nothing. Both encoders learn the words and sounds of these
songs only: other music has no place in the space they span.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from lada_rt.condition import position_ids
from tokenizers import Tokenizer
from torch import Tensor, nn

from lada_rt_export.demo.songs.arrange import describe
from lada_rt_export.demo.songs.song import compose
from lada_rt_export.demo.songs.styles import STYLES
from lada_rt_export.demo.tokenizer import byte_tokenizer
from lada_rt_export.demo.training.data import CodecSongs, song_seed
from lada_rt_export.demo.training.loop import Losses
from lada_rt_export.demo.training.sizes import TrainingSizes
from lada_rt_export.models.clamp3 import Clamp3Audio, Clamp3Text
from lada_rt_export.models.mert import Mert

__all__ = ["StyleModules", "StyleTask", "text_batch"]

_TEMPERATURE = 0.2
#: words come in more combinations than sounds and cost little: with one text a sound, one in seven was misread
_TEXTS_PER_SOUND = 4
_N_FORMS = 24
_PAD_ID = 1
_SAMPLES_PER_HUNDREDTH = 480


def text_batch(tokenizer: Tokenizer, texts: list[str], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """ids, positions and mask [B, S] int64, padded to the longest text of at most 128 tokens."""
    tokenizer.enable_truncation(128)
    rows = [tokenizer.encode(text).ids for text in texts]
    ids = np.full((len(rows), max(map(len, rows))), _PAD_ID, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    mask = np.array([[j < len(row) for j in range(ids.shape[1])] for row in rows], np.int64)
    batch = (torch.from_numpy(x).to(device) for x in (ids, position_ids(ids), mask))
    return next(batch), next(batch), next(batch)


class StyleModules(nn.Module):
    """Both branches, and the layer that reads the style from a feature."""

    def __init__(self, sizes: TrainingSizes) -> None:
        super().__init__()
        self.text = Clamp3Text(sizes.text)
        self.mert = Mert(sizes.mert)
        self.audio = Clamp3Audio(sizes.audio)
        self.read = nn.Linear(sizes.text.output_size, len(STYLES))
        # never used: attention over one vector is its value, and nothing is looked up by word position past the first
        for layer in self.audio.audio_model.encoder.layer:
            layer.attention.self.query.requires_grad_(False)  # type: ignore[union-attr]
            layer.attention.self.key.requires_grad_(False)  # type: ignore[union-attr]

    def text_features(self, tokenizer: Tokenizer, texts: list[str], device: str) -> Tensor:
        """[B, F] of texts."""
        ids, positions, mask = text_batch(tokenizer, texts, device)
        return self.text(ids, positions, mask).float()

    def audio_features(self, mono: Tensor) -> Tensor:
        """[B, F] of [B, N] float32 at 48 kHz, as the reference stage computes them."""
        return self.audio.forward_single(self.mert(mono).float().mean(dim=1)).float()


class StyleTask:
    """Trains `StyleModules`; texts and sounds are drawn apart, each style equally often."""

    name = "style"

    def __init__(self, sizes: TrainingSizes, songs: CodecSongs, seed: int) -> None:
        self.sizes, self.songs, self.seed, self.budget = sizes, songs, seed, sizes.budgets["style"]
        self.modules = StyleModules(sizes)
        self.tokenizer = Tokenizer.from_str(byte_tokenizer().decode())
        self.styles = list(STYLES)
        self._by_style: dict[int, list[int]] = {}
        self._forms = [compose(i, duration_s=40.0).form for i in range(_N_FORMS)]

    def _text(self, rng: np.random.Generator, style: int) -> str:
        how = STYLES[self.styles[style]]
        kind = rng.random()
        if kind < 0.7:
            text = str(rng.choice(describe(rng, self._forms[int(rng.integers(_N_FORMS))], how)))
        elif kind < 0.85:
            text = str(rng.choice([*how.names, how.name]))
        else:
            text = ", ".join(rng.choice(how.features, int(rng.integers(1, 4)), replace=False))
        change = rng.random()
        return text.lower() if change < 0.2 else text.capitalize() + "." if change < 0.4 else text

    def _songs_of(self, style: int) -> list[int]:
        if not self._by_style:
            for index in range(self.sizes.n_codec_songs):
                name = compose(song_seed(self.sizes, self.seed, "codec", index), duration_s=8.0).style.name
                self._by_style.setdefault(self.styles.index(name), []).append(index)
        # a handful of songs may lack a style: any other stands in, under its own name
        return self._by_style.get(style, [])

    def _sounds(self, rng: np.random.Generator, wanted: np.ndarray, n_samples: int) -> tuple[Tensor, Tensor]:
        places, labels = [], []
        for style in wanted:
            found = int(style) if self._songs_of(int(style)) else int(rng.choice(sorted(self._by_style)))
            index = int(rng.choice(self._songs_of(found)))
            audio = self.songs.array(index, "audio")
            start = int(rng.integers(audio.shape[1] - n_samples + 1))
            crop = audio[:, start : start + n_samples].astype(np.float32).mean(axis=0) / 32_767
            places.append(crop * np.float32(10 ** (rng.uniform(-9, 3) / 20)))
            labels.append(found)
        device = self.songs.device
        return torch.from_numpy(np.stack(places)).to(device), torch.tensor(labels, device=device)

    def step(self, step: int, rng: np.random.Generator) -> Losses:
        batch, hundredths = self.budget.crop(step)
        net, device = self.modules, self.songs.device
        wanted = (np.arange(batch) + int(rng.integers(len(self.styles)))) % len(self.styles)
        asked = np.tile(wanted, _TEXTS_PER_SOUND)
        texts = [self._text(rng, int(style)) for style in asked]
        text_labels = torch.from_numpy(asked.astype(np.int64)).to(device)
        sounds, sound_labels = self._sounds(rng, wanted, hundredths * _SAMPLES_PER_HUNDREDTH)
        features = net.text_features(self.tokenizer, [*texts, ""], device)
        text, empty = features[:-1], features[-1:]
        audio = net.audio_features(sounds)
        similar = F.normalize(text, dim=1) @ F.normalize(audio, dim=1).t() / _TEMPERATURE  # [texts, sounds]
        match = (text_labels[:, None] == sound_labels).float()
        pull = _matched(similar, match) + _matched(similar.t(), match.t())
        text_loss = F.cross_entropy(net.read(text).float(), text_labels)
        audio_loss = F.cross_entropy(net.read(audio).float(), sound_labels)
        silence = -F.log_softmax(net.read(empty).float(), dim=1).mean()
        # features of unit size on average, as the predictor's projection expects of both slots
        size = (features.square().mean() - 1).square() + (audio.square().mean() - 1).square()
        return {
            "loss": text_loss + audio_loss + 0.5 * pull + 0.2 * silence + 0.1 * size,
            "text": text_loss,
            "audio": audio_loss,
            "pull": pull,
            "size": size,
        }


def _matched(logits: Tensor, match: Tensor) -> Tensor:
    """Cross-entropy of rows of logits against equal shares of their matches; rows without one are left out."""
    n = match.sum(dim=1)
    per_row = -(F.log_softmax(logits.float(), dim=1) * match).sum(dim=1) / n.clamp(min=1)
    return per_row.sum() / (n > 0).sum().clamp(min=1)
