"""MuQ encoder: 24 kHz waveform to hidden states at 25 per second. Source: mucodec spec 2.4 to 2.7."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lada_rt.errors import CheckpointError, ParamError
from torch import Tensor, nn

from lada_rt_export.models.mucodec_common import EvalBatchNorm, Float32Buffers, check_positive

__all__ = [
    "CONSTANT_KEYS",
    "DEAD_KEYS",
    "KEY_PREFIX",
    "RESAMPLE_KERNEL_KEY",
    "MelFrontEnd",
    "MuQ",
    "MuQConfig",
    "dead_keys",
    "resample_kernel",
    "resample_to_24k",
]

#: what the names start with in muq.pt; in mucodec.pt the same group may stand under "muencoder." + KEY_PREFIX
KEY_PREFIX = "model."
#: the 48 kHz -> 24 kHz kernel as stored in mucodec.pt
RESAMPLE_KERNEL_KEY = "rsq48tomuencoder.kernel"
#: stored constants that the formulas here reproduce; `MuQ.load_constants` takes them when a file has them
CONSTANT_KEYS = {
    "window": "preprocessor_melspec_2048.mel_stft.spectrogram.window",
    "filterbank": "preprocessor_melspec_2048.mel_stft.mel_scale.fb",
    "inv_freq": "conformer.embed_positions.inv_freq",
}
#: expressions for whole names, after the prefix, that inference never reads; see also `dead_keys`
DEAD_KEYS = (
    r".*\.num_batches_tracked",
    r"cls_token",
    r"linear\..*",
    r"conformer\.pos_conv_embed\..*",
    r"quantizer_melspec_2048\..*",
    r"rvq\..*",
)


@dataclass(frozen=True, slots=True)
class MuQConfig:
    """Sizes of the MuQ encoder; the defaults are the released ones (mucodec spec 2.5 to 2.7, 8.2).

    `n_layers` counts the conformer layers that are built: hidden state 6 needs six of the twelve in the file.
    `final_norm` adds the closing LayerNorm, which only the last hidden state of the whole encoder has.
    """

    conv_dim: int = 512
    dim: int = 1024
    n_layers: int = 6
    n_heads: int = 16
    ffn_dim: int = 4096
    depthwise_kernel: int = 31
    rotary_base: float = 10000.0
    final_norm: bool = False
    n_mels: int = 128
    n_fft: int = 2048
    hop_samples: int = 240
    sample_rate: int = 24000
    mel_mean: float = 6.768444971712967
    mel_std: float = 18.417922652295623

    def __post_init__(self) -> None:
        check_positive(self, "conv_dim", "dim", "n_heads", "ffn_dim", "depthwise_kernel", "n_mels", "n_fft")
        check_positive(self, "hop_samples", "sample_rate")
        if not self.mel_std > 0:
            raise ParamError(f"MuQConfig.mel_std must be above 0, got {self.mel_std}; correct the config")
        if self.n_layers < 0:
            raise ParamError(f"MuQConfig.n_layers must be 0 or more, got {self.n_layers}; correct the config")
        if self.dim % (2 * self.n_heads):
            raise ParamError(
                f"MuQConfig.dim must be a multiple of 2 * n_heads = {2 * self.n_heads}, got {self.dim}; "
                "correct the config"
            )
        if self.depthwise_kernel % 2 == 0:
            raise ParamError(f"MuQConfig.depthwise_kernel must be odd, got {self.depthwise_kernel}; correct the config")


def dead_keys(config: MuQConfig) -> tuple[str, ...]:
    """Expressions for the whole stored names, after the prefix, that a `MuQ(config)` does not hold.

    Beside DEAD_KEYS these are the constants, the layers past `n_layers` and, without `final_norm`, the
    closing norm.
    """
    constants = tuple(re.escape(name) for name in CONSTANT_KEYS.values())
    kept = "|".join(str(i) for i in range(config.n_layers))
    layers = rf"conformer\.layers\.(?!(?:{kept})\.).*" if kept else r"conformer\.layers\..*"
    closing = () if config.final_norm else (r"conformer\.layer_norm\..*",)
    return (*DEAD_KEYS, *constants, layers, *closing)


def resample_kernel() -> Tensor:
    """The 28 taps of the 48 to 24 kHz windowed-sinc filter, [1, 1, 28] float32. Source: mucodec spec 2.4."""
    u = (0.99 / 2 * torch.arange(-13, 15, dtype=torch.float64)).clamp(-6, 6)
    taps = 0.495 * torch.sinc(u) * torch.cos(math.pi * u / 12).square()
    return taps.float().reshape(1, 1, -1)


def resample_to_24k(audio: Tensor, kernel: Tensor) -> Tensor:
    """Halve the rate with a 28-tap filter; several input channels are filtered and summed.

    Args:
        audio: [B, C, N] float32 at 48 kHz.
        kernel: [1, C, 28] float32.

    Returns:
        [B, 1, ceil(N / 2)] float32 at 24 kHz.

    Source: mucodec spec 2.4.
    """
    # 14 zeros on the right, not 15: that yields ceil(N / 2) outputs at once, and the last tap is zero anyway
    return F.conv1d(F.pad(audio, (13, 14)), kernel, stride=2)


def _mel_filterbank(n_bins: int, n_mels: int, top_hz: float) -> Tensor:
    """[n_bins, n_mels] float32 HTK triangles without area normalisation. Source: mucodec spec 2.5."""
    # float32 and this order of operations give the stored constants bit for bit
    freqs = torch.linspace(0, top_hz, n_bins)
    mels = torch.linspace(0, 2595.0 * math.log10(1.0 + top_hz / 700.0), n_mels + 2)
    edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    width = edges[1:] - edges[:-1]
    distance = edges - freqs[:, None]  # [n_bins, n_mels + 2]
    return torch.minimum(-distance[:, :-2] / width[:-1], distance[:, 2:] / width[1:]).clamp(min=0)


def _n_rows(n_fft: int) -> int:
    """The largest divisor of n_fft up to its root."""
    return next(n for n in range(math.isqrt(n_fft), 0, -1) if n_fft % n == 0)


class MelFrontEnd(Float32Buffers):
    """Waveform to normalised decibel mel, always float32. Source: mucodec spec 2.5."""

    window: Tensor
    cosines: Tensor
    filterbank: Tensor

    def __init__(self, config: MuQConfig) -> None:
        super().__init__()
        self.config = config
        n = torch.arange(config.n_fft, dtype=torch.float64)
        window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / config.n_fft)
        n_bins = config.n_fft // 2 + 1
        fb = _mel_filterbank(n_bins, config.n_mels, config.sample_rate / 2)
        self.register_buffer("window", window.float(), persistent=False)
        cosines = torch.cos(2 * math.pi / config.n_fft * n).float()
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("filterbank", fb.t().contiguous(), persistent=False)

    def bases(self) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of the real DFT of n_fft = R x C samples, sample C a + b, bin c + R d (Cooley and Tukey, 1965).

        Summing over `a`, then over `b`, takes a tenth of the products of one matrix over all samples and bins.
        All entries are looked up in one period of the cosine, with the angle reduced in integers, so that a graph
        carries 8 kB of table; engines fold the lookups when they load.

        Returns:
            rows [2 R, R]: cosines, then sines, of c against a; for the cosine sums and for the sine sums of the first
            step [R, C, 2 D] each: real, then imaginary parts of c and b against d, D covering the bins to n_fft / 2.
        """
        n_fft, rows = self.config.n_fft, _n_rows(self.config.n_fft)
        columns = n_fft // rows
        n_high = n_fft // 2 // rows + 1
        count = torch.arange(n_fft, dtype=torch.int64, device=self.cosines.device)
        # sin(x) = cos(x - pi / 2); three quarters of a period added keep the index positive
        turn = 3 * n_fft // 4
        angle = count[:rows, None] * count[:rows] * columns  # [c, a]
        first = self.cosines[torch.cat([angle, angle + turn]) % n_fft]
        bins = count[:rows, None, None] + rows * count[:n_high]  # [c, 1, d]
        angle = count[:columns, None] * bins  # [c, b, d]
        cos, sin = self.cosines[angle % n_fft], self.cosines[(angle + turn) % n_fft]
        return first, torch.cat([cos, sin], dim=2), torch.cat([-sin, cos], dim=2)

    def load_constants(self, window: Tensor | None, filterbank: Tensor | None) -> None:
        """Take the stored window [n_fft] and filterbank [bins, n_mels] instead of the formulas."""
        if window is not None:
            _check_shape(CONSTANT_KEYS["window"], window, (self.config.n_fft,))
            self.window = window.float().to(self.window.device)
        if filterbank is not None:
            _check_shape(CONSTANT_KEYS["filterbank"], filterbank, tuple(self.filterbank.t().shape))
            self.filterbank = filterbank.float().t().contiguous().to(self.filterbank.device)

    def mel_power(self, wav: Tensor, *, keep_last: bool = False) -> Tensor:
        """Mel power of [B, n] float32, n a multiple of the hop: [B, n_mels, n / hop (+ 1 with keep_last)]."""
        n_fft, hop = self.config.n_fft, self.config.hop_samples
        half, rows = n_fft // 2, _n_rows(n_fft)
        # one hop less of padding on the right leaves out the last centred frame, which the reference drops
        right = half if keep_last else half - hop
        padded = F.pad(wav.unsqueeze(1), (half, right), mode="reflect").squeeze(1)
        # a frame is so many hops in a row, less a rest
        n_hops = -(-n_fft // hop)
        hops = F.pad(padded, (0, n_hops * hop - n_fft)).unflatten(1, (-1, hop))
        n_frames = hops.shape[1] - n_hops + 1
        frames = torch.cat([hops[:, i : i + n_frames] for i in range(n_hops)], dim=2)[:, :, :n_fft] * self.window
        by_row = frames.unflatten(2, (rows, -1)).transpose(1, 2)  # [B, a, frames, b]
        first, from_cosines, from_sines = self.bases()
        sums = torch.matmul(first, by_row.flatten(2)).unflatten(1, (2, rows)).unflatten(3, (-1, n_fft // rows))
        cosine_sums, sine_sums = sums.unbind(1)  # [B, c, frames, b] each
        spectrum = torch.matmul(cosine_sums, from_cosines) + torch.matmul(sine_sums, from_sines)
        real, imag = spectrum.chunk(2, dim=3)  # [B, c, frames, d] each
        power = (real * real + imag * imag).transpose(1, 2).flatten(2)
        # the filterbank in the order of the bins, zero past n_fft / 2
        n_high = real.shape[3]
        bank = F.pad(self.filterbank, (0, rows * n_high - self.filterbank.shape[1]))
        bank = bank.unflatten(1, (n_high, rows)).transpose(1, 2).flatten(1)
        return torch.matmul(power, bank.t()).transpose(1, 2)

    def decibels(self, power: Tensor) -> Tensor:
        """10 log10 with a floor of 1e-10 and no range clipping, hence no coupling between batch rows."""
        return (10.0 / math.log(10.0)) * torch.log(power.clamp(min=1e-10))

    def forward(self, wav: Tensor) -> Tensor:
        """[B, N] float32 at 24 kHz -> [B, n_mels, 4 * (N // 960)] float32."""
        quantum = 4 * self.config.hop_samples
        wav = wav[:, : wav.shape[1] // quantum * quantum]
        decibels = self.decibels(self.mel_power(wav))
        return (decibels - self.config.mel_mean) * (1.0 / self.config.mel_std)


class ResidualConv2d(nn.Module):
    """Two 3x3 convolutions beside a strided 3x3 shortcut, halving both axes. Source: mucodec spec 2.6."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
        self.bn1 = EvalBatchNorm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.bn2 = EvalBatchNorm(c_out)
        self.conv3 = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
        self.bn3 = EvalBatchNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.bn3(self.conv3(x)))


class ConvSubsampling(nn.Module):
    """[B, n_mels, F] -> [B, ceil(F / 4), dim]. Source: mucodec spec 2.6."""

    def __init__(self, config: MuQConfig) -> None:
        super().__init__()
        width = config.conv_dim
        self.conv = nn.Sequential(ResidualConv2d(1, width), ResidualConv2d(width, width))
        self.linear = nn.Linear(width * -(-config.n_mels // 4), config.dim)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.conv(mel.unsqueeze(1))  # [B, conv_dim, n_mels / 4, F / 4]
        return self.linear(x.permute(0, 3, 1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(dim, hidden)
        self.output_dense = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_dense(F.silu(self.intermediate_dense(x)))


class RotarySelfAttention(nn.Module):
    """Attention whose rotary turns the hidden state before the q, k projections. Source: mucodec spec 2.7."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.linear_q = nn.Linear(dim, dim)
        self.linear_k = nn.Linear(dim, dim)
        self.linear_v = nn.Linear(dim, dim)
        self.linear_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = x.unflatten(2, (self.n_heads, -1))  # [B, T, heads, head_dim]
        first, second = heads.chunk(2, dim=3)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3).flatten(2)
        q, k = self._split(self.linear_q(turned)), self._split(self.linear_k(turned))
        out = F.scaled_dot_product_attention(q, k, self._split(self.linear_v(x)))  # [B, heads, T, head_dim]
        return self.linear_out(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)


class ConvModule(nn.Module):
    """Gated pointwise, depthwise and pointwise convolutions over time. Source: mucodec spec 2.7."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim, eps=1e-5)
        self.pointwise_conv1 = nn.Conv1d(dim, 2 * dim, 1, bias=False)
        self.depthwise_conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
        self.batch_norm = EvalBatchNorm(dim)
        self.pointwise_conv2 = nn.Conv1d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        c = self.pointwise_conv1(self.layer_norm(x).transpose(1, 2))  # [B, 2 * dim, T]
        c = F.glu(c, dim=1)
        c = F.silu(self.batch_norm(self.depthwise_conv(c)))
        return self.pointwise_conv2(c).transpose(1, 2)


class ConformerLayer(nn.Module):
    """One encoder layer. Source: mucodec spec 2.7."""

    def __init__(self, config: MuQConfig) -> None:
        super().__init__()
        dim = config.dim
        self.ffn1_layer_norm = nn.LayerNorm(dim, eps=1e-5)
        self.ffn1 = FeedForward(dim, config.ffn_dim)
        self.self_attn_layer_norm = nn.LayerNorm(dim, eps=1e-5)
        self.self_attn = RotarySelfAttention(dim, config.n_heads)
        self.conv_module = ConvModule(dim, config.depthwise_kernel)
        self.ffn2_layer_norm = nn.LayerNorm(dim, eps=1e-5)
        self.ffn2 = FeedForward(dim, config.ffn_dim)
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + 0.5 * self.ffn1(self.ffn1_layer_norm(x))
        x = x + self.self_attn(self.self_attn_layer_norm(x), cos, sin)
        x = x + self.conv_module(x)
        x = x + 0.5 * self.ffn2(self.ffn2_layer_norm(x))
        return self.final_layer_norm(x)


class Conformer(Float32Buffers):
    """The built layers, and the rotary table they share. Source: mucodec spec 2.7."""

    inv_freq: Tensor

    def __init__(self, config: MuQConfig) -> None:
        super().__init__()
        head_dim = config.dim // config.n_heads
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.register_buffer("inv_freq", 1.0 / config.rotary_base**exponent, persistent=False)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.n_layers))
        self.layer_norm = nn.LayerNorm(config.dim, eps=1e-5) if config.final_norm else None

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """[B, T, dim] -> the input and the output of every layer, each [B, T, dim]."""
        position = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)
        angle = (position[:, None] * self.inv_freq).unsqueeze(1)  # [T, 1, head_dim / 2]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], cos, sin))
        if self.layer_norm is not None:
            states[-1] = self.layer_norm(states[-1])
        return states


class MuQ(nn.Module):
    """Waveform to hidden states. State-dict names are those of muq.pt without KEY_PREFIX."""

    def __init__(self, config: MuQConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MuQConfig()
        # not called preprocessor_melspec_2048: it holds no stored tensor, see load_constants
        self.front_end = MelFrontEnd(config)
        self.conv = ConvSubsampling(config)
        self.conformer = Conformer(config)
        self.eval().requires_grad_(False)

    def load_constants(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Prefer stored constants to the formulas.

        Args:
            tensors: released names after KEY_PREFIX -> tensor; names that are not constants are ignored.

        Returns:
            The names that were found and taken.

        Raises:
            CheckpointError: a constant has another shape than the config asks for.
        """
        found = {short: tensors[name] for short, name in CONSTANT_KEYS.items() if name in tensors}
        self.front_end.load_constants(found.get("window"), found.get("filterbank"))
        if "inv_freq" in found:
            inv_freq = self.conformer.inv_freq
            _check_shape(CONSTANT_KEYS["inv_freq"], found["inv_freq"], tuple(inv_freq.shape))
            self.conformer.inv_freq = found["inv_freq"].float().to(inv_freq.device)
        return [CONSTANT_KEYS[short] for short in found]

    def hidden_states(self, mel: Tensor) -> list[Tensor]:
        """[B, n_mels, F] float32 normalised mel -> n_layers + 1 tensors [B, ceil(F / 4), dim]."""
        return self.conformer.hidden_states(self.conv(mel))

    def forward(self, wav: Tensor) -> Tensor:
        """[B, N] float32 at 24 kHz -> [B, N // 960, dim], the last hidden state."""
        return self.hidden_states(self.front_end(wav))[-1]


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise CheckpointError(
            f"{KEY_PREFIX}{name} should have shape {list(expected)}, got {list(tensor.shape)}; "
            "use the muq.pt this config describes"
        )
