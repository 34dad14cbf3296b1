"""MuCodec vector quantiser: hidden states to codes to condition vectors. Source: mucodec spec 2.8, 3.1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lada_rt.errors import ParamError
from torch import Tensor, nn

from lada_rt_export.models.mucodec_common import check_positive

__all__ = [
    "CONDITION_KEY_PREFIX",
    "DEAD_KEYS",
    "KEY_PREFIX",
    "VQ",
    "VQConfig",
    "condition_grid",
    "condition_linear",
    "fold_condition",
]

#: what the names start with in mucodec.pt
KEY_PREFIX = "rvq_muencoder_emb.quantizers.0."
#: the linear layer from quantised vectors to condition vectors, in mucodec.pt: `.weight` and `.bias`
CONDITION_KEY_PREFIX = "cond_muencoder_emb."
#: expressions for whole names, after the prefix, that inference never reads
DEAD_KEYS = (r"stale_counter",)


@dataclass(frozen=True, slots=True)
class VQConfig:
    """Sizes of the quantiser; the defaults are the released ones (mucodec spec 2.8, 3.1)."""

    dim: int = 1024
    codebook_size: int = 16384
    codebook_dim: int = 32
    condition_dim: int = 512

    def __post_init__(self) -> None:
        check_positive(self, "dim", "codebook_size", "codebook_dim", "condition_dim")


class WeightNormPointwise(nn.Module):
    """1x1 convolution of weight g * v / ||v||, the norm over the input axis. Source: mucodec spec 2.8."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(c_out, 1, 1))
        self.weight_v = nn.Parameter(torch.randn(c_out, c_in, 1) * c_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(c_out))

    def folded_weight(self) -> Tensor:
        """The plain weight, [c_out, c_in], in the dtype of the parameters."""
        v = self.weight_v.double()
        return (self.weight_g.double() * v / v.norm(dim=1, keepdim=True)).squeeze(2).to(self.weight_v.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c_in, T] -> [B, c_out, T]."""
        return F.conv1d(x, self.folded_weight().unsqueeze(2), self.bias)


class VQ(nn.Module):
    """Single-codebook quantiser. State-dict names are those of mucodec.pt without KEY_PREFIX."""

    def __init__(self, config: VQConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VQConfig()
        self.in_proj = WeightNormPointwise(config.dim, config.codebook_dim)
        self.out_proj = WeightNormPointwise(config.codebook_dim, config.dim)
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)
        self.eval().requires_grad_(False)

    def unit_codebook(self) -> Tensor:
        """[codebook_size, codebook_dim], rows of length one: what encoding compares with."""
        return F.normalize(self.codebook.weight, dim=1, eps=1e-12)

    def latents(self, z: Tensor) -> Tensor:
        """[B, dim, T] -> [B, codebook_dim, T]."""
        return self.in_proj(z)

    def encode(self, z: Tensor) -> Tensor:
        """[B, dim, T] float32 -> int64 [B, T]: nearest row by cosine, the lowest index on ties.

        The latents are not normalised: their length scales all scores of a frame alike.
        """
        scores = torch.matmul(self.latents(z).transpose(1, 2), self.unit_codebook().t())
        return scores.argmax(dim=2)

    def decode(self, codes: Tensor) -> Tensor:
        """int64 [B, T] -> [B, dim, T]; the raw rows, not the unit ones."""
        return self.out_proj(self.codebook(codes).transpose(1, 2))


def condition_linear(config: VQConfig) -> nn.Linear:
    """The layer under CONDITION_KEY_PREFIX, [..., dim] -> [..., condition_dim]. Source: mucodec spec 3.1."""
    return nn.Linear(config.dim, config.condition_dim).eval().requires_grad_(False)


def fold_condition(vq: VQ, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Join `out_proj` and the condition linear into one affine map of codebook rows.

    Returns:
        weight [codebook_dim, condition_dim] and bias [condition_dim] float32, so that
        `codebook[codes] @ weight + bias` equals `linear(out_proj(codebook[codes]))` up to rounding.

    Raises:
        ParamError: the linear layer does not take what the quantiser gives.

    Source: mucodec spec 3.1, 11.
    """
    if linear.in_features != vq.config.dim:
        raise ParamError(
            f"the condition linear must take {vq.config.dim} features, it takes {linear.in_features}; "
            "use the one stored beside the quantiser"
        )
    # float64, so that the folded map is as exact as the unfolded one
    outer = linear.weight.double()
    weight = outer @ vq.out_proj.folded_weight().double()
    bias = outer @ vq.out_proj.bias.double() + linear.bias.double()
    return weight.t().float().contiguous(), bias.float()


def condition_grid(vectors: Tensor) -> Tensor:
    """Lay condition vectors out as a latent grid: two codes to a frame, the even one in the lower channels.

    Args:
        vectors: [B, 2 L, 512].

    Returns:
        [B, 32, L, 32].

    Source: mucodec spec 3.1.
    """
    # vector 2k + c // 16, element (c % 16) * 32 + f: row-major, this is frame k, channel c, frequency f
    return vectors.reshape(vectors.shape[0], -1, 32, 32).transpose(1, 2)
