"""A network's own tensors out of a released state dict, as the goldens hold them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lada_rt_export.models.mel_vae import DEAD_KEYS, KEY_PREFIX, SCALE_FACTOR_KEY
from torch import Tensor

__all__ = ["mel_vae_state", "select_weights"]


def select_weights(
    tensors: Mapping[str, Tensor], prefix: str = "", drop: Iterable[str] = (), keep: Iterable[str] = (r".*",)
) -> dict[str, Tensor]:
    """The tensors whose key starts with `prefix`, with the prefix stripped.

    Args:
        tensors: key to tensor, as stored.
        prefix: matched at the start only: other groups hold the same word further in.
        drop: regular expressions for whole stripped keys that the network does not read.
        keep: regular expressions for whole stripped keys that belong to the network.

    Returns:
        Stripped key to the same tensor, ready for a strict `load_state_dict`.
    """
    keep_re = [re.compile(p) for p in keep]
    drop_re = [re.compile(p) for p in drop]
    picked: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(prefix):
            continue
        name = key[len(prefix) :]
        if any(p.fullmatch(name) for p in keep_re) and not any(p.fullmatch(name) for p in drop_re):
            picked[name] = tensor
    return picked


def mel_vae_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mel VAE's tensors of audioldm_48k.pth, the scale factor among them."""
    state = select_weights(tensors, KEY_PREFIX, DEAD_KEYS)
    if SCALE_FACTOR_KEY in tensors:
        state[SCALE_FACTOR_KEY] = tensors[SCALE_FACTOR_KEY]
    return state
