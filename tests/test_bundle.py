"""Bundles are untrusted: every damage is found, told in one line, and never crashes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lada_rt import BundleError, Pipeline
from lada_rt.bundle import Bundle, demo_bundle_path
from stubs import write_stub_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_stub_bundle(tmp_path / "b")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def load(folder: Path) -> None:
    Bundle.open(folder).verify()


def test_a_good_bundle_opens(folder: Path) -> None:
    load(folder)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        load(tmp_path / "none")
    with pytest.raises(BundleError, match="no manifest"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format_version=2), "newer"),
        (lambda m: m.update(format="other"), "expected format"),
        (lambda m: m.update(format_version="1"), "expected format"),
        (lambda m: m.pop("geometry"), "incomplete"),
        (lambda m: m["geometry"].update(hop_codes=2048), "contradict"),
        (lambda m: m["geometry"].update(sample_rate_hz=-1), "positive"),
        (lambda m: m["geometry"].update(extra=1), "exactly"),
        (lambda m: m["stages"].pop("flow"), "lacks flow"),
        (lambda m: m["files"].pop("tokenizer.json"), "lacks tokenizer"),
        (lambda m: m.update(stages=[]), "incomplete"),
        (lambda m: m["stages"]["flow"]["graph"].update(path="../../etc/passwd"), "leaves the bundle"),
        (lambda m: m["stages"]["flow"]["graph"].update(path="/etc/passwd"), "leaves the bundle"),
        (lambda m: m["stages"]["flow"]["graph"].update(sha256="zz"), "sha256"),
        (lambda m: m["stages"]["flow"]["graph"].update(bytes=-1), "size"),
        (lambda m: m.update(vocab_size="many"), "incomplete"),
        (lambda m: m.update(trained="yes"), "true or false"),
        (lambda m: m.update(max_seconds=1e400), "incomplete"),
        (lambda m: m["stages"]["flow"]["proof"].update(max_rel_error="0.1"), "error as a number"),
        (lambda m: m["stages"]["flow"]["proof"].update(max_rel_error=10**400), "incomplete"),
    ],
)
def test_bad_manifests(folder: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["graphs/flow.onnx", "tokenizer.json", "constants.npz"])
def test_altered_truncated_and_missing_files(folder: Path, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="altered"):
        load(folder)
    path.write_bytes(data[:-1])
    with pytest.raises(BundleError, match=f"expected {len(data)} bytes, got {len(data) - 1}"):
        load(folder)
    path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        load(folder)


def refusal(folder: Path) -> str:
    """The error message of loading; empty when it loads. Any other exception is a failure."""
    try:
        load(folder)
    except BundleError as error:
        return str(error)
    return ""


def test_manifest_damaged_at_random_never_crashes(folder: Path) -> None:
    good = (folder / "manifest.json").read_bytes()
    rng = random.Random(7)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        (folder / "manifest.json").write_bytes(data)
        message = refusal(folder)
        assert "\n" not in message
        refused += bool(message)
    assert refused > 100


def test_the_hash_names_the_content(folder: Path) -> None:
    before = Bundle.open(folder).sha256
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(json.dumps(json.loads(text), indent=7))
    assert Bundle.open(folder).sha256 == before
    edit(folder, lambda m: m.update(note="other"))
    assert Bundle.open(folder).sha256 != before


def test_a_graph_that_is_no_graph(folder: Path) -> None:
    with pytest.raises(BundleError, match="cannot load"):
        Pipeline.load(folder)


def test_the_embedded_bundle_is_whole_and_says_what_it_is() -> None:
    bundle = Bundle.open(demo_bundle_path())
    bundle.verify()
    assert bundle.trained
    assert "procedural generator" in bundle.note
    assert sum(f.bytes for f in bundle.all_files()) < 12e6
