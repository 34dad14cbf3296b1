"""Flow stage: conditional flow matching of normalised latents, given the codes and sometimes the frames before.

x_t = (1 - (1 - sigma) t) x_0 + t x_1 with x_0 normal and x_1 the latents; the network learns x_1 - (1 - sigma) x_0
(Lipman et al., arXiv 2210.02747), which is what the solver of mucodec spec 3.4 integrates. Half of the crops begin with
frames in context, which keep their place on the path and are left out of the loss; a tenth lose their condition, for
guidance. Short crops take their rows of the full window's position table, the last steps see whole windows.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from lada_rt_export.demo.training.data import CodecSongs
from lada_rt_export.demo.training.loop import Losses
from lada_rt_export.demo.training.sizes import TrainingSizes
from lada_rt_export.models.flow import Flow
from lada_rt_export.models.latent_norm import MIN_COUNTS, LatentNorm
from lada_rt_export.models.vq import VQ, condition_grid, condition_linear, fold_condition

__all__ = ["FlowModules", "FlowTask", "cropped", "measure_latents"]

SIGMA_MIN = 1e-4
_DROP_CONDITION = 0.1
_USE_CONTEXT = 0.5
#: the smallest deviation of a channel that moves
_MIN_STD = 1e-3


def cropped(flow: Flow, start: int, n_latents: int) -> Flow:
    """A view of `flow`, with the same weights, on latent frames `start` (even) to `start + n_latents` of its window."""
    config = flow.config
    first, rows, cols = start // config.patch, n_latents // config.patch, config.grid[1]
    table = flow.pos_embed.table[first * cols : (first + rows) * cols]
    embed = copy.copy(flow.pos_embed)
    embed._buffers = {"table": table}
    view = copy.copy(flow)
    view._modules = {**flow._modules, "pos_embed": embed}
    view.config = replace(config, latent_frames=n_latents)
    return view


def measure_latents(norm: LatentNorm, songs: CodecSongs) -> None:
    """Set the statistics from every codec song's latents, in counts that inference takes for final.

    A channel that never moves in time gets a deviation of exactly zero: denormalising then returns its mean whatever
    the flow made of it.
    """
    n = songs.sizes.n_codec_songs
    total, squares = (torch.zeros(norm.sum_x.shape, dtype=torch.float64) for _ in range(2))
    for index in range(n):
        z = torch.from_numpy(np.asarray(songs.array(index, "latents"), np.float64))  # [32, L, 32]
        total += z.mean(dim=1)
        squares += z.square().mean(dim=1)
    counts = max(MIN_COUNTS, n * songs.sizes.geometry.window_latents)
    mean = (total / n).float()
    variance = (squares / n - (total / n).square()).clamp(min=0)
    still = variance == 0
    variance = torch.where(still, torch.zeros_like(variance), variance.clamp(min=_MIN_STD**2)).float()
    norm.counts.fill_(counts)
    norm.sum_x.copy_(mean * counts)
    norm.sum_x2.copy_((variance + mean.square()) * counts)


class FlowModules(nn.Module):
    def __init__(self, sizes: TrainingSizes) -> None:
        super().__init__()
        self.flow = Flow(sizes.flow).requires_grad_(True)
        self.condition = condition_linear(sizes.vq).requires_grad_(True)
        self.norm = LatentNorm(sizes.geometry.latent_channels, sizes.geometry.latent_bins)
        self._silence(sizes)

    @torch.no_grad()
    def _silence(self, sizes: TrainingSizes) -> None:
        """Start at a velocity of zero, blind to the channels that carry nothing.

        Their weights stay zero: the inputs are zero and the outputs have no loss, so no gradient comes.
        """
        self.flow.proj_out.weight.zero_()
        assert self.flow.proj_out.bias is not None
        self.flow.proj_out.bias.zero_()
        carried = carried_channels(sizes)
        patch = self.flow.pos_embed.proj.weight  # noisy, context and condition channels
        patch[:, :32] *= carried[:, None, None]
        patch[:, 32:64] *= carried[:, None, None]


def carried_channels(sizes: TrainingSizes) -> Tensor:
    """[32] ones for the latent channels that move in time, the active and the frames' sign, left side first."""
    n = sizes.geometry.latent_channels // 2
    return (torch.arange(2 * n) % n < sizes.active_latents + 1).float()


class FlowTask:
    """Trains `FlowModules` against a frozen quantiser."""

    name = "flow"

    def __init__(self, sizes: TrainingSizes, songs: CodecSongs, vq: VQ) -> None:
        self.sizes, self.songs, self.budget = sizes, songs, sizes.budgets["flow"]
        self.modules = FlowModules(sizes)
        self.vq = vq.to(songs.device)
        self.carried = carried_channels(sizes).to(songs.device)[:, None, None]

    def step(self, step: int, rng: np.random.Generator) -> Losses:
        net, budget = self.modules, self.budget
        if not net.norm.counts.item():
            measure_latents(net.norm, self.songs)
        batch, n_codes = budget.crop(step)
        n_latents = n_codes // self.sizes.geometry.codes_per_latent
        latents, codes, start = self.songs.latent_crops(rng, batch, n_latents)
        target = net.norm.normalise(latents)
        noise = torch.randn_like(target) * self.carried
        # spread over the batch: every step sees early and late times
        t = (torch.randperm(batch, device=target.device) + torch.rand(batch, device=target.device)) / batch
        time = t[:, None, None, None]
        x = (1 - (1 - SIGMA_MIN) * time) * noise + time * target
        n_context = np.where(rng.random(batch) < _USE_CONTEXT, rng.integers(1, n_latents // 2 + 1, batch), 0)
        frames = torch.arange(n_latents, device=target.device)
        known = (frames < torch.from_numpy(n_context).to(target.device)[:, None])[:, None, :, None].float()
        conditional = (torch.rand(batch, device=target.device) >= _DROP_CONDITION).float()[:, None, None, None]
        weight, bias = fold_condition(self.vq, net.condition)
        mu = condition_grid(self.vq.codebook(codes) @ weight + bias) * conditional
        velocity = cropped(net.flow, start, n_latents)(torch.cat([x, target * known, mu], dim=1), t)
        error = (velocity - (target - (1 - SIGMA_MIN) * noise)).square() * self.carried * (1 - known)
        per_element = (1 - known).sum() * self.carried.sum() * target.shape[3]
        return {"loss": error.sum() / per_element}
