"""What a build keeps beside its bundle."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from lada_rt_export import workspace
from lada_rt_export.workspace import Workspace


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
