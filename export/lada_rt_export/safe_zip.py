"""Find the entries of a torch zip file without unpacking anything: offsets and sizes, all checked.

Only what torch writes is accepted: stored (uncompressed) entries, one disk, no encryption, no two entries of
one name, no entry over another. Nothing is decompressed, so a zip bomb has nothing to blow up.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from typing import Final

from lada_rt.errors import CheckpointError

__all__ = ["Entry", "read_entries"]

_MAX_DIRECTORY_BYTES: Final = 64 << 20
_MAX_ENTRIES: Final = 1 << 20
_U16: Final = 0xFFFF
_U32: Final = 0xFFFFFFFF

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one entry's bytes lie in the file."""

    name: str
    start: int
    size: int
    #: None where the container has no checksums
    crc32: int | None
    #: not compressed, not encrypted
    stored: bool


class _Bad(Exception):
    pass


def read_entries(buffer: memoryview, source: str) -> dict[str, Entry]:
    """Entries of a zip file by name, without directories.

    Args:
        buffer: the whole file, usually memory-mapped; only the directory and the local headers are touched.
        source: the file, for the error message.

    Returns:
        name -> Entry; every entry lies inside the file and overlaps no other.

    Raises:
        CheckpointError: the file is cut short, damaged, ambiguous, or has more entries than any checkpoint.
    """
    try:
        return _read_entries(buffer)
    except (_Bad, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{source}: expected a complete torch zip file, got a damaged one ({error}); download the file again"
        ) from error


def _read_entries(buffer: memoryview) -> dict[str, Entry]:
    n_entries, directory_start, directory_bytes, end_of_directory = _directory(buffer)
    if n_entries > _MAX_ENTRIES or directory_bytes > _MAX_DIRECTORY_BYTES:
        raise _Bad(f"{n_entries} entries in a directory of {directory_bytes} bytes")
    if directory_start + directory_bytes > end_of_directory:
        raise _Bad("the directory lies outside the file")
    directory = bytes(buffer[directory_start : directory_start + directory_bytes])
    entries: dict[str, Entry] = {}
    ranges: list[tuple[int, int]] = []
    at = 0
    for _ in range(n_entries):
        fields = _CENTRAL.unpack_from(directory, at)
        signature, _, _, flags, method, _, _, crc32, stored_size, size = fields[:10]
        name_len, extra_len, comment_len, _, _, _, header = fields[10:]
        if signature != b"PK\x01\x02":
            raise _Bad("a directory entry without its signature")
        at += _CENTRAL.size
        raw_name = directory[at : at + name_len]
        extra = directory[at + name_len : at + name_len + extra_len]
        at += name_len + extra_len + comment_len
        if at > len(directory):
            raise _Bad("the directory is cut short")
        name = raw_name.decode("utf-8")
        size, stored_size, header = _zip64(extra, size, stored_size, header)
        _check_name(name)
        if name in entries:
            raise _Bad(f"two entries named {name!a}")
        if header + _LOCAL.size > directory_start:
            raise _Bad(f"entry {name!a} lies outside the file")
        local = _LOCAL.unpack_from(buffer, header)
        local_name_len, local_extra_len = local[9:]
        start = header + _LOCAL.size + local_name_len + local_extra_len
        if local[0] != b"PK\x03\x04" or bytes(buffer[header + 30 : header + 30 + local_name_len]) != raw_name:
            raise _Bad(f"entry {name!a} does not match its header")
        if start + stored_size > directory_start:
            raise _Bad(f"entry {name!a} lies outside the file")
        stored = method == 0 and not flags & 1
        if stored and size != stored_size:
            raise _Bad(f"entry {name!a} has two sizes")
        ranges.append((header, start + stored_size))
        if not name.endswith("/"):
            entries[name] = Entry(name, start, size, crc32, stored)
    if at != len(directory):
        raise _Bad("bytes behind the last directory entry")
    ranges.sort()
    for (_, end), (begin, _) in itertools.pairwise(ranges):
        if begin < end:
            raise _Bad("entries overlap")
    return entries


def _directory(buffer: memoryview) -> tuple[int, int, int, int]:
    """Number of entries, start and size of the directory, and where the directory must have ended."""
    tail_start = max(0, len(buffer) - _END.size - _U16)
    tail = bytes(buffer[tail_start:])
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0:
        if at + _END.size <= len(tail):
            end = _END.unpack_from(tail, at)
            if at + _END.size + end[7] == len(tail):
                break
        at = tail.rfind(b"PK\x05\x06", 0, at)
    if at < 0:
        raise _Bad("no end record: the file is cut short")
    _, disk, directory_disk, n_disk, n_entries, size, start, _ = end
    position = tail_start + at
    locator_at = position - _END64_LOCATOR.size
    if locator_at >= 0 and bytes(buffer[locator_at : locator_at + 4]) == b"PK\x06\x07":
        _, _, end64_at, _ = _END64_LOCATOR.unpack_from(buffer, locator_at)
        if end64_at + _END64.size > locator_at:
            raise _Bad("the zip64 end record lies outside the file")
        signature, _, _, _, disk, directory_disk, n_disk, n64, size64, start64 = _END64.unpack_from(buffer, end64_at)
        if signature != b"PK\x06\x06":
            raise _Bad("no zip64 end record")
        for small, large, limit in ((n_entries, n64, _U16), (size, size64, _U32), (start, start64, _U32)):
            if small not in (large, limit):
                raise _Bad("the two end records disagree")
        n_entries, size, start, position = n64, size64, start64, end64_at
    if disk or directory_disk or n_disk not in (n_entries, _U16):
        raise _Bad("a zip file of several disks")
    return n_entries, start, size, position


def _zip64(extra: bytes, size: int, stored_size: int, header: int) -> tuple[int, int, int]:
    """Replace saturated 32-bit fields by those of the zip64 extra field, which holds just those."""
    values = [size, stored_size, header]
    if _U32 not in values:
        return size, stored_size, header
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            body = extra[at + 4 : at + 4 + length]
            offset = 0
            for i, value in enumerate(values):
                if value == _U32:
                    (values[i],) = struct.unpack_from("<Q", body, offset)
                    offset += 8
            return values[0], values[1], values[2]
        at += 4 + length
    return size, stored_size, header


def _check_name(name: str) -> None:
    # Nothing is ever written under these names; a name that tries is still no torch file.
    if not name or name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise _Bad(f"an entry named {name!a}")
