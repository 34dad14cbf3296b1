"""LaDA-Band's mask predictor: a bidirectional LLaMA over code frames behind a conditioning prefix.

Module and parameter names are those of the released checkpoint after its `model.` prefix.
Source: spec/lada_band.md, sections a and b; arXiv 2604.11052.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lada_rt.errors import ParamError
from torch import Tensor, nn

__all__ = [
    "DEAD_KEYS",
    "FOREIGN_KEYS",
    "KEY_PREFIX",
    "RTD_KEYS",
    "MaskPredictor",
    "MaskPredictorConfig",
    "rope_tables",
]

#: only keys that start with this belong to the network; it is stripped
KEY_PREFIX = "model."
#: stored, never read: the backbone takes embeddings, and rotary tables are recomputed
DEAD_KEYS: tuple[str, ...] = (r"lm\.embed_tokens\.weight", r".*\.rotary_emb\..*")
#: the replaced-token head of training; load it with `rtd_head=True`, drop it otherwise
RTD_KEYS: tuple[str, ...] = (r"rtd_head\.(weight|bias)",)
#: mixture-of-adapters training files; nothing here computes them, so they must be refused
FOREIGN_KEYS: tuple[str, ...] = (r".*\.(base_layer\.weight|router\.weight|lora_A|lora_B)",)


@dataclass(frozen=True, slots=True)
class MaskPredictorConfig:
    """Sizes of the mask predictor; the defaults are the released 1B model (spec/lada_band.md a.4).

    The RoPE base of 10000 and the eps of 1e-6 are what the release runs with, not Llama 3.2's values.

    Raises:
        ParamError: sizes that do not divide.
    """

    hidden_size: int = 2048
    n_layers: int = 16
    n_heads: int = 32
    n_kv_heads: int = 8
    intermediate_size: int = 8192
    n_vocal_codes: int = 16384
    n_codes: int = 16384
    condition_size: int = 768
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    rtd_head: bool = False

    def __post_init__(self) -> None:
        if self.n_layers < 1:
            raise ParamError(f"n_layers must be 1 or more, got {self.n_layers}; check the model size")
        if self.hidden_size % (2 * self.n_heads) or self.hidden_size % 2:
            raise ParamError(
                f"hidden_size must be a multiple of 2 * n_heads, got {self.hidden_size} and {self.n_heads}; "
                "check the model size"
            )
        if self.n_heads % self.n_kv_heads:
            raise ParamError(
                f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and {self.n_kv_heads}; "
                "check the model size"
            )

    @classmethod
    def lm_1b(cls) -> MaskPredictorConfig:
        """The published checkpoint (`lada_band_lm1B_total3B.ckpt`)."""
        return cls()

    @classmethod
    def lm_3b(cls) -> MaskPredictorConfig:
        """The larger size, released as training configuration only."""
        return cls(hidden_size=3072, n_layers=28, n_heads=24)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_heads

    @property
    def vocal_pad(self) -> int:
        """Vocal id of a padded frame; the last row of `voc_embed`."""
        return self.n_vocal_codes

    @property
    def mask_id(self) -> int:
        """Accompaniment id of a masked frame."""
        return self.n_codes

    @property
    def pad_id(self) -> int:
        """Accompaniment id of a padded frame; the last row of `acc_embed`."""
        return self.n_codes + 1


def rope_tables(
    n_positions: int, head_dim: int, theta: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles of positions 0..n_positions-1.

    The angle is an elementwise float32 product. As a matrix product it would run in TF32 on some GPUs,
    and in half precision positions above 256 collide (spec/lada_band.md a.5).

    Returns:
        Two float32 tensors [n_positions, head_dim / 2].
    """
    pair = torch.arange(0, head_dim, 2, device=device).to(torch.float32)
    inv_freq = 1.0 / (theta ** (pair / head_dim))
    positions = torch.arange(n_positions, device=device).to(torch.float32)
    angles = positions[:, None] * inv_freq[None, :]  # [n, hd/2]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE. x: [B, H, S, hd]; cos, sin: [S, hd/2] in x's dtype."""
    if torch.onnx.is_in_onnx_export():
        # One native RotaryEmbedding node instead of eight small ones. Its tables carry a batch axis.
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
        if x.shape[0] != 1:
            cos, sin = cos.expand(x.shape[0], -1, -1), sin.expand(x.shape[0], -1, -1)
        return torch.onnx.ops.rotary_embedding(x, cos, sin)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class RMSNorm(nn.Module):
    """w * x / rms(x), statistics in float32 whatever the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.size = size
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # F.rms_norm accumulates half-precision input in float32, and exports as RMSNormalization.
        return F.rms_norm(x, (self.size,), self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, no biases."""

    def __init__(self, config: MaskPredictorConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        kv_size = self.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        h: Tensor,
        h_query: Tensor,
        rope: tuple[Tensor, Tensor],
        rope_query: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
    ) -> Tensor:
        """Attend from h_query [B, R, D] to every frame of h [B, S, D] -> [B, R, D]."""
        q = self._heads(self.q_proj(h_query), self.n_heads)  # [B, H, R, hd]
        k = self._heads(self.k_proj(h), self.n_kv_heads)  # [B, KV, S, hd]
        v = self._heads(self.v_proj(h), self.n_kv_heads)  # [B, KV, S, hd]
        q, k = _rotate(q, *rope_query), _rotate(k, *rope)
        a = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.n_heads != self.n_kv_heads
        )  # [B, H, R, hd]
        return self.o_proj(a.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, n: int) -> Tensor:
        return x.unflatten(-1, (n, self.head_dim)).transpose(1, 2)


class Mlp(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: MaskPredictorConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Layer(nn.Module):
    """Pre-norm transformer layer; with `query_rows` it returns those rows only."""

    def __init__(self, config: MaskPredictorConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        query_rows: Tensor | None = None,
    ) -> Tensor:
        """x: [B, S, D] -> [B, S, D], or [B, R, D] for query_rows int64 [R] (indices into S)."""
        h = h_query = self.input_layernorm(x)
        rope_query = rope
        if query_rows is not None:
            x, h_query = x.index_select(1, query_rows), h.index_select(1, query_rows)  # [B, R, D]
            rope_query = (rope[0].index_select(0, query_rows), rope[1].index_select(0, query_rows))
        x = x + self.self_attn(h, h_query, rope, rope_query, mask, causal)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """The layers and the final norm, under the names of the release."""

    def __init__(self, config: MaskPredictorConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MaskPredictor(nn.Module):
    """Predict the accompaniment codes of masked frames from vocal codes, known codes and a prefix.

    Runs in the dtype of its weights (`module.to(torch.bfloat16)`); norm statistics, softmax and rotary
    angles stay in float32.

    Source: spec/lada_band.md a.2 to a.3. It departs from the released code by building no KV cache and, at
    batch 1 without padding, no mask, neither of which changes the result.
    """

    def __init__(self, config: MaskPredictorConfig) -> None:
        super().__init__()
        self.config = config
        half = config.hidden_size // 2
        self.lm = Backbone(config)
        self.voc_embed = nn.Embedding(config.n_vocal_codes + 1, half)
        self.acc_embed = nn.Embedding(config.n_codes + 2, half)
        self.clamp_proj = nn.Linear(config.condition_size, config.hidden_size)
        self.to_logits = nn.Linear(config.hidden_size, config.n_codes, bias=False)
        if config.rtd_head:
            self.rtd_head = nn.Linear(config.hidden_size, 1)

    def forward(
        self,
        vocal_codes: Tensor,
        codes: Tensor,
        prefix: Tensor,
        rows: Tensor | None = None,
        key_mask: Tensor | None = None,
        causal: bool = False,
        rope: tuple[Tensor, Tensor] | None = None,
        collect: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits of every position, or of the given frames only.

        Args:
            vocal_codes: [B, T] int64 in 0..n_vocal_codes (the last is the pad).
            codes: [B, T] int64 in 0..n_codes+1 (the last two are mask and pad).
            prefix: [B, P, condition_size], P >= 0; a missing condition is a zero slot, not an absent one.
                [B, condition_size] means P = 1.
            rows: [R] int64 frame indices 0..T-1. The last layer then computes its queries, MLP, norm and
                logits for these frames only, which changes no result (spec/lada_band.md h.1).
            key_mask: [B, T] bool, True where a frame may be attended to; None means all of them. Prefix slots
                are always visible.
            causal: attend to earlier positions only (the autoregressive ablation).
            rope: float32 `rope_tables` of at least P + T positions, to keep trigonometry out of a graph.
            collect: receives `input_embeds` [B, S, D], `layer{i}_out` [B, S, D], `hidden` [B, S or R, D].

        Returns:
            [B, P + T, n_codes] with the prefix first, or [B, R, n_codes] for `rows`.
        """
        if prefix.dim() == 2:
            prefix = prefix.unsqueeze(1)
        prefix_len = prefix.shape[1]
        frames = torch.cat((self.voc_embed(vocal_codes), self.acc_embed(codes)), dim=-1)  # [B, T, D]
        slots = self.clamp_proj(prefix.to(self.clamp_proj.weight.dtype)).to(frames.dtype)  # [B, P, D]
        x = torch.cat((slots, frames), dim=1)  # [B, S, D]
        n = x.shape[1]
        if rope is None:
            rope = rope_tables(n, self.config.head_dim, self.config.rope_theta, x.device)
        rope = (rope[0][:n].to(x.dtype), rope[1][:n].to(x.dtype))
        query_rows = None if rows is None else rows + prefix_len
        if collect is not None:
            collect["input_embeds"] = x
        mask = _visible(n, prefix_len, key_mask, causal, None, x.device)
        last = len(self.lm.layers) - 1
        for i, layer in enumerate(self.lm.layers):
            chosen = query_rows if i == last else None
            if chosen is not None:
                mask = _visible(n, prefix_len, key_mask, causal, chosen, x.device)
            x = layer(x, rope, mask, causal and mask is None, chosen)
            if collect is not None:
                collect[f"layer{i}_out"] = x
        x = self.lm.norm(x)
        if collect is not None:
            collect["hidden"] = x
        return self.to_logits(x)

    def rtd_logits(self, hidden: Tensor) -> Tensor:
        """Replaced-token logits of `collect["hidden"]` [B, S, D] -> [B, S]; above 0 means replaced.

        Raises:
            ParamError: the network was built without the head.
        """
        if not self.config.rtd_head:
            raise ParamError("expected a network with rtd_head=True, got one without; set it in the config")
        return self.rtd_head(hidden).squeeze(-1)


def _visible(
    n: int,
    prefix_len: int,
    key_mask: Tensor | None,
    causal: bool,
    query_rows: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Boolean attention mask broadcastable to [B, 1, R, S], or None where the kernel needs none."""
    mask = None
    if key_mask is not None:
        mask = F.pad(key_mask.bool(), (prefix_len, 0), value=True)[:, None, None, :]  # [B, 1, 1, S]
    if causal and (mask is not None or query_rows is not None):
        keys = torch.arange(n, device=device)
        queries = keys if query_rows is None else query_rows
        earlier = (queries[:, None] >= keys[None, :])[None, None]  # [1, 1, R, S]
        mask = earlier if mask is None else mask & earlier
    return mask
