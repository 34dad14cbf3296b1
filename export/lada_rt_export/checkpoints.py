"""Untrusted checkpoint files to named tensors.

Nothing in a file is executed, and no tensor is read before it is asked for. Three containers: torch zip files
(.ckpt, .pt, .pth, .bin since torch 1.6), the older torch pickles, and .safetensors. `safe_pickle` reads the
structure as data; tensors stay in the file, memory-mapped. Zip entries carry a CRC 32, compared when a tensor
is first read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from lada_rt.errors import CheckpointError

from lada_rt_export.safetensors_file import read_safetensors
from lada_rt_export.tensor_file import AGAIN, LazyTensor, TensorFile, check_storages, map_file
from lada_rt_export.torch_files import is_torch_legacy, read_torch_legacy, read_torch_zip

__all__ = ["LazyTensor", "TensorFile", "open_tensors", "plain_name", "select"]


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Open a checkpoint file without executing anything in it and without reading its tensors.

    Args:
        path: torch zip file, older torch pickle file, or .safetensors.

    Returns:
        The open file; use it as a context manager.

    Raises:
        CheckpointError: the file is missing, damaged, cut short, compressed, or none of the three formats.
    """
    path = Path(path)
    file = TensorFile(path, map_file(path))
    try:
        head = bytes(file.buffer[:64])
        if head.startswith(b"PK\x03\x04"):
            read_torch_zip(file)
        elif is_torch_legacy(head):
            read_torch_legacy(file)
        elif path.suffix == ".safetensors" or head[8:9] == b"{":
            read_safetensors(file)
        else:
            raise CheckpointError(
                f"{file.source}: expected a torch or .safetensors file, got {_what_is(head)}; {AGAIN}"
            )
        check_storages(file)
    except BaseException:
        file.close()
        raise
    return file


def _what_is(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (fetch the file itself with git lfs pull)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page (a download that needs a login?)"
    if head.startswith(b"\x80"):
        return "a bare pickle, which torch did not write"
    return f"a file that starts with {head[:8]!a}"


def select(
    tensors: Mapping[str, LazyTensor],
    expected: Mapping[str, Sequence[int]],
    *,
    source: str,
    prefix: str = "",
    dead: Iterable[str | re.Pattern[str]] = (),
    optional: Iterable[str | re.Pattern[str]] = (),
) -> dict[str, LazyTensor]:
    """The tensors one network needs, under its own names, or one error that lists everything wrong with them.

    Both spellings of weight normalisation are accepted (`weight_g`/`weight_v` and
    `parametrizations.weight.original0`/`1`), and the `_orig_mod.` of a compiled module is taken out.

    Args:
        tensors: name -> tensor, as stored.
        expected: name (without prefix) -> shape, of every tensor the network needs.
        source: the file, for the error message.
        prefix: only names that start with it belong to the network; it is stripped.
        dead: regular expressions, matched at the start of the stripped name, for what may be present unused.
        optional: likewise, for names of `expected` that may be missing.

    Returns:
        name -> tensor for the names of `expected` that are there, in that order.

    Raises:
        CheckpointError: names are missing, unexpected, stored twice, or have another shape.
    """
    dead_patterns = [re.compile(p) for p in dead]
    optional_patterns = [re.compile(p) for p in optional]
    found: dict[str, LazyTensor] = {}
    twice: list[str] = []
    for stored_name, tensor in tensors.items():
        name = plain_name(stored_name)
        if not name.startswith(prefix):
            continue
        name = _spelled_as_expected(name[len(prefix) :], expected)
        if name in found:
            twice.append(name)
        found[name] = tensor
    missing = [
        f"{name} {list(shape)}"
        for name, shape in expected.items()
        if name not in found and not _matches(optional_patterns, name)
    ]
    unexpected = [name for name in found if name not in expected and not _matches(dead_patterns, name)]
    misshaped = [
        f"{name} {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    faults = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshaped,
        "stored twice": twice,
    }
    wrong = [
        f"{len(names)} {fault}: {', '.join(ascii(name)[1:-1] for name in names)}"
        for fault, names in faults.items()
        if names
    ]
    if wrong:
        under = f" under {prefix!a}" if prefix else ""
        raise CheckpointError(
            f"{source}: expected {len(expected)} tensors{under}, got {'; '.join(wrong)}; "
            "check that this is the released file and that the sizes given for it are right"
        )
    return {name: found[name] for name in expected if name in found}


def plain_name(name: str) -> str:
    """A tensor's name without the `_orig_mod.` that compiling a module inserts."""
    return re.sub(r"(^|\.)(_orig_mod\.)+", r"\1", name)


def _matches(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    return any(p.match(name) for p in patterns)


_NORM_SPELLINGS: Final = (
    ("weight_g", "parametrizations.weight.original0"),
    ("weight_v", "parametrizations.weight.original1"),
)


def _spelled_as_expected(name: str, expected: Mapping[str, Sequence[int]]) -> str:
    if name in expected:
        return name
    for spellings in _NORM_SPELLINGS:
        for this, other in (spellings, spellings[::-1]):
            if name.endswith("." + this) and (renamed := name[: -len(this)] + other) in expected:
                return renamed
    return name
