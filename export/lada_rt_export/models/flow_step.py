"""The flow stage in two parts, so that a solver computes nothing twice.

`FlowPrepare` does what depends on the window or on the step times: condition, in-context and condition patches,
modulation of every block at every step. `FlowStep` does what depends on the state. Together they equal `FlowStage`
up to rounding. Source: mucodec spec 4, 11.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lada_rt_export.models.flow import Block, Flow
from lada_rt_export.models.mucodec_common import Float32Buffers, layer_norm_f32
from lada_rt_export.models.stages_mucodec import FlowStage

__all__ = ["PREPARE_OUTPUTS", "STEP_OUTPUTS", "FlowPrepare", "FlowStep", "split_flow"]

PREPARE_OUTPUTS = ("condition", "modulation", "closing")
STEP_OUTPUTS = ("velocity",)


class FlowPrepare(Float32Buffers):
    """Tables of one window and one set of step times. float32 throughout: it runs once a window."""

    patch_weight: Tensor
    patch_bias: Tensor
    tables: Tensor
    closing_table: Tensor

    def __init__(self, stage: FlowStage) -> None:
        super().__init__()
        flow = stage.flow
        self.stage_condition = _Condition(stage)
        self.adaln_single = flow.adaln_single
        self.patch = flow.config.patch
        state = flow.config.out_channels
        self.register_buffer("patch_weight", flow.pos_embed.proj.weight.detach()[:, state:].float().clone())
        bias = flow.pos_embed.proj.bias
        assert bias is not None
        self.register_buffer("patch_bias", bias.detach().float().clone())
        self.register_buffer("position", flow.pos_embed.table.clone())
        blocks = [_block(block).scale_shift_table.detach().float() for block in flow.transformer_blocks]
        self.register_buffer("tables", torch.stack(blocks))  # [layers, 6, dim]
        self.register_buffer("closing_table", flow.scale_shift_table.detach().float().clone())  # [2, dim]

    def forward(
        self, context: Tensor, codes: Tensor, conditional: Tensor, times: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tables for the steps of one window.

        Args:
            context: float32 [B, 32, L, 32], normalised in-context latents, zero where there are none.
            codes: int64 [B, 2 L].
            conditional: float32 [B], 1 to condition the row, 0 to zero its condition channels.
            times: float32 [N] in [0, 1], the times of the steps.

        Returns:
            condition [B, tokens, dim]: patches of context and condition, with bias and positions;
            modulation [N, layers, 6, dim]; closing [N, 2, dim]. All float32.
        """
        mu = self.stage_condition(codes) * conditional[:, None, None, None]
        patches = F.conv2d(torch.cat([context, mu], dim=1), self.patch_weight, self.patch_bias, stride=self.patch)
        condition = patches.flatten(2).transpose(1, 2) + self.get_buffer("position")
        ada, embedded = self.adaln_single(times)
        modulation = ada.unflatten(1, (1, 6, -1)) + self.tables
        # the un-activated time vector, not `ada`
        return condition, modulation, embedded.unsqueeze(1) + self.closing_table


class _Condition(Float32Buffers):
    """The codes' half of a flow stage, without its estimator."""

    condition = FlowStage.condition

    def __init__(self, stage: FlowStage) -> None:
        super().__init__()
        for name in ("codebook", "condition_weight", "condition_bias"):
            self.register_buffer(name, stage.get_buffer(name))

    def forward(self, codes: Tensor) -> Tensor:
        return self.condition(codes)  # type: ignore[misc]  # the method reads only the three buffers registered above


class StepBlock(nn.Module):
    """A flow block whose modulation comes ready made, its three attention inputs from one product."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.dim = block.dim
        attention = block.attn1
        parts = (attention.to_q, attention.to_k, attention.to_v)
        self.n_heads = attention.n_heads
        self.qkv_weight = nn.Parameter(torch.cat([p.weight.detach() for p in parts]), requires_grad=False)
        self.qkv_bias = nn.Parameter(torch.cat([p.bias.detach() for p in parts]), requires_grad=False)
        self.to_out = attention.to_out[0]
        self.ff = block.ff

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [B, tokens, dim] float32, modulation [6, dim] float32 -> [B, tokens, dim] float32."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(0)
        dtype = self.qkv_weight.dtype
        h = layer_norm_f32(x, self.dim, 1e-6) * (1 + scale1) + shift1
        qkv = F.linear(h.to(dtype), self.qkv_weight, self.qkv_bias).unflatten(2, (3, self.n_heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # [B, heads, tokens, head_dim] each, strided
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.to_out(attended).float()
        h = layer_norm_f32(x, self.dim, 1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.ff(h.to(dtype)).float()


class FlowStep(nn.Module):
    """Velocity of a state at one step of a prepared window. Runs in the dtype of its weights on a float32 stream."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        config = flow.config
        self.patch = config.patch
        weight = flow.pos_embed.proj.weight.detach()
        self.patch_weight = nn.Parameter(weight[:, : config.out_channels].clone(), requires_grad=False)
        self.blocks = nn.ModuleList(StepBlock(_block(block)) for block in flow.transformer_blocks)
        self.proj_out = flow.proj_out
        self.dim = config.dim
        self.grid = config.grid
        self.out_channels = config.out_channels

    def forward(self, x: Tensor, condition: Tensor, modulation: Tensor, closing: Tensor) -> Tensor:
        """One evaluation of the estimator.

        Args:
            x: float32 [B, 32, L, 32], the state.
            condition: float32 [B, tokens, dim], from `FlowPrepare`.
            modulation: float32 [layers, 6, dim], its row for this step.
            closing: float32 [2, dim], its row for this step.

        Returns:
            velocity float32 [B, 32, L, 32].
        """
        patches = F.conv2d(x.to(self.patch_weight.dtype), self.patch_weight, stride=self.patch)
        tokens = patches.flatten(2).transpose(1, 2).float() + condition
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, modulation[index])
        shift, scale = closing.unbind(0)
        tokens = layer_norm_f32(tokens, self.dim, 1e-6) * (1 + scale) + shift
        grid = self.proj_out(tokens.to(self.proj_out.weight.dtype)).float()
        p, (rows, cols) = self.patch, self.grid
        # feature (p * 2 + q) * 32 + c goes to channel c, frame 2 row + p, frequency 2 col + q
        grid = grid.reshape(-1, rows, cols, p, p, self.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, rows * p, cols * p)


def _block(module: nn.Module) -> Block:
    assert isinstance(module, Block)
    return module


def split_flow(stage: FlowStage) -> tuple[FlowPrepare, FlowStep]:
    """The two parts of a flow stage, in eval mode.

    They share the small modules with the stage, and copy the attention weights: let the stage go afterwards.
    """
    prepare, step = FlowPrepare(stage), FlowStep(stage.flow)
    return prepare.eval().requires_grad_(False), step.eval().requires_grad_(False)
