"""Random weights that keep a network's outputs finite and unsaturated, one tensor at a time.

A tensor depends on the seed and on its own name only, so files can be written in any order and in pieces.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from lada_rt_export.models import muq
from lada_rt_export.models.latent_norm import MIN_COUNTS

__all__ = ["tensor_values"]

_CHUNK: Final = 1 << 22
_COUNTS: Final = 2.0 * MIN_COUNTS

#: (pattern, gain): the deviation of a weight is gain / sqrt(fan-in); the first match counts
_GAINS: Final = tuple(
    (re.compile(pattern), gain)
    for pattern, gain in (
        (r".*vocoder\.conv_pre\.", 0.3),  # log-mel values are around -5
        (r".*vocoder\.ups\.", 1.4),
        (r".*vocoder\.resblocks\.", 0.8),
        (r".*vocoder\.conv_post\.", 0.2),
        (r".*decoder\.conv_out\.", 1.5),
        (r".*\.(o_proj|down_proj)\.", 0.5),
        (r".*to_logits\.", 2.0),
        (r".*(conv_layers|conv\.conv)\.", 1.4),  # rectified
        (r"", 1.0),
    )
)
_EMBEDDING: Final = re.compile(r".*(embed\w*|embeddings|codebook|cls_token)(\.weight)?$|.*token_type_emb")
_NORM: Final = re.compile(r".*(norm\w*|LayerNorm|\.bn\d|batch_norm)\.weight$")
#: (pattern, n): every n consecutive weights sum to zero. Without this the level of the input, which rectifiers pass on,
#: outweighs its changes, and every frame of an encoding becomes the same code.
_CENTRED: Final = (
    (re.compile(r".*conv\.conv\.\d\.conv\d\.weight$"), 9),  # the taps of a filter
    (re.compile(r".*model\.conv\.linear\.weight$"), 32),  # the frequencies of a channel
)
_TABLE: Final = re.compile(r".*scale_shift_table$")


def tensor_values(name: str, shape: tuple[int, ...], seed: int) -> Iterator[NDArray[Any]]:
    """The elements of one tensor of a release, flat and in order, in pieces of at most 4 Mi elements.

    Args:
        name: as stored in its file.
        shape: of the tensor.
        seed: of the whole release.

    Yields:
        One-dimensional little-endian float32 arrays (int64 for batch counters).
    """
    stated = _stated(name, shape, seed)
    if stated is not None:
        yield np.ascontiguousarray(stated).reshape(-1)
        return
    rng = _rng(name, seed)
    scale, offset = _distribution(name, shape)
    group = next((size for pattern, size in _CENTRED if pattern.match(name)), 1)
    n, step = math.prod(shape), _CHUNK // group * group
    for start in range(0, n, step):
        values = rng.standard_normal(min(step, n - start), dtype=np.float32)
        if group > 1:
            values = (values.reshape(-1, group) - values.reshape(-1, group).mean(1, keepdims=True)).reshape(-1)
        values *= np.float32(scale)
        values += np.float32(offset)
        yield values


def _rng(name: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _stated(name: str, shape: tuple[int, ...], seed: int) -> NDArray[Any] | None:
    """Tensors that are not drawn: statistics, counters, constants of the signal path, norms' gains."""
    if name.endswith("num_batches_tracked"):
        return np.full(shape, 1000, dtype=np.int64)
    if name.endswith("running_var"):
        return _rng(name, seed).uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith(".weight_g"):
        # the weight becomes gain * direction; this gain keeps the deviation of the input
        gain = 1.0 if len(shape) == 3 and shape[0] > 1 else 0.5 * math.sqrt(768 / shape[-1])
        return np.full(shape, gain, dtype=np.float32)
    if name == muq.RESAMPLE_KERNEL_KEY:
        kernel: NDArray[Any] = muq.resample_kernel().numpy()
        return kernel
    group, _, leaf = name.rpartition(".")
    if group == "normfeat":
        return _latent_statistics(leaf, shape, seed)
    if leaf == "scale_factor":
        return np.full(shape, 0.5, dtype=np.float32)
    inner = name.removeprefix(muq.KEY_PREFIX)
    if inner == muq.CONSTANT_KEYS["window"]:
        window: NDArray[Any] = torch.hann_window(shape[0]).numpy()
        return window
    if inner == muq.CONSTANT_KEYS["filterbank"]:
        config = muq.MuQConfig(n_fft=2 * (shape[0] - 1), n_mels=shape[1])
        filterbank: NDArray[Any] = muq.MelFrontEnd(config).filterbank.t().contiguous().numpy()
        return filterbank
    if inner == muq.CONSTANT_KEYS["inv_freq"]:
        return (10000.0 ** (-np.arange(shape[0]) / shape[0])).astype(np.float32)
    return None


def _latent_statistics(leaf: str, shape: tuple[int, ...], seed: int) -> NDArray[Any]:
    """Sums over `_COUNTS` samples of latents with deviations around one."""
    if leaf == "counts":
        return np.full(shape, _COUNTS, dtype=np.float32)
    mean = 0.1 * _rng("latent mean", seed).standard_normal(shape)
    deviation = _rng("latent deviation", seed).uniform(0.5, 1.5, shape)
    sums = mean if leaf == "sum_x" else deviation**2 + mean**2
    return (_COUNTS * sums).astype(np.float32)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Deviation and mean of a drawn tensor."""
    if _NORM.match(name):
        return 0.1, 1.0
    if name.endswith("decoder.conv_out.bias"):
        return 0.0, -5.0  # a quiet log-mel
    if name.endswith(("bias", "running_mean")) or (len(shape) < 2 and not _TABLE.match(name)):
        return 0.02, 0.0
    if _TABLE.match(name):
        return 0.3, 0.0
    if _EMBEDDING.match(name):
        return 1.0, 0.0
    gain = next(gain for pattern, gain in _GAINS if pattern.match(name))
    # a transposed convolution spreads each input over kernel / stride = 2 outputs
    fan_in = 2 * shape[0] if ".ups." in name else math.prod(shape[1:])
    return gain / math.sqrt(fan_in), 0.0
