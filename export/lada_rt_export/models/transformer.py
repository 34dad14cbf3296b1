"""What CLaMP 3 and MERT share: a norm that stays in float32, and attention over heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LayerNorm", "attend", "key_mask_4d"]


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis, in float32 whatever the dtype of the input.

    The audio branch's eps of 1e-12 is zero in half precision (spec/clamp3.md 9.7).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return super().forward(x)
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, n_heads: int, mask: Tensor | None) -> Tensor:
    """Bidirectional softmax attention, scaled by 1 / sqrt(head size).

    Args:
        q, k, v: [B, S, H].
        n_heads: heads that H is cut into, consecutively.
        mask: boolean, broadcastable to [B, n_heads, S, S], True where a key is seen; None sees all.

    Returns:
        [B, S, H].
    """
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, S, hd]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def key_mask_4d(mask: Tensor | None) -> Tensor | None:
    """[B, S] of ones and zeros to the boolean [B, 1, 1, S] that `attend` takes."""
    return None if mask is None else mask.bool()[:, None, None, :]
