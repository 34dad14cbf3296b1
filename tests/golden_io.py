"""Reading goldens: a sidecar, its tensors, and the small codec they describe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from golden_weights import select_weights
from lada_rt_export.models.flow import Flow, FlowConfig
from lada_rt_export.models.latent_norm import LatentNorm
from lada_rt_export.models.stages_mucodec import FlowStage
from lada_rt_export.models.vq import VQ, VQConfig, condition_linear
from safetensors.torch import load_file
from torch import Tensor


def read_sidecar(case: Path) -> dict[str, Any]:
    return json.loads(case.read_text(encoding="utf-8"))


def read_tensors(case: Path) -> dict[str, Tensor]:
    return load_file(case.with_suffix(".safetensors"))


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `w.`-prefixed tensors under their released keys."""
    return select_weights(tensors, prefix="w.")


def vq_of(config: dict[str, Any], weights: dict[str, Tensor], condition_dim: int = 512) -> VQ:
    """The quantiser of a released-style state dict."""
    vq = VQ(VQConfig(config["input_dim"], config["codebook_size"], config["codebook_dim"], condition_dim))
    state = select_weights(weights, prefix="rvq_muencoder_emb.quantizers.0.", drop=[r"stale_counter"])
    vq.load_state_dict(vq.state_dict() | state)
    return vq.eval()


def flow_stage_of(
    dit: dict[str, Any], rvq: dict[str, Any], weights: dict[str, Tensor], latent_frames: int
) -> tuple[FlowStage, LatentNorm]:
    """The flow stage and latent statistics of a released-style state dict (spec/mucodec 8.1)."""
    condition_weight = weights["cond_muencoder_emb.weight"]
    flow = Flow(
        FlowConfig(
            n_layers=dit["num_layers"],
            n_heads=dit["num_attention_heads"],
            head_dim=dit["attention_head_dim"],
            in_channels=dit["in_channels"],
            out_channels=dit["out_channels"],
            patch=dit["patch_size"],
            latent_frames=latent_frames,
        )
    )
    flow.load_state_dict(select_weights(weights, prefix="cfm_wrapper.estimator."))
    vq = vq_of(rvq, weights, condition_weight.shape[0])
    condition = condition_linear(vq.config)
    condition.load_state_dict(select_weights(weights, prefix="cond_muencoder_emb."))
    norm = LatentNorm()
    norm.load_state_dict(select_weights(weights, prefix="normfeat.", drop=[r"sum_target_x2"]))
    return FlowStage(flow, vq, condition).eval(), norm


def assert_close(found: Any, expected: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=rtol, atol=atol)
