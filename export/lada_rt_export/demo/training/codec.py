"""Encoder and quantiser: one codebook for vocals and accompaniments, each code 40 ms.

A code should say what the decoder and the mask predictor need: harmony, onsets and timbre. So a small head, which sees
only quantised vectors, rebuilds the encoder's own mel, its flux in four parts of the spectrum, and the pitch class
profile. The codebook follows the encoder by running means on the unit sphere, the encoder follows the head through a
straight-through estimate (Oord et al., arXiv 1711.00937); rows that nothing uses are drawn anew.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lada_rt_export.demo.training.data import CodecSongs
from lada_rt_export.demo.training.features import mel_flux
from lada_rt_export.demo.training.loop import Losses
from lada_rt_export.demo.training.sizes import TrainingSizes
from lada_rt_export.models.mucodec_common import EvalBatchNorm
from lada_rt_export.models.muq import MuQ
from lada_rt_export.models.vq import VQ

__all__ = ["Codec", "CodecTask"]

_DECAY = 0.98
#: a row whose running count of uses falls below this share of an even one is drawn anew
_DEAD_SHARE = 0.03
_REVIVE_EVERY = 20
_COMMITMENT = 0.25
_CHROMA, _FLUX = 1.0, 1.0


class Head(nn.Module):
    """Quantised vectors [B, dim, n] to mel [B, 128, 4 n], flux [B, 4, 4 n] and chroma logits [B, n, 12]."""

    def __init__(self, dim: int, n_mels: int) -> None:
        super().__init__()
        width = 2 * dim
        # a neighbour on each side: a code may lean on its context, but must carry its own moment
        self.mix = nn.Conv1d(dim, width, 3, padding=1)
        self.hidden = nn.Conv1d(width, width, 3, padding=1)
        self.mel = nn.Conv1d(width, 4 * n_mels, 1)
        self.flux = nn.Conv1d(width, 16, 1)
        self.chroma = nn.Conv1d(width, 12, 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.gelu(self.mix(z))
        h = h + F.gelu(self.hidden(h))
        mel = self.mel(h).unflatten(1, (-1, 4)).permute(0, 1, 3, 2).flatten(2)
        flux = self.flux(h).unflatten(1, (4, 4)).permute(0, 1, 3, 2).flatten(2)
        return mel, flux, self.chroma(h).transpose(1, 2)


class Codec(nn.Module):
    """What the stage saves: encoder, quantiser, head and the codebook's running statistics."""

    counts: Tensor
    sums: Tensor
    ready: Tensor

    def __init__(self, sizes: TrainingSizes) -> None:
        super().__init__()
        self.muq = MuQ(sizes.muq).requires_grad_(True)
        self.vq = VQ(sizes.vq).requires_grad_(True)
        self.vq.codebook.requires_grad_(False)
        self.head = Head(sizes.vq.dim, sizes.muq.n_mels)
        size, dim = sizes.vq.codebook_size, sizes.vq.codebook_dim
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", torch.zeros(size, dim))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def start(self, mel: Tensor) -> None:
        """Set the frozen batch norms and the codebook by a first batch; both are constants of inference."""
        hooks = []

        def calibrate(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(norm, EvalBatchNorm)
            axes = [d for d in range(inputs[0].dim()) if d != 1]
            norm.running_mean.copy_(inputs[0].float().mean(dim=axes))
            norm.running_var.copy_(inputs[0].float().var(dim=axes, unbiased=False).clamp(min=1e-3))

        for module in self.muq.modules():
            if isinstance(module, EvalBatchNorm):
                hooks.append(module.register_forward_pre_hook(calibrate))
        z = self.latents(mel)[0].flatten(0, 1)
        for hook in hooks:
            hook.remove()
        rows = z[torch.randint(len(z), (len(self.counts),), device=z.device)]
        rows = F.normalize(rows + 0.02 * torch.randn_like(rows), dim=1)
        self.vq.codebook.weight.copy_(rows)
        self.sums.copy_(rows)
        self.ready.fill_(True)

    def latents(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Unit latents [B, n, codebook_dim] of a normalised mel [B, 128, 4 n], and their nearest rows int64 [B, n]."""
        hidden = self.muq.hidden_states(mel)[-1]
        z = F.normalize(self.vq.latents(hidden.transpose(1, 2)).transpose(1, 2).float(), dim=2, eps=1e-6)
        return z, torch.matmul(z.detach(), self.vq.unit_codebook().t()).argmax(dim=2)

    @torch.no_grad()
    def follow(self, z: Tensor, codes: Tensor, step: int) -> None:
        """Move the codebook towards the latents [n, dim] that chose its rows."""
        size = len(self.counts)
        used = torch.bincount(codes, minlength=size).to(self.counts.dtype)
        total = torch.zeros_like(self.sums).index_add_(0, codes, z)
        self.counts.lerp_(used, 1 - _DECAY)
        self.sums.lerp_(total, 1 - _DECAY)
        if step % _REVIVE_EVERY == _REVIVE_EVERY - 1:
            even = float(self.counts.sum()) / size
            dead = self.counts < _DEAD_SHARE * even
            drawn = z[torch.randint(len(z), (size,), device=z.device)]
            self.sums.copy_(torch.where(dead[:, None], drawn * even, self.sums))
            self.counts.copy_(torch.where(dead, torch.full_like(self.counts, even), self.counts))
        self.vq.codebook.weight.copy_(F.normalize(self.sums, dim=1, eps=1e-9))


class CodecTask:
    """Trains `Codec`. About half of each batch are accompaniments."""

    name = "codec"

    def __init__(self, sizes: TrainingSizes, songs: CodecSongs) -> None:
        self.sizes, self.songs, self.budget = sizes, songs, sizes.budgets["codec"]
        self.modules = Codec(sizes)

    def step(self, step: int, rng: np.random.Generator) -> Losses:
        codec = self.modules
        mel, chroma = self.songs.encoder_crops(rng, *self.budget.crop(step))
        if not codec.ready:
            codec.start(mel)
        z, codes = codec.latents(mel)  # [B, n, d], [B, n]
        rows = codec.vq.codebook(codes)
        through = z + (rows - z).detach()
        # in the first steps the encoder learns without the quantiser's noise
        share = min(1.0, 4 * step / self.budget.n_steps)
        keep = torch.rand(z.shape[:2], device=z.device)[..., None] < share
        vectors = codec.vq.out_proj(torch.where(keep, through, z).transpose(1, 2))
        mel_out, flux_out, chroma_out = codec.head(vectors)
        mel_loss = F.l1_loss(mel_out.float(), mel)
        flux_loss = F.l1_loss(flux_out.float(), mel_flux(mel))
        chroma_loss = F.binary_cross_entropy_with_logits(chroma_out.float(), chroma)
        commitment = (z - rows).square().sum(dim=2).mean()
        loss = mel_loss + _FLUX * flux_loss + _CHROMA * chroma_loss + _COMMITMENT * commitment
        flat = codes.flatten()
        share_used = torch.bincount(flat, minlength=len(codec.counts)).float() / len(flat)
        codec.follow(z.detach().float().flatten(0, 1), flat, step)
        return {
            "loss": loss,
            "mel": mel_loss,
            "flux": flux_loss,
            "chroma": chroma_loss,
            "commitment": commitment,
            "entropy_bits": -(share_used * share_used.clamp(min=1e-9).log2()).sum(),
        }
