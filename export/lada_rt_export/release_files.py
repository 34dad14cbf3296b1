"""Find the files of a release on disk. Source: spec/mucodec.md 8 and 13, spec/clamp3.md 7."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from lada_rt.errors import CheckpointError

__all__ = ["CLAMP3_FILE", "HUB_FOLDERS", "ReleaseFiles", "find_release_files"]

CLAMP3_FILE: Final = (
    "weights_clamp3_saas_h_size_768_t_model_FacebookAI_xlm-roberta-base_t_length_128_a_size_768_a_layers_12_"
    "a_length_128_s_size_768_s_layers_12_p_size_64_p_length_512.pth"
)
#: the published layout's name, and the one the model's id gives today
HUB_FOLDERS: Final = ("models--xlm-roberta-base", "models--FacebookAI--xlm-roberta-base")


@dataclass(frozen=True, slots=True)
class ReleaseFiles:
    """One path for each file that a build reads."""

    checkpoint: Path
    mucodec: Path
    muq: Path
    audioldm: Path
    clamp3: Path
    mert_config: Path
    mert_preprocessor: Path
    mert_weights: Path
    tokenizer: Path

    def all(self) -> tuple[Path, ...]:
        """Every path, for hashing."""
        return tuple(getattr(self, f.name) for f in fields(self))


def find_release_files(checkpoint: Path, root: Path, tokenizer: Path | None) -> ReleaseFiles:
    """Look for every file of the released layout, and for the places where its parts are published.

    Args:
        checkpoint: the LaDA-Band checkpoint.
        root: the pretrained root.
        tokenizer: explicit tokenizer.json or its folder; None searches the hub cache layout under the root.

    Raises:
        CheckpointError: files are missing; each is listed with where it was looked for.
    """
    mert = root / "MERT-v1-95M"
    candidates: dict[str, list[Path]] = {
        "checkpoint": [checkpoint],
        "mucodec": _under(
            root, "mucodec/mucodec.pt", "mucodec/mucodec.safetensors", "mucodec/ckpt/mucodec.pt", "mucodec.pt"
        ),
        "muq": _under(root, "mucodec/muq.pt", "mucodec/muq_dev/muq.pt", "muq.pt"),
        "audioldm": _under(root, "mucodec/audioldm_48k.pth", "mucodec/tools/audioldm_48k.pth", "audioldm_48k.pth"),
        "clamp3": _clamp3(root),
        "mert_config": [mert / "config.json"],
        "mert_preprocessor": [mert / "preprocessor_config.json"],
        "mert_weights": [mert / "model.safetensors", mert / "pytorch_model.bin"],
        "tokenizer": _tokenizer(root, tokenizer),
    }
    found: dict[str, Path] = {}
    missing: list[str] = []
    for name, paths in candidates.items():
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            missing.append(" or ".join(str(p) for p in paths))
        else:
            found[name] = path
    if missing:
        raise CheckpointError(
            f"expected {len(candidates)} release files, {len(missing)} missing: {'; '.join(missing)}; "
            "download them, or point --checkpoint and --pretrained-root at the right folders"
        )
    return ReleaseFiles(**found)


def _under(root: Path, *names: str) -> list[Path]:
    return [root / name for name in names]


def _clamp3(root: Path) -> list[Path]:
    """The published name; else a single other weights file beside it, since the name only lists sizes."""
    others = sorted(p for p in _children(root / "clamp3") if p.suffix in (".pth", ".safetensors"))
    return [root / "clamp3" / CLAMP3_FILE, *(others if len(others) == 1 else [])]


def _tokenizer(root: Path, given: Path | None) -> list[Path]:
    if given is not None:
        return [given / "tokenizer.json" if given.is_dir() else given]
    paths: list[Path] = []
    for folder in HUB_FOLDERS:
        for cache in (root / "hub", root):
            paths.extend(_snapshot(cache / folder))
    # what a plain download of the folder gives
    return [*paths, root / "xlm-roberta-base" / "tokenizer.json"]


def _snapshot(cache: Path) -> list[Path]:
    """tokenizer.json of the revision that refs/main names, else of the only snapshot."""
    try:
        revision = (cache / "refs" / "main").read_text(encoding="ascii")[:200].strip()
    except (OSError, ValueError):
        revision = ""
    snapshots = cache / "snapshots"
    if not re.fullmatch(r"\w[\w.-]*", revision):  # a revision is one folder name, never a path
        present = [p.name for p in _children(snapshots) if p.is_dir()]
        revision = present[0] if len(present) == 1 else "<revision>"
    return [snapshots / revision / "tokenizer.json"]


def _children(folder: Path) -> Iterable[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
