"""Triton kernels and the torch references that define them.

`sample` and `remask` check their arguments and dispatch by device: Triton on CUDA, C++ (lada_rt._C) on CPU.
"""

from lada_rt_kernels.remask import remask, remask_ref
from lada_rt_kernels.sample import filtered_probs, filtered_probs_ref, sample, sample_ref

__all__ = ["filtered_probs", "filtered_probs_ref", "remask", "remask_ref", "sample", "sample_ref"]
