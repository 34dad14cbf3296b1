"""MERT-v1-95M: a waveform to the mean of its transformer's hidden states (HuBERT base shape, post-norm).

Source: spec/clamp3.md, section 4. Nothing of the released folder's own Python files is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lada_rt.errors import CheckpointError, ParamError
from torch import Tensor, nn

from lada_rt_export.models.transformer import LayerNorm, attend

__all__ = ["DEAD_KEYS", "KEY_PREFIX", "Mert", "MertConfig", "fold_positional_conv", "normalize_waveform"]

#: the released file is flat
KEY_PREFIX = ""
#: stored, never read: the training mask
DEAD_KEYS: tuple[str, ...] = (r"masked_spec_embed",)

_POS_CONV = "encoder.pos_conv_embed.conv."
#: both spellings of the weight norm: gain, then direction
_WEIGHT_NORM = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)

#: what the folder's config.json must say, where it says anything: nothing else is implemented
_REQUIRED: dict[str, Any] = {
    "conv_bias": False,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": True,
    "do_stable_layer_norm": False,
    "hidden_act": "gelu",
    "feature_extractor_cqt": False,
    "attention_relax": -1.0,
    "deepnorm": False,
    "conv_pos_batch_norm": False,  # older folders lack the key, which means false
}


@dataclass(frozen=True, slots=True)
class MertConfig:
    """Sizes of MERT; the defaults are the released ones.

    Raises:
        ParamError: sizes that do not divide, or convolution lists of unequal length.
    """

    hidden_size: int = 768
    n_layers: int = 12
    n_heads: int = 12
    intermediate_size: int = 3072
    conv_channels: tuple[int, ...] = (512,) * 7
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    pos_conv_kernel: int = 128
    pos_conv_groups: int = 16
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        n = len(self.conv_channels)
        if not n or len(self.conv_kernels) != n or len(self.conv_strides) != n:
            raise ParamError(
                "conv_channels, conv_kernels and conv_strides must have the same length, got "
                f"{n}, {len(self.conv_kernels)} and {len(self.conv_strides)}; check the model size"
            )
        for name in ("n_heads", "pos_conv_groups"):
            if self.hidden_size % getattr(self, name):
                raise ParamError(
                    f"hidden_size must be a multiple of {name}, got {self.hidden_size} and "
                    f"{getattr(self, name)}; check the model size"
                )

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> MertConfig:
        """Read the folder's config.json.

        Args:
            config: the parsed file. Absent keys have the released values, keys of training are ignored.

        Raises:
            CheckpointError: an option that changes the network in a way not implemented here, or a size of
                the wrong type.
        """
        for key, wanted in _REQUIRED.items():
            found = config.get(key, wanted)
            if isinstance(found, bool) != isinstance(wanted, bool) or found != wanted:
                raise CheckpointError(
                    f"MERT config.json: expected {key} = {wanted!r}, got {found!r}; use the MERT-v1-95M folder"
                )
        defaults = cls()
        try:
            sizes = cls(
                hidden_size=_whole(config, "hidden_size", defaults.hidden_size),
                n_layers=_whole(config, "num_hidden_layers", defaults.n_layers),
                n_heads=_whole(config, "num_attention_heads", defaults.n_heads),
                intermediate_size=_whole(config, "intermediate_size", defaults.intermediate_size),
                conv_channels=_wholes(config, "conv_dim", defaults.conv_channels),
                conv_kernels=_wholes(config, "conv_kernel", defaults.conv_kernels),
                conv_strides=_wholes(config, "conv_stride", defaults.conv_strides),
                pos_conv_kernel=_whole(config, "num_conv_pos_embeddings", defaults.pos_conv_kernel),
                pos_conv_groups=_whole(config, "num_conv_pos_embedding_groups", defaults.pos_conv_groups),
                layer_norm_eps=_positive(config, "layer_norm_eps", defaults.layer_norm_eps),
            )
        except ParamError as error:
            raise CheckpointError(f"MERT config.json: {error}") from error
        n_convs = config.get("num_feat_extract_layers", len(sizes.conv_channels))
        if n_convs != len(sizes.conv_channels):
            raise CheckpointError(
                f"MERT config.json: expected num_feat_extract_layers = {len(sizes.conv_channels)} as "
                f"conv_dim has, got {n_convs!r}; use the MERT-v1-95M folder"
            )
        return sizes

    def n_frames(self, n_samples: int) -> int:
        """Frames that come out of `n_samples` samples; 0 or less means too short."""
        n = n_samples
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            n = (n - kernel) // stride + 1
        return n


#: sizes come from a file that nobody vouches for
_MOST, _MOST_LAYERS = 1 << 20, 256


def _whole(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    most = _MOST_LAYERS if key == "num_hidden_layers" else _MOST
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise CheckpointError(
            f"MERT config.json: expected a whole number from 1 to {most} for {key}, got {value!r}; "
            "use the MERT-v1-95M folder"
        )
    return value


def _wholes(config: Mapping[str, Any], key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = config.get(key, default)
    if not isinstance(value, list | tuple) or len(value) > _MOST_LAYERS:
        raise CheckpointError(
            f"MERT config.json: expected a list of whole numbers for {key}, got {str(value)[:200]}; "
            "use the MERT-v1-95M folder"
        )
    return tuple(_whole({key: item}, key, 1) for item in value)


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
        raise CheckpointError(
            f"MERT config.json: expected a number between 0 and 1 for {key}, got {value!r}; use the MERT-v1-95M folder"
        )
    return float(value)


def fold_positional_conv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the weight-normalised positional convolution by its plain weight.

    The norm runs along the kernel axis: W[o,i,k] = g[0,0,k] * v[o,i,k] / ||v[:,:,k]||.

    Args:
        tensors: the state dict, in either spelling of the weight norm, or already folded.

    Returns:
        The same tensors with `encoder.pos_conv_embed.conv.weight` (float32) instead of the pair.

    Raises:
        CheckpointError: half of a pair, or neither the pair nor the weight.
    """
    folded = dict(tensors)
    for gain_key, direction_key in _WEIGHT_NORM:
        gain = folded.pop(_POS_CONV + gain_key, None)
        direction = folded.pop(_POS_CONV + direction_key, None)
        if gain is None and direction is None:
            continue
        if gain is None or direction is None:
            missing = gain_key if gain is None else direction_key
            raise CheckpointError(f"MERT: expected {_POS_CONV}{missing}, got none; download pytorch_model.bin again")
        v = direction.double()
        weight = gain.double() * v / v.square().sum(dim=(0, 1), keepdim=True).sqrt()
        folded[_POS_CONV + "weight"] = weight.float()
    if _POS_CONV + "weight" not in folded:
        raise CheckpointError(
            f"MERT: expected {_POS_CONV}weight_g and weight_v, got neither; download pytorch_model.bin again"
        )
    return folded


def normalize_waveform(x: Tensor) -> Tensor:
    """Zero mean and unit variance per row of [B, n], as the feature extractor does when its folder says so.

    Population variance plus 1e-7 (spec/clamp3.md 3.3).
    """
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-7).sqrt()


class _ConvLayer(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, normed: bool) -> None:
        super().__init__()
        self.channels = out_channels
        self.conv = nn.Conv1d(in_channels, out_channels, kernel, stride, bias=False)
        if normed:
            # one group per channel: statistics over the whole time axis of the chunk
            self.layer_norm = nn.GroupNorm(out_channels, out_channels, eps=1e-5)
        self.normed = normed

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.normed:
            x = self._norm(x)
        return F.gelu(x)

    def _norm(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return self.layer_norm(x)
        # a chunk has 288 000 values per channel: half precision cannot even count them
        norm = self.layer_norm
        y = F.group_norm(x.float(), self.channels, norm.weight.float(), norm.bias.float(), norm.eps)
        return y.to(x.dtype)


class _FeatureExtractor(nn.Module):
    def __init__(self, config: MertConfig) -> None:
        super().__init__()
        widths = (1, *config.conv_channels)
        self.conv_layers = nn.ModuleList(
            _ConvLayer(widths[i], widths[i + 1], kernel, stride, normed=i == 0)
            for i, (kernel, stride) in enumerate(zip(config.conv_kernels, config.conv_strides, strict=True))
        )


class _FeatureProjection(nn.Module):
    def __init__(self, config: MertConfig) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(config.conv_channels[-1], eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.conv_channels[-1], config.hidden_size)


class _PositionalConv(nn.Module):
    def __init__(self, config: MertConfig) -> None:
        super().__init__()
        kernel = config.pos_conv_kernel
        self.conv = nn.Conv1d(
            config.hidden_size, config.hidden_size, kernel, padding=kernel // 2, groups=config.pos_conv_groups
        )
        self.even = kernel % 2 == 0

    def forward(self, z: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        y = self.conv(z.transpose(1, 2))
        if self.even:
            y = y[..., :-1]  # an even kernel with half padding gives one frame too many, at the end
        return F.gelu(y).transpose(1, 2)


class _Attention(nn.Module):
    def __init__(self, config: MertConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        size = config.hidden_size
        self.k_proj, self.v_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.q_proj, self.out_proj = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, h: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(h), self.k_proj(h), self.v_proj(h), self.n_heads, None))


class _FeedForward(nn.Module):
    def __init__(self, config: MertConfig) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        return self.output_dense(F.gelu(self.intermediate_dense(h)))


class _Layer(nn.Module):
    def __init__(self, config: MertConfig) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = _FeedForward(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, h: Tensor) -> Tensor:
        h = self.layer_norm(h + self.attention(h))
        return self.final_layer_norm(h + self.feed_forward(h))


class _Encoder(nn.Module):
    def __init__(self, config: MertConfig) -> None:
        super().__init__()
        self.pos_conv_embed = _PositionalConv(config)
        self.layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.n_layers))


class Mert(nn.Module):
    """One chunk of waveform to frames. Norm statistics and attention span the whole chunk."""

    def __init__(self, config: MertConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_extractor = _FeatureExtractor(config)
        self.feature_projection = _FeatureProjection(config)
        self.encoder = _Encoder(config)

    def forward(self, waveform: Tensor, collect: dict[str, Tensor] | None = None) -> Tensor:
        """Mean of all hidden states, the input of the first layer included.

        Args:
            waveform: [B, n] float32, n >= 400 with the released kernels. The release feeds 48 kHz audio to a
                network made for 24 kHz, in training too, so this does as well (spec/clamp3.md 3.2).
            collect: receives `conv{i}` [B, C, T_i], `projected`, `pos_conv` and `hidden0` to
                `hidden{n_layers}`, [B, T, H] each.

        Returns:
            [B, T, H], T = config.n_frames(n).
        """
        x = waveform.to(self.feature_projection.projection.weight.dtype).unsqueeze(1)  # [B, 1, n]
        for i, conv in enumerate(self.feature_extractor.conv_layers):
            x = conv(x)
            if collect is not None:
                collect[f"conv{i}"] = x
        project = self.feature_projection
        z = project.projection(project.layer_norm(x.transpose(1, 2)))  # [B, T, H]
        pos = self.encoder.pos_conv_embed(z)
        h = self.encoder.layer_norm(z + pos)
        if collect is not None:
            collect |= {"projected": z, "pos_conv": pos, "hidden0": h}
        total = h
        for i, layer in enumerate(self.encoder.layers):
            h = layer(h)
            total = total + h
            if collect is not None:
                collect[f"hidden{i + 1}"] = h
        return total / (self.config.n_layers + 1)
