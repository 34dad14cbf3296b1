"""Compiles the Triton kernels for two GPU generations without a GPU; run by test_sample.py in its own process."""

from __future__ import annotations

from typing import Any

import triton
from lada_rt_kernels.remask import _remask_kernel
from lada_rt_kernels.sample import _sample_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SAMPLE_TYPES = {
    "logits_ptr": "*bf16",
    "positions_ptr": "*i64",
    "noise_ptr": "*fp32",
    "tokens_ptr": "*i32",
    "confidence_ptr": "*fp32",
    "probs_ptr": "*fp32",
    "row_stride": "i32",
    "vocab": "i32",
    "top_k": "i32",
    "top_p": "fp32",
    "inv_temperature": "fp32",
    "seed_lo": "i32",
    "seed_hi": "i32",
    "step": "i32",
}
REMASK_TYPES = {
    "codes_ptr": "*i64",
    "rows_ptr": "*i64",
    "tokens_ptr": "*i32",
    "confidence_ptr": "*fp32",
    "noise_ptr": "*fp32",
    "rows_next_ptr": "*i64",
    "n_rows": "i32",
    "n_masked": "i32",
    "tau": "fp32",
    "mask_id": "i32",
    "seed_lo": "i32",
    "seed_hi": "i32",
    "step": "i32",
}


def lower(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> None:
    source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants)
    options = {"num_warps": 16, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    # A fused multiply-add would round differently from the other implementations.
    assert "fma.rn.f32" not in compiled.asm["ptx"]


for capability in (80, 90):
    flags = {"BY_COUNT": True, "BY_MASS": True, "HAS_NOISE": False, "WRITE_PROBS": False}
    lower(_sample_kernel, SAMPLE_TYPES, {"BLOCK": 16384, "SLOTS": 512, **flags}, capability)
    print("sample", capability)
    flags = {"BY_CONFIDENCE": True, "HAS_TAU": True, "HAS_NOISE": False}
    lower(_remask_kernel, REMASK_TYPES, {"BLOCK": 16384, **flags}, capability)
    print("remask", capability)
