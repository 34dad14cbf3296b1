"""MuCodec flow estimator: a transformer over 2x2 latent patches. Source: mucodec spec 4."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lada_rt.errors import ParamError
from torch import Tensor, nn

from lada_rt_export.models.mucodec_common import Float32Buffers, check_positive, layer_norm_f32

__all__ = ["DEAD_KEYS", "KEY_PREFIX", "Flow", "FlowConfig", "position_table", "timestep_features"]

#: what the names start with in mucodec.pt
KEY_PREFIX = "cfm_wrapper.estimator."
#: the position table is not stored, should a file hold one it is not read
DEAD_KEYS = (r"pos_embed\.pos_embed",)

#: base grid 192 over interpolation scale 6: the coordinate range every grid is stretched to
_POSITION_SPAN = 32.0


@dataclass(frozen=True, slots=True)
class FlowConfig:
    """Sizes of the estimator; the defaults are the released ones (mucodec spec 4).

    `latent_frames` and `frequencies` fix the grid: the position table is stretched to it, so that a module
    serves one grid.
    """

    n_layers: int = 24
    n_heads: int = 22
    head_dim: int = 72
    in_channels: int = 96
    out_channels: int = 32
    patch: int = 2
    ffn_multiple: int = 4
    time_features: int = 512
    latent_frames: int = 512
    frequencies: int = 32

    def __post_init__(self) -> None:
        check_positive(self, "n_layers", "n_heads", "head_dim", "in_channels", "out_channels", "patch")
        check_positive(self, "ffn_multiple", "time_features", "latent_frames", "frequencies")
        if self.dim % 4:
            raise ParamError(
                f"FlowConfig: n_heads * head_dim must be a multiple of 4, got {self.dim}; correct the config"
            )
        if self.latent_frames % self.patch or self.frequencies % self.patch:
            raise ParamError(
                f"FlowConfig: the grid {self.latent_frames} x {self.frequencies} must divide into patches of "
                f"{self.patch}; correct the config"
            )

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.n_heads * self.head_dim

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along time and along frequency."""
        return self.latent_frames // self.patch, self.frequencies // self.patch


def position_table(rows: int, cols: int, dim: int) -> Tensor:
    """Sine and cosine table of a patch grid, the column (frequency) coordinate first.

    Returns:
        [rows * cols, dim] float32, built in float64.

    Source: mucodec spec 4, position table.
    """
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row = torch.arange(rows, dtype=torch.float64) * (_POSITION_SPAN / rows)
    col = torch.arange(cols, dtype=torch.float64) * (_POSITION_SPAN / cols)
    row_angle = (row[:, None] * omega).repeat_interleave(cols, dim=0)
    col_angle = (col[:, None] * omega).repeat(rows, 1)
    parts = [col_angle.sin(), col_angle.cos(), row_angle.sin(), row_angle.cos()]
    return torch.cat(parts, dim=1).float()


def _time_frequencies(n_features: int) -> Tensor:
    # rounded in float32 step by step as the reference does: at 1000 rad one ulp of f is visible in the sine
    half = n_features // 2
    return torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)


def timestep_features(t: Tensor, frequencies: Tensor) -> Tensor:
    """Cosines, then sines, of 1000 t f.

    Args:
        t: [B] float32 in [0, 1].
        frequencies: [n] float32.

    Returns:
        [B, 2 n] float32. Arguments reach 1000 rad, so never in half precision.

    Source: mucodec spec 4, time embedding.
    """
    angle = (t[:, None] * frequencies) * 1000.0
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _linear_f32(x: Tensor, linear: nn.Linear) -> Tensor:
    return F.linear(x, linear.weight.float(), linear.bias.float())


class PatchEmbed(Float32Buffers):
    """[B, C, L, F] -> tokens [B, rows * cols, dim] plus the position table, float32."""

    table: Tensor

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.dim, config.patch, stride=config.patch)
        self.register_buffer("table", position_table(*config.grid, config.dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        return tokens.float() + self.table


class TimestepEmbedder(nn.Module):
    def __init__(self, n_features: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(n_features, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        return _linear_f32(F.silu(_linear_f32(features, self.linear_1)), self.linear_2)


class TimeEmbedding(nn.Module):
    """Holds the one sub-module the released names put between `adaln_single` and its embedder."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(config.time_features, config.dim)


class AdaLNSingle(Float32Buffers):
    """t [B] -> modulation [B, 6 dim] shared by all blocks, and time vector [B, dim]; always float32."""

    frequencies: Tensor

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.emb = TimeEmbedding(config)
        self.linear = nn.Linear(config.dim, 6 * config.dim)
        self.register_buffer("frequencies", _time_frequencies(config.time_features), persistent=False)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        features = timestep_features(t.float(), self.frequencies)
        embedded = self.emb.timestep_embedder(features)
        return _linear_f32(F.silu(embedded), self.linear), embedded


class SelfAttention(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.to_q = nn.Linear(config.dim, config.dim)
        self.to_k = nn.Linear(config.dim, config.dim)
        self.to_v = nn.Linear(config.dim, config.dim)
        # a list of one: the released name is to_out.0
        self.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim)])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(self.to_q(x)), self._heads(self.to_k(x)), self._heads(self.to_v(x))
        out = F.scaled_dot_product_attention(q, k, v)  # [B, heads, tokens, head_dim]
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class GeluProjection(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        hidden = config.ffn_multiple * config.dim
        # the released names are net.0.proj and net.2
        self.net = nn.Sequential(GeluProjection(config.dim, hidden), nn.Identity(), nn.Linear(hidden, config.dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Block(nn.Module):
    """Modulated attention and feed-forward on a float32 residual stream. Source: mucodec spec 4, block."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.dim = config.dim
        self.scale_shift_table = nn.Parameter(torch.randn(6, config.dim) / config.dim**0.5)
        self.attn1 = SelfAttention(config)
        self.ff = FeedForward(config)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [B, tokens, dim] float32, modulation [B, 6, dim] float32 -> [B, tokens, dim] float32."""
        rows = (self.scale_shift_table.float() + modulation).unsqueeze(2)  # [B, 6, 1, dim]
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(1)
        dtype = self.attn1.to_q.weight.dtype
        h = layer_norm_f32(x, self.dim, 1e-6) * (1 + scale1) + shift1
        x = x + gate1 * self.attn1(h.to(dtype)).float()
        h = layer_norm_f32(x, self.dim, 1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.ff(h.to(dtype)).float()


class Flow(nn.Module):
    """Velocity of the latents at time t. State-dict names are those of mucodec.pt without KEY_PREFIX."""

    def __init__(self, config: FlowConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or FlowConfig()
        self.pos_embed = PatchEmbed(config)
        self.adaln_single = AdaLNSingle(config)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.dim) / config.dim**0.5)
        self.proj_out = nn.Linear(config.dim, config.patch**2 * config.out_channels)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Estimate the velocity.

        Args:
            x: [B, 96, L, 32]: noisy, in-context and condition channels, 32 each.
            t: [B] float32 in [0, 1].

        Returns:
            [B, 32, L, 32] float32.

        Raises:
            ParamError: the grid is not the one of the config.
        """
        config = self.config
        if (x.shape[2], x.shape[3]) != (config.latent_frames, config.frequencies):
            raise ParamError(
                f"the flow estimator was built for a {config.latent_frames} x {config.frequencies} grid, got "
                f"{x.shape[2]} x {x.shape[3]}; set FlowConfig.latent_frames and frequencies to the window"
            )
        tokens = self.pos_embed(x)
        ada, embedded = self.adaln_single(t)
        modulation = ada.unflatten(1, (6, config.dim))
        for block in self.transformer_blocks:
            tokens = block(tokens, modulation)
        # the un-activated time vector, not `ada`
        shift, scale = (self.scale_shift_table.float() + embedded.unsqueeze(1)).unsqueeze(2).unbind(1)
        tokens = layer_norm_f32(tokens, config.dim, 1e-6) * (1 + scale) + shift
        return self._unpatchify(self.proj_out(tokens.to(self.proj_out.weight.dtype)).float())

    def _unpatchify(self, patches: Tensor) -> Tensor:
        p, (rows, cols) = self.config.patch, self.config.grid
        grid = patches.reshape(-1, rows, cols, p, p, self.config.out_channels)
        # feature (p * 2 + q) * 32 + c goes to channel c, frame 2 row + p, frequency 2 col + q
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.config.out_channels, rows * p, cols * p)
