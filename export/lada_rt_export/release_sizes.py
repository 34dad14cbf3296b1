"""Sizes of the released networks, and how another set of sizes is read from `lada_rt_sizes.json`.

Shapes alone do not tell head counts, norm groups or dilations, so a release of other sizes carries this small
file beside its LaDA-Band checkpoint. What shows in the tensors' shapes is compared with them when a network is read,
what the networks must agree on by `release_agreement`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from lada_rt.errors import CheckpointError, ParamError

from lada_rt_export.models.clamp3 import Clamp3AudioConfig, Clamp3TextConfig
from lada_rt_export.models.flow import FlowConfig
from lada_rt_export.models.mask_predictor import MaskPredictorConfig
from lada_rt_export.models.mel_vae import MelVAEConfig
from lada_rt_export.models.muq import MuQConfig
from lada_rt_export.models.vocoder import VocoderConfig
from lada_rt_export.models.vq import VQConfig

__all__ = ["SIZES_FILE", "ReleaseSizes", "read_json"]

SIZES_FILE: Final = "lada_rt_sizes.json"
_MAX_JSON_BYTES: Final = 64 << 20
#: no real network comes near; a larger number is a typing error or an attack
_MAX_SIZE: Final = 1 << 20
#: what is counted in modules, each of which is made before the tensors are looked at
_MAX_MODULES: Final = 256

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReleaseSizes:
    """Configurations of the networks whose sizes no released file states; MERT's are in its own config.json.

    `mask_predictor` None means: one of the two released sizes, told apart by the width of the embeddings.
    """

    mask_predictor: MaskPredictorConfig | None = None
    clamp3_text: Clamp3TextConfig = field(default_factory=Clamp3TextConfig)
    clamp3_audio: Clamp3AudioConfig = field(default_factory=Clamp3AudioConfig)
    muq: MuQConfig = field(default_factory=MuQConfig)
    vq: VQConfig = field(default_factory=VQConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    mel_vae: MelVAEConfig = field(default_factory=MelVAEConfig)
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads back equal."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, source: str) -> ReleaseSizes:
        """Read sizes; networks and fields that are left out keep the released values.

        Args:
            data: parsed JSON: network name -> {field: value}.
            source: the file, for the error message.

        Raises:
            CheckpointError: an unknown name, a value of the wrong type, or sizes that contradict each other.
        """
        makers: dict[str, Callable[..., Any]] = {
            "mask_predictor": MaskPredictorConfig,
            "clamp3_text": Clamp3TextConfig,
            "clamp3_audio": Clamp3AudioConfig,
            "muq": MuQConfig,
            "vq": VQConfig,
            "flow": FlowConfig,
            "mel_vae": MelVAEConfig,
            "vocoder": VocoderConfig,
        }
        if not isinstance(data, dict) or not data.keys() <= makers.keys():
            found = sorted(map(ascii, data.keys() - makers.keys())) if isinstance(data, dict) else type(data).__name__
            raise CheckpointError(
                f"{source}: expected sizes of {', '.join(makers)}, got {found}; correct or delete the file"
            )
        made = {
            name: _config(makers[name], values, f"{source}: {name}")
            for name, values in data.items()
            if values is not None
        }
        return cls(**made)


def _config(make: Callable[..., T], values: Any, source: str) -> T:
    template = make()
    known = {f.name: getattr(template, f.name) for f in fields(template)}  # type: ignore[arg-type]  # a dataclass
    if not isinstance(values, Mapping) or not values.keys() <= known.keys():
        raise CheckpointError(
            f"{source}: expected fields among {', '.join(known)}, got {ascii(values)[:200]}; correct it"
        )
    taken: dict[str, Any] = {}
    for name, value in values.items():
        taken[name] = _like(known[name], value, f"{source}.{name}")
        if name in ("n_layers", "n_res_blocks") and taken[name] > _MAX_MODULES:
            raise CheckpointError(f"{source}.{name}: expected at most {_MAX_MODULES}, got {value}; correct the sizes")
    try:
        return make(**taken)
    except ParamError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except ZeroDivisionError as error:
        raise CheckpointError(f"{source}: expected no zero among sizes that divide others; correct them") from error


def _like(template: Any, value: Any, source: str) -> Any:
    """`value` in the type of `template`; lists become tuples."""
    if isinstance(template, tuple) and isinstance(value, (list, tuple)) and 0 < len(value) <= 16:
        return tuple(_like(template[0], item, source) for item in value)
    if isinstance(template, bool) or isinstance(value, bool):
        right = isinstance(template, bool) and isinstance(value, bool)
    elif isinstance(template, float):
        right = isinstance(value, (int, float)) and abs(value) < 1e9
    else:
        right = isinstance(template, int) and isinstance(value, int) and 0 <= value <= _MAX_SIZE
    if not right:
        raise CheckpointError(
            f"{source}: expected a value like {template!r}, got {ascii(value)[:80]}; correct the sizes"
        )
    return float(value) if isinstance(template, float) else value


def read_json(path: Path) -> Any:
    """Parse an untrusted JSON file.

    Raises:
        CheckpointError: it cannot be read, is larger than 64 MiB, or is no JSON.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = ascii(str(error))[1:-1][:200]
        raise CheckpointError(f"{path}: expected a JSON file, got: {reason}; download the file again") from error
