"""Mask predictor stage: the paper's objective (arXiv 2604.11052; spec/lada_band d.10) on cached codes.

Masked reconstruction: the share of masked frames is cos(pi r / 2), r uniform and spread over the batch, the loss the
mean cross-entropy over masked frames. Replaced-token detection, weight 0.2: masked frames are filled with the likeliest
codes and a head tells which differ from the truth. As in the paper its gradient reaches the backbone; the released code
trains the head alone. It runs on a quarter of the rows, for the price of a second forward. Text and reference slots are
dropped independently. Crops are short at first and then whole songs.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lada_rt_export.demo.training.loop import Losses
from lada_rt_export.demo.training.sizes import TrainingSizes
from lada_rt_export.models.mask_predictor import MaskPredictor

__all__ = ["PredictorSongs", "PredictorTask", "masked_loss"]

RTD_WEIGHT = 0.2
_DROP_SLOT = 0.5


class PredictorSongs:
    """Random crops of the cached songs, kept in memory: 12 kB each."""

    def __init__(self, sizes: TrainingSizes, folder: Path, device: str) -> None:
        self.sizes, self.folder, self.device = sizes, folder, device
        self._songs: dict[int, dict[str, np.ndarray]] = {}

    def song(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of one song; see `codes`."""
        if index not in self._songs:
            with np.load(self.folder / f"{index:05d}.npz") as file:
                self._songs[index] = dict(file)
        return self._songs[index]

    def crops(self, rng: np.random.Generator, batch: int, n_frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """vocal and accompaniment codes [B, n] int64, padded where a song is shorter, and prefix [B, 2, F] in the
        runtime's order: reference, text."""
        config = self.sizes.predictor
        vocal = np.full((batch, n_frames), config.vocal_pad, np.int64)
        codes = np.full((batch, n_frames), config.pad_id, np.int64)
        prefix = np.zeros((batch, 2, config.condition_size), np.float32)
        for row in range(batch):
            song = self.song(int(rng.integers(self.sizes.n_predictor_songs)))
            take, reference, text = (int(rng.integers(len(song[k]))) for k in ("vocals", "references", "texts"))
            total = len(song["accompaniment"])
            start = int(rng.integers(max(0, total - n_frames) + 1))
            n = min(n_frames, total - start)
            vocal[row, :n] = song["vocals"][take, start : start + n]
            codes[row, :n] = song["accompaniment"][start : start + n]
            keep = rng.random(2) >= _DROP_SLOT
            prefix[row] = np.stack([song["references"][reference], song["texts"][text]]) * keep[:, None]
        arrays = (torch.from_numpy(x).to(self.device) for x in (vocal, codes, prefix))
        return next(arrays), next(arrays), next(arrays)


def masked_loss(
    net: MaskPredictor, vocal: Tensor, codes: Tensor, prefix: Tensor, n_detected: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The objective over a batch; masks are drawn from torch's global generator.

    Args:
        net: with a replaced-token head.
        vocal, codes: [B, n] int64, padded.
        prefix: [B, P, F].
        n_detected: rows that replaced-token detection runs on.

    Returns:
        mean cross-entropy over masked frames, mean binary cross-entropy of the detection, share of right codes.
    """
    config = net.config
    batch, n = codes.shape
    valid = codes != config.pad_id
    r = (torch.randperm(batch, device=codes.device) + torch.rand(batch, device=codes.device)) / batch
    share = (math.pi / 2 * r).cos()[:, None]
    masked = (torch.rand(batch, n, device=codes.device) < share) & valid
    # a row that escaped is masked at its first frame, so that no loss is empty
    masked[:, 0] |= ~masked.any(dim=1)
    given = torch.where(masked, config.mask_id, codes)
    key_mask = None if bool(valid.all()) else valid
    logits = net(vocal, given, prefix, key_mask=key_mask)[:, prefix.shape[1] :].float()
    cross_entropy = F.cross_entropy(logits[masked], codes[masked])
    guesses = logits.detach().argmax(dim=2)
    right = (guesses == codes)[masked].float().mean()
    rows = slice(0, n_detected)
    filled = torch.where(masked, guesses, codes)[rows]
    collected: dict[str, Tensor] = {}
    net(vocal[rows], filled, prefix[rows], key_mask=None if key_mask is None else key_mask[rows], collect=collected)
    detection = net.rtd_logits(collected["hidden"])[:, prefix.shape[1] :].float()
    replaced = (filled != codes[rows]).float()
    seen = valid[rows]
    return cross_entropy, F.binary_cross_entropy_with_logits(detection[seen], replaced[seen]), right


class PredictorTask:
    """Trains the mask predictor."""

    name = "predictor"

    def __init__(self, sizes: TrainingSizes, songs: PredictorSongs) -> None:
        self.songs, self.budget = songs, sizes.budgets["predictor"]
        self.modules = MaskPredictor(sizes.predictor)
        for embedding in (self.modules.voc_embed, self.modules.acc_embed):
            nn.init.normal_(embedding.weight, std=0.1)

    def step(self, step: int, rng: np.random.Generator) -> Losses:
        batch, n_frames = self.budget.crop(step)
        vocal, codes, prefix = self.songs.crops(rng, batch, n_frames)
        cross_entropy, detection, right = masked_loss(self.modules, vocal, codes, prefix, max(1, batch // 4))
        loss = cross_entropy + RTD_WEIGHT * detection
        return {"loss": loss, "masked": cross_entropy, "replaced": detection, "right": right}
