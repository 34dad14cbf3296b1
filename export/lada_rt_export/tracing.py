"""What exporters share: example inputs to trace with, and quiet while they talk about themselves."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["quiet", "widened"]


def widened(tensor: Tensor, dims: Mapping[int, str]) -> Tensor:
    """An input [B, ...] with a batch of two in place of one, since a traced size of one is taken for a constant.

    Args:
        tensor: the input.
        dims: its dynamic axes by name; the first is a batch if it is `B`.
    """
    return torch.cat([tensor, tensor]) if dims.get(0) == "B" and tensor.shape[0] == 1 else tensor


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress and warnings of torch's exporters off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
