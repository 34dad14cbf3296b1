"""Normalisation of MuCodec latents by running statistics. Source: mucodec spec 3.3."""

from __future__ import annotations

import numpy as np
import torch
from lada_rt.errors import CheckpointError
from numpy.typing import NDArray
from torch import Tensor

from lada_rt_export.models.mucodec_common import Float32Buffers

__all__ = ["DEAD_KEYS", "KEY_PREFIX", "MIN_COUNTS", "LatentNorm"]

#: what the names start with in mucodec.pt
KEY_PREFIX = "normfeat."
#: expressions for whole names, after the prefix, that inference never reads
DEAD_KEYS = (r"sum_target_x2",)
#: with fewer samples than this the reference still updates the statistics, at inference too
MIN_COUNTS = 100_000


class LatentNorm(Float32Buffers):
    """Per channel and frequency mean and deviation, broadcast over batch and time.

    State-dict names are those of mucodec.pt without KEY_PREFIX.
    """

    counts: Tensor
    sum_x: Tensor
    sum_x2: Tensor

    def __init__(self, channels: int = 32, frequencies: int = 32) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(1))
        self.register_buffer("sum_x", torch.zeros(channels, frequencies))
        self.register_buffer("sum_x2", torch.zeros(channels, frequencies))

    def stats(self) -> tuple[Tensor, Tensor]:
        """mean and std, each [C, frequencies] float32, from the present sums."""
        mean = self.sum_x / self.counts
        return mean, (self.sum_x2 / self.counts - mean * mean).clamp(min=0).sqrt()

    @torch.no_grad()
    def normalise(self, z: Tensor) -> Tensor:
        """[B, C, L, frequencies] -> the same shape.

        With counts below MIN_COUNTS the sums first take in `z`, as the reference does: the module changes.
        """
        if self.counts.item() < MIN_COUNTS:
            self.counts += z.shape[0]
            self.sum_x += z.mean(dim=2).sum(dim=0)
            self.sum_x2 += z.square().mean(dim=2).sum(dim=0)
        mean, std = self.stats()
        return (z - mean[:, None]) / std[:, None].clamp(min=1e-12)

    @torch.no_grad()
    def denormalise(self, z: Tensor) -> Tensor:
        """[B, C, L, frequencies] -> the same shape."""
        mean, std = self.stats()
        return z * std[:, None] + mean[:, None]

    def frozen_stats(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The statistics as constants.

        Returns:
            mean and std, each [C, frequencies] float32; normalising divides by max(std, 1e-12).

        Raises:
            CheckpointError: counts is below MIN_COUNTS, so the statistics are not final.
        """
        counts = float(self.counts.item())
        if not counts >= MIN_COUNTS:
            raise CheckpointError(
                f"{KEY_PREFIX}counts should be at least {MIN_COUNTS}, got {counts:g}; "
                "the file holds unfinished latent statistics, use the released mucodec.pt"
            )
        mean, std = self.stats()
        return mean.float().cpu().numpy(), std.float().cpu().numpy()
