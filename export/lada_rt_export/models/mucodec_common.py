"""What the MuCodec networks share: checks, inference-only BatchNorm, float32 islands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from lada_rt.errors import ParamError
from torch import Tensor, nn

__all__ = [
    "EvalBatchNorm",
    "Float32Buffers",
    "GroupNormF32",
    "check_positive",
    "layer_norm_f32",
]


def check_positive(owner: object, *fields: str) -> None:
    """Raise ParamError unless every named field of a config is a positive integer."""
    for field in fields:
        value = getattr(owner, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            kind = type(owner).__name__
            raise ParamError(f"{kind}.{field} must be a positive integer, got {value!r}; correct the config")


class Float32Buffers(nn.Module):
    """Keeps its own buffers as they are through `.half()` and `.to(dtype)`; they still follow the device.

    For constants that half precision would spoil, such as frequencies multiplied by 1000 rad.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and old.dtype != new.dtype:
                self._buffers[name] = new.to(old.dtype) if old.is_meta else old.to(new.device)
        return self


class EvalBatchNorm(nn.Module):
    """BatchNorm with stored statistics, for [B, C, ...]. Source: mucodec spec 2.6, 2.7 (eps 1e-5)."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def layer_norm_f32(x: Tensor, size: int, eps: float) -> Tensor:
    """LayerNorm without affine over the last axis, statistics and result in float32.

    Source: mucodec spec 11, hazard 13: eps 1e-6 is below half-precision resolution.
    """
    return F.layer_norm(x.float(), (size,), eps=eps)


class GroupNormF32(nn.GroupNorm):
    """GroupNorm of [B, C, H, W] with float32 statistics, result in the dtype of the input.

    Spelt out with means of means: a group has up to 8 M elements. Their half-precision sum overflows, and the
    running float32 sums behind GroupNormalization and InstanceNormalization in ONNX Runtime are off by 4e-4; this
    form stays below 3e-6 there and is faster.

    Source: mucodec spec 6, 11 hazard 16.
    """

    #: evaluate torch's own operator, as the release does: eager torch reads and writes the map less often then
    fused: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return super().forward(x)
        _, channels, height, width = x.shape
        groups = self.num_groups
        g = x.float().reshape(-1, groups, channels // groups * height, width)
        g = g - g.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)
        rows = torch.linalg.vector_norm(g, dim=3)  # [B, groups, C / groups * H]; its square over W is a mean square
        rstd = torch.rsqrt(rows.square().mean(dim=2, keepdim=True) / width + self.eps)  # [B, groups, 1]
        scale = (self.weight.float().reshape(1, groups, -1) * rstd).reshape(-1, channels, 1, 1)
        y = g.reshape(-1, channels, height, width) * scale + self.bias.float()[:, None, None]
        return y.to(x.dtype)
