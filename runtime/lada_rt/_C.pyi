"""CPU kernels (csrc/). Wrong arguments raise lada_rt.errors.ParamError."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

MAX_VOCAB: int

def sample(
    logits: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16],
    positions: NDArray[np.int64],
    *,
    seed: int,
    step: int,
    top_k: int,
    top_p: float,
    temperature: float,
    exp_noise: NDArray[np.float32] | None = None,
    n_threads: int = 0,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Draw one token per row of logits [R, V]; uint16 holds bfloat16 bits.

    positions [R] are absolute frames. top_k 0 and top_p >= 1 are off. Returns tokens [R] and the natural
    logarithm of each token's probability in the filtered, renormalised, temperature-scaled distribution [R].
    """

def filtered_probs(
    logits: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16],
    *,
    top_k: int,
    top_p: float,
    temperature: float,
    n_threads: int = 0,
) -> NDArray[np.float32]:
    """Probabilities [R, V] of the distribution that `sample` draws from; removed tokens are 0."""

def remask(
    codes: NDArray[np.int64],
    rows: NDArray[np.int64],
    tokens: NDArray[np.int32],
    log_confidence: NDArray[np.float32],
    *,
    n_masked: int,
    tau: float,
    strategy: Literal["low_confidence", "random", "fixed_position"] | str,
    mask_id: int,
    seed: int,
    step: int,
    noise: NDArray[np.float32] | None = None,
) -> NDArray[np.int64]:
    """Commit tokens into codes [T] in place; returns the rows [n_masked] that stay masked, ascending.

    rows [R] are the masked positions, strictly ascending; noise [T] is indexed by position.
    """

def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """One Philox4x32-10 block: four counter words and two key words to four words."""

def philox_normal(seed: int, window: int, shape: Sequence[int]) -> NDArray[Any]:
    """Standard normals, float32, of one window of the flow decoder."""
