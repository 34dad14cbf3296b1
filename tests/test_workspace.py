"""What a build keeps beside its bundle, and how the bundle takes its place."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from lada_rt.errors import ExportError
from lada_rt_export import build, workspace
from lada_rt_export.build import build_bundle
from lada_rt_export.workspace import Workspace, locked


def test_source_hashes_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    work = Workspace(tmp_path / "song.bundle")
    first = work.sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "file_sha256", lambda path: pytest.fail("hashed again"))
        assert work.sha256(path) == first == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two!")
    assert work.sha256(path) == hashlib.sha256(b"two!").hexdigest()


def publish(out: Path, text: str) -> None:
    """A build of a bundle that holds one file."""
    work = Workspace(out)
    (work.bundle / "manifest.json").write_text(text)
    work.publish(out)
    assert (out / "manifest.json").read_text() == text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_bundle_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    for text in ("first", "second"):
        publish(tmp_path / "song.bundle", text)
        assert names(tmp_path) == ["song.bundle"]


def test_what_cannot_be_removed_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that an earlier build left, and a folder with a file that is open on a network disk."""
    out = tmp_path / "song.bundle"
    publish(out, "first")
    (tmp_path / "song.bundle.replaced").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "song.bundle.replaced2").mkdir()
    (tmp_path / "song.bundle.replaced2" / ".nfs1").touch()
    remove = shutil.rmtree

    def held(path: Path, **options: Any) -> None:
        if not (path / ".nfs1").exists():
            remove(path, **options)

    monkeypatch.setattr("shutil.rmtree", held)
    for text in ("second", "third"):
        publish(out, text)
        assert names(tmp_path) == ["song.bundle", "song.bundle.replaced", "song.bundle.replaced2"]


def test_a_bundle_that_cannot_take_its_place_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "song.bundle"
    publish(out, "first")
    work = Workspace(out)
    (work.bundle / "manifest.json").write_text("second")
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path == work.bundle:
            raise OSError(16, "Device or resource busy")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        says = rf"cannot take this place \(Device or resource busy\); .* or move {work.bundle} there yourself"
        with pytest.raises(ExportError, match=says):
            work.publish(out)
    assert (out / "manifest.json").read_text() == "first"
    assert names(tmp_path) == ["song.bundle", "song.bundle.building"]
    work.publish(out)
    assert (out / "manifest.json").read_text() == "second"
    assert names(tmp_path) == ["song.bundle"]


def test_a_link_to_another_disk_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "song.bundle"
    link.symlink_to(tmp_path / "disk" / "song.bundle")
    given: list[Path] = []

    class Build:
        def __init__(self, out: Path, *others: Any) -> None:
            self.out = out

        def run(self) -> None:
            given.append(self.out)
            publish(self.out, f"{len(given)}")

    monkeypatch.setattr(build, "_Build", Build)
    for _ in range(3):
        build_bundle(link, source=None)  # type: ignore[arg-type]  # the stand-in looks at none
    assert given == [tmp_path / "disk" / "song.bundle"] * 3
    assert link.is_symlink()
    assert names(tmp_path / "disk") == ["song.bundle"]
    assert names(tmp_path) == ["disk", "song.bundle"]
    with locked(given[0]), pytest.raises(ExportError, match="being built by another process"):
        build_bundle(link, source=None)  # type: ignore[arg-type]


def test_links_in_a_circle_are_no_place(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ExportError, match=r"expected a place for a bundle, got .*; choose another --out"):
        build_bundle(tmp_path / "a", source=None)  # type: ignore[arg-type]
    assert not os.path.exists(tmp_path / "a")
