"""Stage modules made ready for a device: precision, layout, the flow in two parts, compiled blocks."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from lada_rt.engines.torch import TorchEngine
from lada_rt.errors import ParamError
from torch import nn

from lada_rt_export.models.channels_last import ChannelsLastMelDecoder, ChannelsLastVocoder
from lada_rt_export.models.flow_step import PREPARE_OUTPUTS, STEP_OUTPUTS, split_flow
from lada_rt_export.models.stages_denoiser import DenoiserStage
from lada_rt_export.models.stages_mucodec import FlowStage, MelDecoderStage, VocoderStage
from lada_rt_export.stages import DTYPES

__all__ = ["StagePart", "compile_blocks", "part_engine", "stage_parts"]


@dataclass(frozen=True, slots=True)
class StagePart:
    """A module that becomes one engine, in eval mode on its device.

    Attributes:
        name: of the stage, or `flow_prepare` and `flow_step`.
        module: its forward arguments are the inputs.
        outputs: names of its results.
    """

    name: str
    module: nn.Module
    outputs: tuple[str, ...]


def stage_parts(
    name: str,
    module: nn.Module,
    outputs: tuple[str, ...],
    *,
    precision: str,
    device: torch.device,
    copy_module: bool = True,
) -> list[StagePart]:
    """Rearrange a stage for a device.

    The residual stream of the flow, every norm and softmax stay float32 at any precision, and so does all of
    `flow_prepare`: it runs once a window. Convolutions on a GPU get channels-last memory.

    Args:
        name: of the stage.
        module: the stage module, float32.
        outputs: names of its results.
        precision: of the weights: `fp32`, `bf16` or `fp16`.
        device: where it will run.
        copy_module: False consumes `module`, which saves a copy of its weights.

    Raises:
        ParamError: an unknown precision.
    """
    if precision not in DTYPES:
        raise ParamError(f"precision: expected one of {', '.join(DTYPES)}, got {precision!r}")
    module = (copy.deepcopy(module) if copy_module else module).to(device)
    dtype = DTYPES[precision]
    if isinstance(module, FlowStage):
        prepare, step = split_flow(module)
        return [
            StagePart("flow_prepare", prepare, PREPARE_OUTPUTS),
            StagePart("flow_step", step.to(dtype), STEP_OUTPUTS),
        ]
    module = module.to(dtype)
    if device.type == "cuda" and isinstance(module, VocoderStage):
        module = ChannelsLastVocoder(module)
    elif device.type == "cuda" and isinstance(module, MelDecoderStage):
        module = ChannelsLastMelDecoder(module)
    return [StagePart(name, module.eval().requires_grad_(False), outputs)]


def compile_blocks(module: nn.Module) -> None:
    """Compile the repeated blocks of a denoiser or flow step in place; all blocks share one compilation.

    The denoiser's last layer stays as it is: its row count differs at every step. Other modules are left alone.
    """
    if isinstance(module, DenoiserStage):
        for layer in module.mask_predictor.lm.layers[:-1]:
            layer.compile(dynamic=True)
    for block in getattr(module, "blocks", ()):
        block.compile(dynamic=False)


def part_engine(part: StagePart, device: torch.device) -> TorchEngine:
    """The part as an engine of the runtime, without compiling a package; as exact as one."""
    n_bytes = sum(t.numel() * t.element_size() for t in (*part.module.parameters(), *part.module.buffers()))
    return TorchEngine(part.module, part.outputs, device, name=part.name, n_bytes=n_bytes, exact=True)
