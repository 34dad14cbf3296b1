"""Compiles the Triton kernels for two GPU generations without a GPU; run by test_sample.py in its own process."""

from __future__ import annotations

from typing import Any

import triton
from lada_rt_kernels.remask import _remask_kernel
from lada_rt_kernels.sample import _sample_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SAMPLE_TYPES = {
    "logits_ptr": "*fp32",
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


#: every form in which the launchers of sample.py and remask.py call their kernels, by what differs
SAMPLE_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    # the denoiser's logits are float32; candidates among group maxima
    "float32": ("*fp32", {"SLOTS": 512, "BY_COUNT": True, "BY_MASS": True, "HAS_NOISE": False, "WRITE_PROBS": False}),
    "bfloat16": ("*bf16", {"SLOTS": 512, "BY_COUNT": True, "BY_MASS": True, "HAS_NOISE": False, "WRITE_PROBS": False}),
    "no-count": ("*fp32", {"SLOTS": 0, "BY_COUNT": False, "BY_MASS": True, "HAS_NOISE": True, "WRITE_PROBS": False}),
    "no-filter": ("*fp32", {"SLOTS": 0, "BY_COUNT": False, "BY_MASS": False, "HAS_NOISE": False, "WRITE_PROBS": False}),
    "probs": ("*fp32", {"SLOTS": 0, "BY_COUNT": True, "BY_MASS": True, "HAS_NOISE": False, "WRITE_PROBS": True}),
}
REMASK_FORMS: dict[str, dict[str, Any]] = {
    "noisy": {"BLOCK": 16384, "BY_CONFIDENCE": True, "HAS_TAU": True, "HAS_NOISE": False},
    "plain": {"BLOCK": 1024, "BY_CONFIDENCE": True, "HAS_TAU": False, "HAS_NOISE": False},
    "random": {"BLOCK": 8192, "BY_CONFIDENCE": False, "HAS_TAU": False, "HAS_NOISE": False},
    "recorded": {"BLOCK": 64, "BY_CONFIDENCE": True, "HAS_TAU": True, "HAS_NOISE": True},
}


def lower(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, n_warps: int) -> None:
    source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants)
    options = {"num_warps": n_warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    # A fused multiply-add would round differently from the other implementations.
    assert "fma.rn.f32" not in compiled.asm["ptx"]


for capability in (80, 90):
    for form, (logits, flags) in SAMPLE_FORMS.items():
        if form in ("float32", "probs") or capability == 90:  # the others hold parts of these two
            lower(_sample_kernel, {**SAMPLE_TYPES, "logits_ptr": logits}, {"BLOCK": 16384, **flags}, capability, 16)
            print(f"{_sample_kernel.__name__} {form} {capability}")
    for form, flags in REMASK_FORMS.items():
        lower(_remask_kernel, REMASK_TYPES, flags, capability, 16 if flags["BLOCK"] > 2048 else 4)
        print(f"{_remask_kernel.__name__} {form} {capability}")
