"""1-d convolutions as 2-d ones of height one, in channels-last memory: the layout GPU matrix units read directly.

cuDNN has that layout for images only. The values are the same up to rounding.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from lada_rt_export.models.stages_mucodec import MelDecoderStage, VocoderStage

__all__ = ["ChannelsLastMelDecoder", "ChannelsLastVocoder", "widened"]

Wide = TypeVar("Wide", nn.Conv2d, nn.ConvTranspose2d)


def _wide_conv(conv: nn.Conv1d) -> nn.Conv2d:
    wide = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        (1, conv.kernel_size[0]),
        padding=(0, int(conv.padding[0])),
        dilation=(1, conv.dilation[0]),
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    return _with_weights(wide, conv)


def _wide_transposed(conv: nn.ConvTranspose1d) -> nn.ConvTranspose2d:
    wide = nn.ConvTranspose2d(
        conv.in_channels,
        conv.out_channels,
        (1, conv.kernel_size[0]),
        stride=(1, conv.stride[0]),
        padding=(0, int(conv.padding[0])),
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    return _with_weights(wide, conv)


def _with_weights(wide: Wide, conv: nn.Conv1d | nn.ConvTranspose1d) -> Wide:
    assert wide.bias is not None
    assert conv.bias is not None
    with torch.no_grad():
        wide.weight.copy_(conv.weight.unsqueeze(2))
        wide.bias.copy_(conv.bias)
        wide.weight.data = wide.weight.data.contiguous(memory_format=torch.channels_last)
    return wide.requires_grad_(False)


def widened(module: nn.Module) -> nn.Module:
    """A copy in which every 1-d convolution is 2-d, for input [B, C, 1, N]."""
    module = copy.deepcopy(module)
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Conv1d):
                setattr(owner, name, _wide_conv(child))
            elif isinstance(child, nn.ConvTranspose1d):
                setattr(owner, name, _wide_transposed(child))
    return module


class ChannelsLastVocoder(nn.Module):
    """`VocoderStage` over images of height one; the same interface."""

    def __init__(self, stage: VocoderStage) -> None:
        super().__init__()
        self.vocoder = widened(stage.vocoder)

    def forward(self, mel: Tensor) -> Tensor:
        """mel float32 [B, 256, F] -> waveform float32 [B, 480 F + 16]."""
        image = mel.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        return self.vocoder(image).flatten(1).float()


class ChannelsLastMelDecoder(nn.Module):
    """`MelDecoderStage` on channels-last maps; the same interface."""

    def __init__(self, stage: MelDecoderStage) -> None:
        super().__init__()
        self.vae = copy.deepcopy(stage.vae)
        for parameter in self.vae.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def forward(self, latents: Tensor) -> Tensor:
        """latents float32 [B, 16, L, 32], un-normalised -> mel float32 [B, 256, 8 L]."""
        image = latents.contiguous(memory_format=torch.channels_last)
        return self.vae(image).squeeze(1).transpose(1, 2).float()
