"""The folder a bundle is built in: one process at a time, finished stages kept, source hashes remembered.

<out>.building.lock      held by the process that builds
<out>.building/bundle/   becomes <out>
<out>.building/state/    <stage>.json: what a finished stage was made from, and its manifest entry; hashes.json
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from lada_rt.bundle import FileEntry, StageEntry, file_sha256, parse_stage
from lada_rt.errors import ExportError, LadaError

__all__ = ["Workspace", "available_memory", "check_disk", "check_memory", "locked", "take"]

_META_BYTES: Final = 64 << 20


class Workspace:
    """`<out>.building` and what is known about it. Make one inside `locked(out)`."""

    def __init__(self, out: Path) -> None:
        self.root = out.with_name(out.name + ".building")
        self.bundle = self.root / "bundle"
        self.state = self.root / "state"
        try:
            self.bundle.mkdir(parents=True, exist_ok=True)
            self.state.mkdir(exist_ok=True)
        except OSError as error:
            raise ExportError(f"{self.root}: cannot be created ({error.strerror}); choose another --out") from error

    def finished(self, stage: str, key: str) -> StageEntry | None:
        """The entry of a stage that was finished for `key`, its files checked byte by byte; None to build it."""
        try:
            record = json.loads((self.state / f"{stage}.json").read_text(encoding="utf-8"))
            entry = parse_stage(stage, record["entry"]) if record["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError, LadaError):
            return None
        return entry if entry is not None and self._intact(entry.files, self.bundle) else None

    def finish(self, entry: StageEntry, key: str) -> None:
        """Remember a stage whose files are complete."""
        for file in entry.files:
            _sync(self.bundle / file.path)
        self._write(f"{entry.name}.json", {"key": key, "entry": entry.to_json()})

    def adopt(self, entry: StageEntry, key: str, folder: Path) -> bool:
        """Take a stage's files from an older bundle in `folder`. False if they are not what its manifest says."""
        if not self._intact(entry.files, folder):
            return False
        self.forget(stage=entry.name)
        for file in entry.files:
            take(folder / file.path, self.bundle / file.path)
        self.finish(entry, key)
        return True

    def forget(self, stage: str) -> None:
        """Drop what an interrupted build left of a stage."""
        (self.state / f"{stage}.json").unlink(missing_ok=True)
        for leftover in (self.bundle / "graphs").glob(f"{stage}.*"):
            leftover.unlink()

    def sha256(self, path: Path) -> str:
        """Hash of a source file, remembered by path, size and time as long as the build is not finished."""
        known = self._hashes()
        if not self.remembers(path):
            known[str(path)] = [*_fact(path), file_sha256(path)]
            self._write("hashes.json", known)
        return str(known[str(path)][-1])

    def remembers(self, path: Path) -> bool:
        """Whether `sha256` of a file costs nothing."""
        return bool(self._hashes().get(str(path), [None])[:-1] == _fact(path))

    def _hashes(self) -> dict[str, Any]:
        try:
            known = json.loads((self.state / "hashes.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) and all(isinstance(v, list) for v in known.values()) else {}

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        path = self.state / name
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(data), encoding="utf-8")
        _sync(temporary)
        temporary.replace(path)

    @staticmethod
    def _intact(files: tuple[FileEntry, ...], folder: Path) -> bool:
        try:
            return all(
                (folder / f.path).stat().st_size == f.bytes and file_sha256(folder / f.path) == f.sha256 for f in files
            )
        except OSError:
            return False

    def publish(self, out: Path) -> None:
        """Give the finished bundle its name; one that was there is removed once the new one is in place.

        Raises:
            ExportError: it cannot take its place; the old one stays, and the next build is done at once.
        """
        old = _free_name(out)
        try:
            if out.exists():
                out.rename(old)
            try:
                self.bundle.rename(out)
            except OSError:
                if old.exists():
                    old.rename(out)
                raise
        except OSError as error:
            raise ExportError(
                f"{out}: the finished bundle cannot take this place ({error.strerror}); make room and run the same "
                f"command again, which keeps what is built, or move {self.bundle} there yourself"
            ) from error
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)


def _free_name(out: Path) -> Path:
    """A name beside a bundle for the one it replaces. What an earlier build left may not be removable: a link, or files
    that are open on a network disk."""
    name = out.with_name(out.name + ".replaced")
    for number in itertools.count(2):
        shutil.rmtree(name, ignore_errors=True)
        if not os.path.lexists(name):
            break
        name = out.with_name(f"{out.name}.replaced{number}")
    return name


def _fact(path: Path) -> list[Any]:
    info = path.stat()
    return [str(path.resolve()), info.st_size, info.st_mtime_ns]


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second build of the same bundle out. When the process ends, however it does, the lock is gone.

    Raises:
        ExportError: another process is building it, or the folder cannot be written.
    """
    path = out.with_name(out.name + ".building.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ExportError(f"{path.parent}: cannot be written ({error.strerror}); choose another --out") from error
    try:
        if not _try_lock(handle) or not _is(handle, path):
            raise ExportError(f"{out} is being built by another process; wait for it, or choose another --out")
        yield
        # while it is still held: a process that opened it meanwhile sees in `_is` that the file is gone
        path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def take(source: Path, target: Path) -> None:
    """Link a file to a second place, or copy it where links are not possible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_disk(folder: Path, n_bytes: int) -> None:
    """Refuse a build that the disk cannot hold.

    Raises:
        ExportError: less than `n_bytes` and something for small files is free.
    """
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free, needed = shutil.disk_usage(existing).free, n_bytes + _META_BYTES
    if free < needed:
        raise ExportError(
            f"{folder}: expected {needed / 1e9:.2f} GB of free disk space, got {free / 1e9:.2f} GB; "
            "free some, or choose another --out"
        )


def available_memory() -> int:
    """Bytes this process can still take without swapping: the system's free memory, or its container's."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 8 << 30
    for limit_name, used_name in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = int(Path(limit_name).read_text()), int(Path(used_name).read_text())
        except (OSError, ValueError):
            continue
        # page cache counts as used but is given back on demand
        free = min(free, max(limit - used + _reclaimable(Path(limit_name).parent), 0))
    return free


def _reclaimable(folder: Path) -> int:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    except (OSError, ValueError):
        return 0


def check_memory(stage: str, n_bytes: int) -> None:
    """Refuse a stage that the memory cannot hold.

    Raises:
        ExportError: less than `n_bytes` is free.
    """
    free = available_memory()
    if free < n_bytes:
        raise ExportError(
            f"{stage}: expected {n_bytes / 1e9:.1f} GB of free memory to build it, got {free / 1e9:.1f} GB; "
            "close other programs, or build on a larger machine"
        )
