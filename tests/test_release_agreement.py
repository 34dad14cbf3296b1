"""Sizes that no tensor's shape shows, and networks that contradict one another: refused before any work, in a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lada_rt import cli
from lada_rt.errors import CheckpointError
from lada_rt.geometry import CodecGeometry
from lada_rt_export.demo.source import _about
from lada_rt_export.models.mert import MertConfig
from lada_rt_export.release import Release
from lada_rt_export.release_agreement import check_codec, check_conditions
from lada_rt_export.release_modules import ReleaseSource
from lada_rt_export.release_sizes import SIZES_FILE, ReleaseSizes
from lada_rt_export.synthetic_release import SCALES, SyntheticRelease, write_synthetic_release


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRelease:
    return write_synthetic_release(tmp_path_factory.mktemp("release"), "tiny", seed=5)


@pytest.fixture
def spoiled(tiny: SyntheticRelease, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Copies the release with some of its stated sizes replaced; (checkpoint, pretrained root)."""

    def spoil(sizes: dict[str, Any], mert: dict[str, Any] | None = None) -> tuple[Path, Path]:
        folder = shutil.copytree(tiny.checkpoint.parent, tmp_path / "copy", symlinks=True)
        root = folder / tiny.pretrained_root.name
        for path, changes in ((folder / SIZES_FILE, sizes), (root / "MERT-v1-95M" / "config.json", mert or {})):
            stated = json.loads(path.read_text())
            for name, value in changes.items():
                stated[name] = stated.get(name, {}) | value if isinstance(value, dict) else value
            path.write_text(json.dumps(stated))
        return folder / tiny.checkpoint.name, root

    return spoil


@pytest.mark.parametrize(
    ("sizes", "mert", "says"),
    [
        ({"flow": {"latent_frames": 256}}, None, "flow.latent_frames to be 512, got 256"),
        ({"flow": {"latent_frames": 1 << 20}}, None, "flow.latent_frames to be 512"),
        ({"flow": {"frequencies": 64}}, None, "flow.frequencies to be 32"),
        ({"vocoder": {"rates": [6, 5, 4, 2, 1]}}, None, "the product of vocoder.rates to be 480, got 240"),
        ({"muq": {"hop_samples": 480}}, None, "muq.hop_samples to be 240"),
        ({"muq": {"sample_rate": 48000}}, None, "muq.sample_rate to be 24000"),
        ({"muq": {"mel_std": 0}}, None, "mel_std must be above 0"),
        ({}, {"conv_stride": [5, 5, 5, 5, 5, 5, 5]}, "leave a frame of 720 samples"),
    ],
    ids=str,
)
def test_what_no_shape_shows_is_refused_by_the_command(
    spoiled: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    sizes: dict[str, Any],
    mert: dict[str, Any] | None,
    says: str,
) -> None:
    checkpoint, root = spoiled(sizes, mert)
    out = tmp_path / "song.bundle"
    options = ["--checkpoint", checkpoint, "--pretrained-root", root, "--out", out]
    assert cli.run([str(a) for a in ("build-engine", *options)]) == CheckpointError.exit_code
    printed, messages = capfd.readouterr()
    assert printed == ""
    lines = messages.splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert not out.exists()


def test_the_releases_agree(tiny: SyntheticRelease) -> None:
    for scale in SCALES.values():
        check_codec(scale.sizes, CodecGeometry())
    check_codec(ReleaseSizes(), CodecGeometry())
    ReleaseSource(Release.locate(tiny.checkpoint, tiny.pretrained_root))


@pytest.mark.parametrize(
    ("network", "changes", "says"),
    [
        ("vq", {"codebook_size": 1024}, "mask_predictor.n_codes to be 1024, got 16384"),
        ("mask_predictor", {"n_vocal_codes": 512}, "n_vocal_codes to be 16384"),
        ("clamp3_text", {"output_size": 48}, "clamp3_text.output_size"),
        ("clamp3_audio", {"output_size": 48}, "clamp3_audio.output_size"),
        ("clamp3_audio", {"hidden_size": 48 * 12}, "which is MERT's"),
        ("clamp3_text", {"max_positions": 129}, "130 or more, got 129"),
        ("mert", {"conv_strides": (5, 5, 5, 5, 5, 5, 5)}, "leave a frame"),
    ],
)
def test_networks_that_contradict_each_other(network: str, changes: dict[str, Any], says: str) -> None:
    full = SCALES["full"]
    configs: dict[str, Any] = {
        "mask_predictor": full.denoiser,
        "vq": full.sizes.vq,
        "clamp3_text": full.sizes.clamp3_text,
        "clamp3_audio": full.sizes.clamp3_audio,
        "mert": MertConfig(),
    }
    check_conditions(configs)
    with pytest.raises(CheckpointError, match=says) as caught:
        check_conditions(configs | {network: replace(configs[network], **changes)})
    assert "\n" not in str(caught.value)


def test_a_header_of_trained_weights_may_hold_anything() -> None:
    assert _about("[" * 100_000) == _about("nothing") == _about("[1]") == {}
