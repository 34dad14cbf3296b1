"""What a bundle is built from: the part of the manifest that is not about files, and stages made one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from lada_rt.geometry import CodecGeometry
from torch import nn

from lada_rt_export.stages import StageSizes

__all__ = ["BundleHeader", "BundleSource"]


@dataclass(frozen=True, slots=True)
class BundleHeader:
    """The part of a manifest that is not about files."""

    name: str
    trained: bool
    note: str
    geometry: CodecGeometry
    vocab_size: int
    mask_id: int
    prefix_dim: int
    max_seconds: int
    ref_chunk_samples: int
    sources: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return data | {"geometry": self.geometry.to_json(), "sources": [dict(s) for s in self.sources]}


class BundleSource(Protocol):
    """Checkpoints, or whatever stands for them."""

    sizes: StageSizes
    tokenizer_json: bytes
    #: [channels, bins] float32
    latent_mean: np.ndarray
    latent_std: np.ndarray

    def header(self, source_hashes: Mapping[Path, str]) -> BundleHeader:
        """The manifest's head, given the sha256 of every source file."""
        ...

    def source_files(self, stage: str | None = None) -> tuple[Path, ...]:
        """Files whose bytes a stage depends on; None: all files."""
        ...

    def facts(self, stage: str) -> dict[str, Any]:
        """Plain data that a stage depends on beside its files."""
        ...

    def module(self, stage: str) -> nn.Module:
        """The stage's float32 module, in eval mode, without gradients."""
        ...

    def parameter_bytes(self, stage: str) -> int:
        """Bytes of a stage's float32 weights, without reading them."""
        ...
