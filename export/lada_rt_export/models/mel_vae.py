"""Mel VAE decoder: latents of one audio channel to its log-mel. Source: mucodec spec 6."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lada_rt.errors import ParamError
from torch import Tensor, nn

from lada_rt_export.models.mucodec_common import Float32Buffers, GroupNormF32, check_positive

__all__ = ["DEAD_KEYS", "KEY_PREFIX", "SCALE_FACTOR_KEY", "MelVAE", "MelVAEConfig"]

#: what the names start with in audioldm_48k.pth, inside its entry "state_dict"
KEY_PREFIX = "first_stage_model."
#: stored without the prefix; in the module's state dict under the same name
SCALE_FACTOR_KEY = "scale_factor"
#: the encoder half serves audio prompts only; the vocoder has its own module
DEAD_KEYS = (r"encoder\..*", r"quant_conv\..*", r"vocoder\..*")


@dataclass(frozen=True, slots=True)
class MelVAEConfig:
    """Sizes of the mel decoder; the defaults are the released ones (mucodec spec 6).

    `attention_block` bounds memory, not the result: so many queries meet all keys at a time.
    """

    channels: int = 128
    multiples: tuple[int, ...] = (1, 2, 4, 8)
    n_res_blocks: int = 2
    latent_channels: int = 16
    embed_channels: int = 16
    out_channels: int = 1
    norm_groups: int = 32
    attention_block: int = 1024

    def __post_init__(self) -> None:
        check_positive(self, "channels", "n_res_blocks", "latent_channels", "embed_channels", "out_channels")
        check_positive(self, "norm_groups", "attention_block")
        if not self.multiples:
            raise ParamError("MelVAEConfig.multiples must name one level at least, got none; correct the config")
        for multiple in self.multiples:
            if multiple < 1 or self.channels * multiple % self.norm_groups:
                raise ParamError(
                    f"MelVAEConfig: channels * multiple must divide into {self.norm_groups} groups, got "
                    f"{self.channels} * {multiple}; correct the config"
                )


def _group_norm(config: MelVAEConfig, channels: int) -> GroupNormF32:
    return GroupNormF32(config.norm_groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two normalised, swish-activated 3x3 convolutions beside an identity or 1x1 shortcut."""

    def __init__(self, config: MelVAEConfig, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(config, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _group_norm(config, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head attention over all grid positions, its queries in blocks. Source: mucodec spec 6, 11."""

    def __init__(self, config: MelVAEConfig, channels: int) -> None:
        super().__init__()
        self.block = config.attention_block
        self.norm = _group_norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, channels, rows, cols = x.shape
        # positions before channels once for all three: a 1x1 convolution is a linear layer there
        h = self.norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, rows * cols, C]
        # the query is scaled before the product: 1024-long sums overflow half precision
        q = self._pointwise(h, self.q) * channels**-0.5
        k, v = self._pointwise(h, self.k), self._pointwise(h, self.v)
        parts = [F.scaled_dot_product_attention(part, k, v, scale=1.0) for part in q.split(self.block, dim=2)]
        attended = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        out = self._pointwise(attended, self.proj_out).squeeze(1).transpose(1, 2)
        return x + out.reshape(-1, channels, rows, cols)

    @staticmethod
    def _pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
        return F.linear(x, conv.weight.flatten(1), conv.bias)


class MidBlock(nn.Module):
    def __init__(self, config: MelVAEConfig, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(config, channels, channels)
        self.attn_1 = AttentionBlock(config, channels)
        self.block_2 = ResBlock(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Upsample(nn.Module):
    """Repeat every position twice along both axes, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UpLevel(nn.Module):
    """The residual blocks of one resolution and, but for the finest, the step to the next."""

    def __init__(self, config: MelVAEConfig, c_in: int, c_out: int, *, upsample: bool) -> None:
        super().__init__()
        widths = [c_in] + [c_out] * config.n_res_blocks
        self.block = nn.ModuleList(ResBlock(config, width, c_out) for width in widths)
        self.upsample = Upsample(c_out) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class Decoder(nn.Module):
    def __init__(self, config: MelVAEConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multiples]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = MidBlock(config, widths[-1])
        # indexed by resolution, finest first, as the released names are; run from the last to the first
        coarser = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            UpLevel(config, c_in, c_out, upsample=level > 0)
            for level, (c_in, c_out) in enumerate(zip(coarser, widths, strict=True))
        )
        self.norm_out = _group_norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(range(len(self.up))):
            x = self.up[level](x)
        return self.conv_out(F.silu(self.norm_out(x)))


class MelVAE(Float32Buffers):
    """Latents to log-mel. State-dict names are those of audioldm_48k.pth without KEY_PREFIX, and `scale_factor`."""

    scale_factor: Tensor

    def __init__(self, config: MelVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MelVAEConfig()
        self.post_quant_conv = nn.Conv2d(config.embed_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)
        self.register_buffer("scale_factor", torch.ones(()))
        self.eval().requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, 16, L, 32] un-normalised -> natural-log mel [B, 1, 8 L, 256], in the dtype of the weights.

        One audio channel per row: rows are independent.
        """
        conv = self.post_quant_conv
        # dividing the weight, not the latents: the same up to rounding, and a constant after export
        weight = (conv.weight.float() / self.scale_factor).to(conv.weight.dtype)
        return self.decoder(F.conv2d(latents.to(weight.dtype), weight, conv.bias))
