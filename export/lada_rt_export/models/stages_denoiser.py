"""The denoiser stage: the mask predictor as a graph whose inputs are the runtime's."""

from __future__ import annotations

import torch
from lada_rt.errors import ParamError
from torch import Tensor, nn

from lada_rt_export.models.mask_predictor import MaskPredictor, rope_tables

__all__ = ["MAX_POSITIONS", "DenoiserStage"]

#: 360 s of codes (the codec's limit: 9001 frames) and two prefix slots
MAX_POSITIONS = 9003


class DenoiserStage(nn.Module):
    """One denoiser evaluation for the frames that are still masked.

    Rotary tables are constants of the graph: cosine and sine of thousands of radians are a place where a GPU
    backend may use fast approximations, and a table costs 2 MB.

    Source: spec/lada_band.md, export notes of section h.
    """

    def __init__(self, mask_predictor: MaskPredictor, max_positions: int = MAX_POSITIONS) -> None:
        super().__init__()
        if max_positions < 1:
            raise ParamError(f"max_positions must be 1 or more, got {max_positions}; use {MAX_POSITIONS}")
        self.mask_predictor = mask_predictor
        self.max_positions = max_positions
        config = mask_predictor.config
        device = mask_predictor.to_logits.weight.device
        cos, sin = rope_tables(max_positions, config.head_dim, config.rope_theta, device)
        # Made in float32; a cast of the whole stage then rounds finished cosines, never an angle.
        dtype = mask_predictor.to_logits.weight.dtype
        self.register_buffer("rope_cos", cos.to(dtype), persistent=False)
        self.register_buffer("rope_sin", sin.to(dtype), persistent=False)

    def forward(self, vocal_codes: Tensor, codes: Tensor, prefix: Tensor, rows: Tensor) -> Tensor:
        """Logits of the given frames.

        Args:
            vocal_codes: [1, T] int64.
            codes: [1, T] int64, mask id where undecided.
            prefix: [1, P, condition_size] float32, P = 0..2, P + T <= max_positions.
            rows: [R] int64, frame indices 0..T-1, R >= 1.

        Returns:
            [R, V] float32.
        """
        rope = (self.get_buffer("rope_cos"), self.get_buffer("rope_sin"))
        logits = self.mask_predictor(vocal_codes, codes, prefix, rows=rows, rope=rope)  # [1, R, V]
        return logits.squeeze(0).to(torch.float32)
