"""The released program's way of computing, in eager PyTorch: what bench/gpu_check.py compares with.

float32 weights with TF32 products; an explicit additive mask and expanded keys and values; logits of every position at
every step; a sort for the nucleus; fp16 autocast in the flow; a vocoder in chunks that overlap by three quarters.
Source: spec/lada_band a.4, a.5, d.4; spec/mucodec 7.1, 9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_models import make_stage
from gpu_sections import State, denoiser_inputs, flow_inputs, relative_error
from lada_rt.torch_loop.device import exact_float32
from lada_rt_export.models.mask_predictor import Layer, MaskPredictor, rope_tables
from lada_rt_export.models.stages_mucodec import FlowStage
from torch import Tensor, nn

__all__ = ["PublicSong", "n_vocoder_chunks", "public_denoiser", "public_flow", "public_sample"]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _layer(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    attention = layer.self_attn
    h = layer.input_layernorm(x)
    q, k, v = (
        projection(h).unflatten(-1, (n, attention.head_dim)).transpose(1, 2)
        for projection, n in (
            (attention.q_proj, attention.n_heads),
            (attention.k_proj, attention.n_kv_heads),
            (attention.v_proj, attention.n_kv_heads),
        )
    )
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    groups = attention.n_heads // attention.n_kv_heads
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


@torch.no_grad()
def public_denoiser(network: MaskPredictor, vocal_codes: Tensor, codes: Tensor, prefix: Tensor) -> Tensor:
    """Logits [1, T, V] of every frame; arguments as for the network."""
    frames = torch.cat((network.voc_embed(vocal_codes), network.acc_embed(codes)), dim=-1)
    x = torch.cat((network.clamp_proj(prefix), frames), dim=1)
    n = x.shape[1]
    cos, sin = (
        torch.cat((table, table), dim=-1)
        for table in rope_tables(n, network.config.head_dim, network.config.rope_theta, x.device)
    )
    mask = torch.zeros(1, 1, n, n, device=x.device)
    for layer in network.lm.layers:
        assert isinstance(layer, Layer)
        x = _layer(layer, x, cos, sin, mask)
    return network.to_logits(network.lm.norm(x))[:, prefix.shape[1] :]


@torch.no_grad()
def public_sample(logits: Tensor, masked: Tensor, n_masked: int, tau: float, top_k: int, top_p: float) -> Tensor:
    """One draw for every frame and the choice of what stays masked, [T] bool.

    Args:
        logits: [1, T, V] float32.
        masked: [T] bool, still undecided.
        n_masked: how many stay so.
        tau: weight of the Gumbel noise.
        top_k, top_p: filters.
    """
    ordered, index = logits.sort(dim=-1, descending=True)
    cumulative = ordered.softmax(dim=-1).cumsum(dim=-1)
    drop = cumulative > top_p
    drop[..., 1:] = drop[..., :-1].clone()
    drop[..., 0] = False
    logits = logits.masked_fill(drop.scatter(-1, index, drop), -math.inf)
    kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    probs = logits.masked_fill(logits < kth, -math.inf).softmax(dim=-1)[0]  # [T, V]
    tokens = probs.multinomial(1)
    confidence = probs.gather(1, tokens)[:, 0].clamp(min=1e-20).log()
    gumbel = -(-torch.rand(len(masked), device=logits.device).clamp(min=1e-20).log()).log()
    score = (confidence + tau * gumbel).masked_fill(~masked, math.inf)
    stays = torch.zeros_like(masked)
    stays[score.argsort()[:n_masked]] = True
    return stays


@torch.no_grad()
def public_flow(stage: FlowStage, **inputs: Tensor) -> Tensor:
    """One evaluation of the flow under fp16 autocast (bf16 where fp16 has no autocast)."""
    device = inputs["x"].device.type
    with torch.autocast(device, dtype=torch.float16 if device == "cuda" else torch.bfloat16):
        return stage(**inputs)


def n_vocoder_chunks(n_mel_frames: int, chunk: int = 1024, shift: int = 256) -> int:
    """Chunks the public vocoder cuts a window into."""
    return 1 + max(0, math.ceil((n_mel_frames - chunk) / shift))


class PublicSong:
    """The song that `gpu_check` measures, with the released program's calls on random weights and inputs.

    Attributes:
        parts: one call of each kind; denoiser and sampler are a step, the vocoder is a chunk.
        counts: how often a song makes each.
    """

    def __init__(self, state: State) -> None:
        size, g, device = state.size, state.size.geometry, state.device
        self._size, self._n_windows = size, g.n_windows(size.n_frames)
        self._denoiser: Any = make_stage("denoiser", size, device)
        self._flow: Any = make_stage("flow", size, device)
        self._mel_decoder, self._vocoder = (make_stage(name, size, device) for name in ("mel_decoder", "vocoder"))
        self._frames = denoiser_inputs(state, size.n_frames, size.n_frames)
        self._masked = self._frames["codes"][0] == size.denoiser.mask_id
        self._window = flow_inputs(state)
        rng = state.rng(9)
        shape = (1, g.latent_channels // 2, g.window_latents, g.latent_bins)
        self._latents = torch.randn(shape, device=device, generator=rng)
        self._chunk = torch.randn(1, g.mel_bins, size.vocoder_frames, device=device, generator=rng) - 5
        self._logits = self._step_logits()
        n_chunks = n_vocoder_chunks(
            g.window_latents * g.mel_frames_per_latent, size.vocoder_frames, max(1, size.vocoder_frames // 4)
        )
        self.parts: dict[str, Callable[[], Any]] = {
            "denoiser": self._step_logits,
            "sampler": lambda: public_sample(self._logits, self._masked, 10, 4.0, 100, 0.9),
            "flow": lambda: public_flow(self._flow, **self._window),
            "mel_decoder": lambda: _call(self._mel_decoder, latents=self._latents),
            "vocoder": lambda: _call(self._vocoder, mel=self._chunk),
        }
        self.counts = {
            "denoiser": size.steps[-1],
            "sampler": size.steps[-1],
            "flow": self._n_windows * size.flow_steps,
            "mel_decoder": self._n_windows * 2,
            "vocoder": self._n_windows * 2 * n_chunks,
        }

    def _step_logits(self) -> Tensor:
        f = self._frames
        return public_denoiser(self._denoiser.mask_predictor, f["vocal_codes"], f["codes"], f["prefix"])

    def denoiser_error(self) -> float:
        """Of the public denoiser against this project's stage, both in exact float32."""
        with exact_float32:
            return relative_error(self._step_logits()[0], _call(self._denoiser, **self._frames))

    def whole_song(self) -> None:
        """Every call of a song, in order. Nothing waits for the device in between, in the baseline's favour."""
        for _ in range(self._size.steps[-1]):
            self.parts["denoiser"]()
            self.parts["sampler"]()
        for _ in range(self._n_windows):
            for _ in range(self._size.flow_steps):
                self.parts["flow"]()
            for _ in range(2):
                self.parts["mel_decoder"]()
                for _ in range(self.counts["vocoder"] // (2 * self._n_windows)):
                    self.parts["vocoder"]()


@torch.no_grad()
def _call(stage: nn.Module, **inputs: Tensor) -> Tensor:
    result: Tensor = stage(**inputs)
    return result
