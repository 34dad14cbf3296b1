"""The text and audio encoders of CLaMP 3: two post-norm BERTs, each pooled and projected to one vector.

Module and parameter names are those of the released file's `model` dictionary.
Source: spec/clamp3.md, sections 2 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from lada_rt.errors import ParamError
from torch import Tensor, nn

from lada_rt_export.models.transformer import LayerNorm, attend, key_mask_4d

__all__ = [
    "AUDIO_DEAD_KEYS",
    "AUDIO_KEYS",
    "KEY_PREFIX",
    "TEXT_DEAD_KEYS",
    "TEXT_KEYS",
    "Clamp3Audio",
    "Clamp3AudioConfig",
    "Clamp3Text",
    "Clamp3TextConfig",
]

#: the released file's `model` dictionary is flat
KEY_PREFIX = ""
#: which of its keys belong to a branch; the rest is the symbolic branch, which nothing here reads
TEXT_KEYS: tuple[str, ...] = (r"text_(model|proj)\..*",)
AUDIO_KEYS: tuple[str, ...] = (r"audio_(model|proj)\..*",)
#: stored, never read: the BERT pooler, and the audio branch's single word (its input is vectors)
TEXT_DEAD_KEYS: tuple[str, ...] = (r"text_model\.pooler\..*", r".*\.position_ids")
AUDIO_DEAD_KEYS: tuple[str, ...] = (
    r"audio_model\.pooler\..*",
    r"audio_model\.embeddings\.word_embeddings\.weight",
    r".*\.position_ids",
)


@dataclass(frozen=True, slots=True)
class Clamp3TextConfig:
    """Sizes of the text branch (XLM-RoBERTa base); the defaults are the released ones.

    Raises:
        ParamError: hidden_size is not a multiple of n_heads.
    """

    vocab_size: int = 250002
    hidden_size: int = 768
    n_layers: int = 12
    n_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 514
    n_token_types: int = 1
    layer_norm_eps: float = 1e-5
    output_size: int = 768

    def __post_init__(self) -> None:
        _check_heads(self.hidden_size, self.n_heads)


@dataclass(frozen=True, slots=True)
class Clamp3AudioConfig:
    """Sizes of the audio branch (BERT over vectors); the defaults are the released ones.

    Raises:
        ParamError: hidden_size is not a multiple of n_heads.
    """

    hidden_size: int = 768
    n_layers: int = 12
    n_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 128
    n_token_types: int = 2
    layer_norm_eps: float = 1e-12
    output_size: int = 768

    def __post_init__(self) -> None:
        _check_heads(self.hidden_size, self.n_heads)


def _check_heads(hidden_size: int, n_heads: int) -> None:
    if hidden_size % n_heads:
        raise ParamError(
            f"hidden_size must be a multiple of n_heads, got {hidden_size} and {n_heads}; check the model size"
        )


class _Embeddings(nn.Module):
    def __init__(self, config: Clamp3TextConfig | Clamp3AudioConfig) -> None:
        super().__init__()
        if isinstance(config, Clamp3TextConfig):
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.n_token_types, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [B, S, H] vectors; positions: [B, S, H] embedded."""
        # token type 0 throughout
        return self.LayerNorm(x + self.token_type_embeddings.weight[0] + positions)


class _SelfAttention(nn.Module):
    def __init__(self, hidden_size: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        return attend(self.query(h), self.key(h), self.value(h), self.n_heads, mask)


class _Output(nn.Module):
    """A linear map back to the residual stream, added and normalised."""

    def __init__(self, in_size: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(in_size, hidden_size)
        self.LayerNorm = LayerNorm(hidden_size, eps=eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dense(x))


class _Attention(nn.Module):
    def __init__(self, config: Clamp3TextConfig | Clamp3AudioConfig) -> None:
        super().__init__()
        self.self = _SelfAttention(config.hidden_size, config.n_heads)
        self.output = _Output(config.hidden_size, config.hidden_size, config.layer_norm_eps)


class _Intermediate(nn.Module):
    def __init__(self, config: Clamp3TextConfig | Clamp3AudioConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class _Layer(nn.Module):
    def __init__(self, config: Clamp3TextConfig | Clamp3AudioConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.intermediate = _Intermediate(config)
        self.output = _Output(config.intermediate_size, config.hidden_size, config.layer_norm_eps)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        return self.feed_forward(self.attention.output(self.attention.self(h, mask), h))

    def forward_single(self, h: Tensor) -> Tensor:
        """h: [B, H], one position: its softmax is 1, so attention is the value itself."""
        return self.feed_forward(self.attention.output(self.attention.self.value(h), h))

    def feed_forward(self, a: Tensor) -> Tensor:
        # erf GELU: the tanh form moves the feature by ten tolerances
        return self.output(F.gelu(self.intermediate.dense(a)), a)


class _Encoder(nn.Module):
    def __init__(self, config: Clamp3TextConfig | Clamp3AudioConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.n_layers))

    def forward(self, h: Tensor, mask: Tensor | None, collect: dict[str, Tensor] | None) -> Tensor:
        if collect is not None:
            collect["hidden0"] = h
        for i, layer in enumerate(self.layer):
            h = layer(h, mask)
            if collect is not None:
                collect[f"hidden{i + 1}"] = h
        return h


class _Bert(nn.Module):
    def __init__(self, config: Clamp3TextConfig | Clamp3AudioConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)


def _pool(h: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of h [B, S, H] over the positions whose mask is 1 -> [B, H]."""
    if mask is None:
        return h.mean(dim=1)
    weight = mask.to(h.dtype).unsqueeze(-1)
    return (h * weight).sum(dim=1) / weight.sum(dim=1)


class Clamp3Text(nn.Module):
    """Token ids to one text vector (spec/clamp3.md, section 2, steps 3 to 6)."""

    def __init__(self, config: Clamp3TextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = _Bert(config)
        self.text_proj = nn.Linear(config.hidden_size, config.output_size)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        collect: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The text feature.

        Args:
            ids: [B, S] int64 token ids.
            positions: [B, S] int64, from the ids (spec/clamp3.md 2.2), not from the mask.
            mask: [B, S], 1 for real tokens; None when there is no padding.
            collect: receives `hidden0` (embeddings) to `hidden{n_layers}` [B, S, H] and `pooled` [B, H].

        Returns:
            [B, output_size].
        """
        embeddings = self.text_model.embeddings
        h = embeddings(embeddings.word_embeddings(ids), embeddings.position_embeddings(positions))
        h = self.text_model.encoder(h, key_mask_4d(mask), collect)
        pooled = _pool(h, mask)
        if collect is not None:
            collect["pooled"] = pooled
        return self.text_proj(pooled)


class Clamp3Audio(nn.Module):
    """Audio vectors to one audio feature (spec/clamp3.md, section 5)."""

    def __init__(self, config: Clamp3AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.audio_model = _Bert(config)
        self.audio_proj = nn.Linear(config.hidden_size, config.output_size)

    def forward(self, x: Tensor, mask: Tensor | None = None, collect: dict[str, Tensor] | None = None) -> Tensor:
        """The general form, over a sequence of vectors.

        Args:
            x: [B, S, H], S <= max_positions.
            mask: [B, S], 1 for real positions; None when there is no padding.
            collect: as for the text branch.

        Returns:
            [B, output_size].
        """
        embeddings = self.audio_model.embeddings
        h = embeddings(x, embeddings.position_embeddings.weight[: x.shape[1]])
        h = self.audio_model.encoder(h, key_mask_4d(mask), collect)
        pooled = _pool(h, mask)
        if collect is not None:
            collect["pooled"] = pooled
        return self.audio_proj(pooled)

    def forward_single(self, x: Tensor) -> Tensor:
        """A sequence of one vector, which is all LaDA-Band uses: query and key weights drop out.

        Args:
            x: [B, H].

        Returns:
            [B, output_size], equal to `forward(x[:, None])`.
        """
        embeddings = self.audio_model.embeddings
        h = embeddings(x, embeddings.position_embeddings.weight[0])
        for layer in self.audio_model.encoder.layer:
            assert isinstance(layer, _Layer)
            h = layer.forward_single(h)
        return self.audio_proj(h)
