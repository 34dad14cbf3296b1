"""Files that a command is given or is to write, looked at before any work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lada_rt.errors import AudioError, ParamError

__all__ = ["check_different", "check_source", "check_target"]


def check_source(path: str | os.PathLike[str], what: str) -> None:
    """Raise `AudioError` unless there is a file."""
    # not Path.is_file, which raises where a name is too long or a folder is closed to us
    if not os.path.isfile(path):
        raise AudioError(f"{what}: {path}: no such file; give a WAV, FLAC, OGG or MP3 file")


def check_target(path: Path, what: str, *inputs: object) -> None:
    """Refuse a file of any kind that cannot be written before any work is done.

    Args:
        path: to write; a regular file there is replaced.
        what: name used in messages.
        inputs: which must not be replaced; what is no path could not be.

    Raises:
        ParamError: no such folder, not writable, something other than a file is there, or the output is an input.
    """
    # os.path, as the methods of Path raise where a name is too long or a folder is closed to us
    folder = path.parent
    if not os.path.isdir(folder):
        raise ParamError(f"{what}: {folder}: no such folder; make it first")
    there = os.path.lexists(path)
    regular = os.path.isfile(path) and os.access(path, os.W_OK)
    if not os.access(folder, os.W_OK | os.X_OK) or (there and not regular):
        raise ParamError(f"{what}: {path}: cannot be written; choose another place")
    files = [source for source in inputs if isinstance(source, str | os.PathLike) and os.path.exists(source)]
    if there and any(path.samefile(source) for source in files):
        raise ParamError(f"{what}: {path} is an input; choose another name")


def check_different(targets: Mapping[str, Path | None]) -> None:
    """Refuse two names for one file.

    Args:
        targets: option -> file to write, or None.

    Raises:
        ParamError: two are the same.
    """
    taken: dict[str, str] = {}
    for option, path in targets.items():
        if path is not None and taken.setdefault(os.path.realpath(path), option) != option:
            raise ParamError(f"{option}: {path} is also {taken[os.path.realpath(path)]}; choose another name")
