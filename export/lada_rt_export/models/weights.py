"""Pick a network's own tensors out of a released state dict."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

__all__ = ["select_weights"]


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
