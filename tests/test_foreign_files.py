"""Files from elsewhere that are no files, and versions this program does not know."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lada_rt import BundleError, GenerationParams, ParamError, Pipeline
from lada_rt.bundle import Bundle, file_sha256
from lada_rt.engines.cache import EngineKey, list_engines, write_engine
from lada_rt.errors import EngineError
from lada_rt.saved_run import load_codes, save_codes
from stubs import stub_pipeline, sung, write_stub_bundle

EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_stub_bundle(tmp_path / "b")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = pytest.mark.parametrize("make", [pipe, endless])


def within(seconds: float, call: Callable[[], object]) -> BaseException | None:
    """What `call` raises; a call that hangs fails the test instead of holding it."""
    caught: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            caught.append(None)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert caught, "it hangs"
    return caught[0]


@KINDS
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["tokenizer.json", "constants.npz", "graphs/flow.onnx"])
def test_a_pipe_or_device_in_a_bundle(folder: Path, make: Callable[[Path], None], name: str, verify: bool) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    entries = [manifest["files"][f] for f in manifest["files"]] + [s["graph"] for s in manifest["stages"].values()]
    next(e for e in entries if e["path"] == name).update(bytes=0, sha256=EMPTY_SHA256)  # as its size would be
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / name).unlink()
    make(folder / name)
    error = within(20, lambda: Pipeline.load(folder, verify=verify))
    assert isinstance(error, BundleError)
    assert str(error) == f"{folder / name}: cannot be read (not a regular file); fetch or rebuild the bundle"


@KINDS
def test_a_pipe_or_device_as_manifest(folder: Path, make: Callable[[Path], None]) -> None:
    (folder / "manifest.json").unlink()
    make(folder / "manifest.json")
    error = within(20, lambda: Bundle.open(folder))
    assert isinstance(error, BundleError)
    assert "its manifest.json is not a regular file" in str(error)


def test_links_to_files_are_files(folder: Path, tmp_path: Path) -> None:
    """Download caches keep every file elsewhere."""
    for name in ("manifest.json", "tokenizer.json", "graphs/flow.onnx"):
        moved = (folder / name).rename(tmp_path / Path(name).name)
        (folder / name).symlink_to(moved)
    Bundle.open(folder).verify()


def test_a_manifest_too_long_for_one(folder: Path) -> None:
    with (folder / "manifest.json").open("ab") as file:
        file.write(b" " * (16 << 20))
    with pytest.raises(BundleError, match=r"expected a JSON manifest, ValueError: more than 16777216 bytes"):
        Bundle.open(folder)


def engine_in(folder: Path) -> Path:
    key = EngineKey("flow", "0" * 64, "torch", "1", "cpu-x", "fp32", {"B": (1, 1, 2)})
    package = folder / "package"
    package.write_bytes(b"")
    return write_engine(folder / "engines", key, [package], {"max_rel_error": 0.0}).folder


@KINDS
def test_a_pipe_or_device_as_an_engine(folder: Path, make: Callable[[Path], None]) -> None:
    """What is no engine is left out of the list; one whose files cannot be read is refused."""
    engine = engine_in(folder)
    bundle = Bundle.open(folder)
    (entry,) = list_engines(bundle)
    (engine / "package").unlink()
    make(engine / "package")
    error = within(20, entry.verify)
    assert isinstance(error, EngineError)
    assert "missing or altered" in str(error)
    other = folder / "engines" / "x"
    other.mkdir()
    make(other / "engine.json")
    found: list[Any] = []
    assert within(20, lambda: found.extend(list_engines(bundle))) is None
    assert found == [entry]


@KINDS
def test_what_is_hashed_is_a_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    error = within(20, lambda: file_sha256(tmp_path / "x"))
    assert isinstance(error, OSError)
    assert error.strerror == "not a regular file"


@KINDS
def test_a_pipe_or_device_as_saved_run(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    error = within(20, lambda: load_codes(tmp_path / "x"))
    assert isinstance(error, ParamError)
    assert "not a regular file" in str(error)


@pytest.mark.parametrize("version", [0, -5])
def test_no_bundle_has_such_a_version(folder: Path, version: int) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": version}))
    words = f"expected format 'lada-rt bundle' and a version from 1 on, got 'lada-rt bundle' and {version}; rebuild"
    with pytest.raises(BundleError, match=words):
        Bundle.open(folder)


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, np.ndarray]:
    """The arrays of a saved run."""
    pipeline = stub_pipeline(tmp_path)
    path = tmp_path / "good.npz"
    save_codes(path, pipeline.generate((sung(4800), 48_000), params=GenerationParams(steps=2, flow_steps=1)))
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
        return dict(archive)


def write(path: Path, arrays: dict[str, np.ndarray], **changes: object) -> None:
    meta = json.loads(arrays["meta"].tobytes()) | changes
    np.savez(path, **(arrays | {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}))


def test_a_newer_saved_run_wants_a_newer_program(saved: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Whatever else such a format holds."""
    path = tmp_path / "run.npz"
    newer = f"{path}: saved run of version 2 is newer than this lada-rt reads (1); upgrade lada-rt"
    more = saved | {"mask": saved["codes"]}
    other = {name: array for name, array in saved.items() if name != "prefix"} | {"codes": saved["codes"][:, None]}
    for arrays in (saved, more, other):
        write(path, arrays, format_version=2)
        with pytest.raises(ParamError) as caught:
            load_codes(path)
        assert str(caught.value) == newer
    write(path, saved)
    assert len(load_codes(path).codes) == len(saved["codes"])


@pytest.mark.parametrize("version", [0, -5, True, "2", 1.5, None])
def test_no_saved_run_has_such_a_version(saved: dict[str, np.ndarray], tmp_path: Path, version: object) -> None:
    write(tmp_path / "run.npz", saved, format_version=version)
    with pytest.raises(ParamError, match="something else or damaged"):
        load_codes(tmp_path / "run.npz")


def test_another_format_is_not_a_newer_one(saved: dict[str, np.ndarray], tmp_path: Path) -> None:
    write(tmp_path / "run.npz", saved, format="other", format_version=2)
    with pytest.raises(ParamError, match="something else or damaged"):
        load_codes(tmp_path / "run.npz")
