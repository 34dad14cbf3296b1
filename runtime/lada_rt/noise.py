"""Random numbers outside the kernels: Philox flow noise, and the released program's seeds and noises.

Production noise is counter-based (Philox4x32-10) and drawn inside the kernels. The released program instead
derives one generator per song, step and purpose from a hash; those noises are kept here, so that a run can be
matched step by step: pass them to the sampler as recorded noise. Source: spec/lada_band.md d.6.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lada_rt import _C
from lada_rt.errors import ParamError

__all__ = [
    "flow_noise",
    "released_fixed_position",
    "released_gumbel",
    "released_remask_noise",
    "released_uniform",
    "sample_seed",
    "stable_seed",
]

_GUMBEL_SALT = "low_confidence_remask"
_UNIFORM_SALT = "random_remask"
_FIXED_SALT = "fixed_position"


def flow_noise(seed: int, window: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal start noise of one decoder window.

    Element i, in C order, depends only on (seed, window, i): Philox counter (i // 4, window, 0, 2), whose
    four words make two Box-Muller pairs. The bits are the same on every machine.

    Args:
        seed: any integer; its low 64 bits are the key.
        window: index of the window in the song, 0 <= window < 2**32.
        shape: the shape to fill.

    Returns:
        float32 of that shape.

    Raises:
        ParamError: window or shape is out of range.
    """
    return _C.philox_normal(seed, window, [int(n) for n in shape])


def _hash_u64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def sample_seed(seed: int, song_id: str) -> int:
    """Seed of the released program's global generators for one song, in [0, 2**31 - 1).

    Source: spec/lada_band.md d.6.
    """
    return _hash_u64(f"{seed}|{song_id}") % (2**31 - 1)


def stable_seed(seed: int | None, sequence_id: str | None, step: int, salt: str) -> int:
    """Seed of the released program's noise for one song, step (0-based) and purpose, in [0, 2**63 - 1).

    A missing seed counts as 0, a missing or empty id as `unknown`. Source: spec/lada_band.md d.6.
    """
    return _hash_u64(f"{seed or 0}|{sequence_id or 'unknown'}|{step}|{salt}") % (2**63 - 1)


def _mersenne_uniform(seed: int, n_frames: int) -> NDArray[np.float32]:
    if n_frames < 0:
        raise ParamError(f"expected a frame count >= 0, got {n_frames}; pass the length of the sequence")
    # RandomState seeds with init_genrand, and a full-range draw returns the generator's 32-bit outputs in
    # order.
    words = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, size=n_frames, dtype=np.uint32)
    return ((words & 0xFFFFFF).astype(np.float64) * 2.0**-24).astype(np.float32)


def released_gumbel(seed: int | None, sequence_id: str | None, step: int, n_frames: int) -> NDArray[np.float32]:
    """The released program's Gumbel noise of one low-confidence step, float32 [n_frames].

    Source: spec/lada_band.md d.6.
    """
    u = _mersenne_uniform(stable_seed(seed, sequence_id, step, _GUMBEL_SALT), n_frames)
    u[u == 0] = np.float32(1e-20)
    return -np.log(-np.log(u))


def released_uniform(seed: int | None, sequence_id: str | None, step: int, n_frames: int) -> NDArray[np.float32]:
    """The released program's uniform scores of one `random` step, float32 [n_frames] in [0, 1).

    Source: spec/lada_band.md d.6.
    """
    return _mersenne_uniform(stable_seed(seed, sequence_id, step, _UNIFORM_SALT), n_frames)


def released_fixed_position(seed: int | None, sequence_id: str | None, n_frames: int) -> NDArray[np.float32]:
    """The released program's `fixed_position` scores, float32 [n_frames], the same at every step.

    Source: spec/lada_band.md d.6.
    """
    prefix = f"{seed or 0}|{sequence_id or 'unknown'}"
    scores = [_hash_u64(f"{prefix}|{t}|{_FIXED_SALT}") / float(2**64 - 1) for t in range(n_frames)]
    return np.array(scores, dtype=np.float64).astype(np.float32)


def released_remask_noise(
    strategy: str, seed: int | None, sequence_id: str | None, step: int, n_frames: int
) -> NDArray[np.float32]:
    """The released program's remask noise of one step, in the form `remask(noise=...)` takes it.

    Args:
        strategy: low_confidence, random or fixed_position.
        seed: the run's global seed; None counts as 0.
        sequence_id: song id; None or empty counts as `unknown`.
        step: 0-based step index.
        n_frames: length of the sequence.

    Returns:
        float32 [n_frames], indexed by position.

    Raises:
        ParamError: the strategy has no noise of its own.
    """
    if strategy == "low_confidence":
        return released_gumbel(seed, sequence_id, step, n_frames)
    if strategy == "random":
        return released_uniform(seed, sequence_id, step, n_frames)
    if strategy == "fixed_position":
        return released_fixed_position(seed, sequence_id, n_frames)
    raise ParamError(f"expected strategy low_confidence, random or fixed_position, got {strategy!r}; use one of these")
