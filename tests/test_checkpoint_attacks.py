"""Hostile checkpoints: no pickle opcode, archive or bomb has an effect; each ends in data or in one line of error."""

from __future__ import annotations

import copyreg
import io
import json
import os
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lada_rt.errors import CheckpointError
from lada_rt_export.checkpoints import open_tensors
from lada_rt_export.safe_pickle import MAX_OPCODES, Foreign, plain, read_pickle

# -- pickles that attack


def write_zip(path: Path, structure: bytes, storages: dict[str, bytes] | None = None, **others: bytes) -> Path:
    """A torch zip file around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", structure)
        archive.writestr("archive/byteorder", b"little")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in others.items():
            archive.writestr(f"archive/{name}", data)
        archive.writestr("archive/version", b"3\n")
    return path


def _global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def one_line(error: CheckpointError) -> str:
    message = str(error)
    assert "\n" not in message
    assert error.exit_code == 4
    return message


class _Reduce:
    """Pickles as a call of anything."""

    def __init__(self, *value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return self.value


def live_payloads(canary: Path) -> dict[str, bytes]:
    """Pickles that create the canary file when `pickle.loads` reads them."""
    touch = f"open({str(canary)!r}, 'w').close()"
    command = f"touch {canary}"
    return {
        "system": pickle.dumps(_Reduce(os.system, (command,))),
        "eval": pickle.dumps(_Reduce(eval, (touch,)), protocol=2),
        "exec in a list": pickle.dumps([1, {"a": _Reduce(exec, (touch,))}], protocol=4),
        "getattr chain": b"\x80\x02" + _global("builtins", "getattr") + b"(" + _global("os", "path")
        + _text("os") + b"tR0" + _global("builtins", "getattr") + b"(" + _global("posixpath", "os")
        + _text("system") + b"tR" + _text(command) + b"\x85R.",
        "INST": b"(" + _text(command) + b"ios\nsystem\n.",
        "OBJ": b"(" + _global("os", "system") + _text(command) + b"o.",
        "STACK_GLOBAL": b"\x80\x04" + _text("os") + _text("system") + b"\x93" + _text(command) + b"\x85R.",
        "BUILD with a setter": b"\x80\x02" + _global("builtins", "eval") + _text(touch) + b"\x85R}b.",
        "reduce of a state": b"\x80\x02}" + _text("k") + _global("os", "system") + _text(command) + b"\x85Rs.",
    }  # fmt: skip


def inert_payloads() -> dict[str, bytes]:
    """Pickles that misuse other opcodes, or the few names that the reader knows."""
    rebuild = _global("torch._utils", "_rebuild_tensor_v2")
    return {
        "NEWOBJ": b"\x80\x02" + _global("subprocess", "Popen") + b"(" + _text("false") + b"t\x81.",
        "NEWOBJ_EX": b"\x80\x04" + _global("subprocess", "Popen") + b")" + b"}" + b"\x92.",
        "set defaults of the rebuild function": b"\x80\x02" + rebuild
        + b"N}" + _text("__defaults__") + b"(I1\nts\x86b.",
        "dictionary of the rebuild function": b"\x80\x02" + rebuild + b"}" + _text("x") + b"I1\nsb.",
        "attributes of a class": b"\x80\x02" + _global("collections", "OrderedDict")
        + b"N}" + _text("get") + b"I1\ns\x86b.",
        "copyreg": b"\x80\x02" + _global("copyreg", "add_extension") + b"("
        + _text("os") + _text("system") + b"I9\ntR.",
        "reconstructor": b"\x80\x02" + _global("copy_reg", "_reconstructor") + b"(" + _global("os", "system")
        + _global("__builtin__", "object") + b"NtR.",
        "call of a string": b"\x80\x02" + _text("os.system") + _text("x") + b"\x85R.",
        "call with no tuple": b"\x80\x02" + _global("os", "system") + _text("x") + b"R.",
        "rebuild without storage": b"\x80\x02" + rebuild + b"(NI0\n))\x89}tR.",
        "rebuild with too little": b"\x80\x02" + rebuild + b")R.",
        "persistent id of a call": b"\x80\x02" + _global("os", "system") + b")RQ.",
        "persistent text": b"Pstorage\n.",
        "module of another kind": b"\x80\x04I1\nI2\n\x93.",
        "unhashable key": b"\x80\x02}]N s.".replace(b" ", b""),
        "huge key": b"\x80\x02}" + b"\x8a\x09" + b"\xff" * 8 + b"\x00" + b"Ns.",
        "own container": b"\x80\x02]q\x00h\x00a.",
        "buffers": b"\x80\x05\x97\x98.",
    }  # fmt: skip


def open_quietly(path: Path) -> Any:
    """The readable content, or the error's single line."""
    try:
        with open_tensors(path) as file:
            for tensor in file.tensors().values() if isinstance(file.root, dict) else ():
                tensor.torch()
            return file.data()
    except CheckpointError as error:
        return one_line(error)


PAYLOADS = sorted(live_payloads(Path("x")) | inert_payloads())


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("place", ["root", "in a state dict", "legacy"])
def test_nothing_in_a_pickle_runs(tmp_path: Path, name: str, place: str) -> None:
    canary = tmp_path / "canary"
    payload = (live_payloads(canary) | inert_payloads())[name]
    path = tmp_path / "evil.pt"
    if place == "legacy":
        buffer = io.BytesIO()
        torch.save({}, buffer, _use_new_zipfile_serialization=False)
        head = buffer.getvalue()
        empty = pickle.dumps({}, protocol=2)
        at = head.rindex(empty)
        path.write_bytes(head[:at] + payload + pickle.dumps([], protocol=2))
    elif place == "root":
        write_zip(path, payload)
    else:  # behind a state dict that looks right
        body = payload[2:-1] if payload[:1] == b"\x80" else payload[:-1]
        write_zip(path, b"\x80\x04}" + _text("state_dict") + body + b"s.")
    modules, dispatch = set(sys.modules), dict(copyreg.dispatch_table)
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    open_quietly(path)
    assert not canary.exists()
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults
    assert not hasattr(torch._utils._rebuild_tensor_v2, "x")
    assert copyreg.dispatch_table == dispatch
    assert ("os", "system") not in copyreg._extension_registry  # type: ignore[attr-defined]  # CPython's own table
    assert "antigravity" not in set(sys.modules) - modules


@pytest.mark.parametrize("name", sorted(live_payloads(Path("x"))))
def test_the_payloads_are_live(tmp_path: Path, name: str) -> None:
    """The attack of the test above is real: Python's own reader carries it out."""
    canary = tmp_path / "canary"
    try:
        pickle.loads(live_payloads(canary)[name])
    except Exception as error:  # after the damage is done
        print(error)
    assert canary.exists()


def test_extension_codes_name_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    copyreg.add_extension("os", "system", 240)
    try:
        payload = b"\x80\x02\x82\xf0" + _text(f"touch {canary}") + b"\x85R."
        open_quietly(write_zip(tmp_path / "evil.pt", payload))
        assert not canary.exists()
        pickle.loads(payload)
        assert canary.exists()
    finally:
        copyreg.remove_extension("os", "system", 240)


def test_imports_named_in_a_pickle_do_not_happen() -> None:
    assert "antigravity" not in sys.modules
    value = read_pickle(b"\x80\x02cantigravity\nfly\n.", "x")
    assert isinstance(value, Foreign)
    assert value.name == "antigravity.fly"
    assert "antigravity" not in sys.modules


def bombs() -> dict[str, bytes]:
    laughs: Any = []
    tuples: Any = ()
    for _ in range(100):
        laughs, tuples = [laughs, laughs], (tuples, tuples)
    key = pickle.dumps(tuples, 2)[2:-1]  # shared, so short; hashing it takes 2**100 steps
    assert len(key) < 2000
    return {
        "memo index": b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".",
        "many far memo entries": b"\x80\x02N"
        + b"".join(b"r" + struct.pack("<I", 2**32 - 1 - i) for i in range(999)) + b".",
        "laughs": pickle.dumps(laughs, 2),
        "key that is expensive to hash": b"\x80\x02}" + key + b"Ns.",
        "set of expensive members": b"\x80\x04\x8f(" + key + b"\x90.",
        "frozen set of expensive members": b"\x80\x04(" + key + b"\x91.",
        "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "deep tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
        "deep objects": b"\x80\x02" + b"ca\nb\n" * 50_000 + b")R" + b"\x85R" * 49_999 + b".",
        "announced bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
        "announced bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
        "announced frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        "announced text": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x.",
        "large integer": b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b".",
        "long decimal": b"L" + b"9" * 100_000 + b"L\n.",
        "negative length": b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
        "many marks": b"(" * 100_000 + b".",
        "long names": b"\x80\x04" + _text("a" * (1 << 20)) + b"q\x00" + _text("b") + b"q\x01"
        + b"h\x00h\x01\x93" * 1000 + b".",
        "many opcodes": b"\x80\x02" + b"N0" * (MAX_OPCODES // 2) + b"N.",
        "copied pairs": b"\x80\x02](" + b"(I1\nI2\nl" * 1000 + b"eq\x00"
        + (_global("collections", "OrderedDict") + b"h\x00\x85R0") * 1000 + b".",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(bombs()))
def test_bombs_cost_little(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "bomb.pt", bombs()[name])
    measured = name != "many opcodes"  # tracing makes four million opcodes slow
    if measured:
        tracemalloc.start()
    start = time.monotonic()
    try:
        open_quietly(path)
        peak = tracemalloc.get_traced_memory()[1] if measured else 0
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 60
    assert peak < 200 << 20


def test_too_large_a_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    write_zip(path, b"\x80\x02N." + bytes(65 << 20))
    assert "expected at most" in open_quietly(path)


# -- archives that attack


def rewrite(path: Path, change: Callable[[zipfile.ZipFile], None]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        change(archive)
    return str(open_quietly(path))


def good_pickle(
    n_items: int = 4, shape: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,), offset: int = 0
) -> bytes:
    """A one-tensor state dict with any storage size, shape, strides and offset."""

    def number(value: int) -> bytes:
        data = value.to_bytes(max(1, (value.bit_length() + 8) // 8), "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    storage = (
        b"(" + _text("storage") + _global("torch", "FloatStorage") + _text("0") + _text("cpu") + number(n_items) + b"tQ"
    )
    return (
        b"\x80\x02}" + _text("w") + _global("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + number(offset)
        + b"(" + b"".join(map(number, shape)) + b"t" + b"(" + b"".join(map(number, stride)) + b"t" + b"\x89}tRs."
    )  # fmt: skip


def test_the_hand_made_file_is_a_good_one(tmp_path: Path) -> None:
    data = np.arange(4, dtype=np.float32)
    path = write_zip(tmp_path / "good.pt", good_pickle(), {"0": data.tobytes()})
    with open_tensors(path) as file:
        assert np.array_equal(file.tensors()["w"].numpy(), data)


@pytest.mark.parametrize(
    "bad",
    [
        {"n_items": 5},
        {"n_items": 2**40},
        {"n_items": -1},
        {"shape": (5,)},
        {"offset": 1},
        {"offset": 2**63},
        {"offset": -1},
        {"shape": (2, 2), "stride": (3, 1)},
        {"shape": (2,), "stride": (-1,)},
        {"shape": (2, 2), "stride": (1,)},
        {"shape": (2**62, 2**62), "stride": (0, 0)},
        {"shape": (2**40,), "stride": (0,)},
        {"shape": (1,) * 40, "stride": (0,) * 40},
        {"shape": (-1,)},
    ],
    ids=str,
)
def test_tensors_outside_their_storage_are_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = write_zip(tmp_path / "bad.pt", good_pickle(**bad), {"0": bytes(16)})
    message = open_quietly(path)
    assert isinstance(message, str)
    assert message.startswith("bad.pt: expected")


def test_empty_tensors_of_absurd_extent_do_no_harm(tmp_path: Path) -> None:
    pickled = good_pickle(shape=(0, 2**47, 2**47), stride=(1, 1, 1))
    path = write_zip(tmp_path / "bad.pt", pickled, {"0": bytes(16)})
    with open_tensors(path) as file:
        tensor = file.tensors()["w"]
        for view in (tensor.numpy, tensor.torch):
            outcome: Any
            try:
                outcome = view().nbytes
            except CheckpointError as error:
                outcome = one_line(error)
            assert outcome == 0 or "usable shape" in str(outcome)


def test_archives_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    data = np.arange(4, dtype=np.float32).tobytes()
    good = [("a/data.pkl", good_pickle()), ("a/data/0", data), ("a/version", b"3")]

    def entries(*items: tuple[str, bytes], compress: bool = False) -> str:
        def change(archive: zipfile.ZipFile) -> None:
            for name, content in items:
                archive.writestr(name, content, zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)

        return rewrite(path, change)

    assert "LazyTensor" in entries(*good)
    assert "compressed" in entries(*good, compress=True)
    with pytest.warns(UserWarning, match="Duplicate name"):
        assert "two entries" in entries(*good, ("a/data/0", data))
    assert "one data.pkl" in entries(*good, ("b/data.pkl", good_pickle()))
    assert "one data.pkl" in entries(("a/x", b""))
    assert "one data.pkl" in entries(*good, ("a/constants.pkl", b"\x80\x02)."))
    assert "little-endian" in entries(*good, ("a/byteorder", b"big"))
    assert "no such entry" in entries(good[0], good[2])
    assert "16 bytes of storage '0', got 8" in entries(good[0], ("a/data/0", data[:8]), good[2])
    for name in ("../data/0", "/etc/passwd", "a/../../x", "a\\x"):
        message = entries(*good, (name, b"x"))
        assert "an entry named" in message, name


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N." + bytes(256 << 20))
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        assert "compressed" in str(open_quietly(path))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_nested_archives_stay_closed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    inner = write_zip(tmp_path / "inner.pt", live_payloads(canary)["system"]).read_bytes()
    load = (
        b"\x80\x02"
        + _global("torch.storage", "_load_from_bytes")
        + b"B"
        + struct.pack("<I", len(inner))
        + inner
        + b"\x85R."
    )
    for structure, storages in ((load, {}), (good_pickle(len(inner) // 4, (len(inner) // 4,)), {"0": inner})):
        open_quietly(write_zip(tmp_path / "outer.pt", structure, storages))
        assert not canary.exists()


def test_overlapping_entries_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "good.pt", good_pickle(), {"0": bytes(16), "1": bytes(16)})
    raw = bytearray(path.read_bytes())
    # point the directory entry of data/1 at the header of data/0, and give it that name's length and bytes
    directory = raw.index(b"PK\x01\x02")
    first = raw.index(b"archive/data/0", directory) - 46
    second = raw.index(b"archive/data/1", directory) - 46
    raw[second + 42 : second + 46] = raw[first + 42 : first + 46]
    path.write_bytes(raw)
    assert "damaged" in str(open_quietly(path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (pickle.dumps({"a": 1}), "a bare pickle"),
        (b"\x93NUMPY\x01\x00", "starts with"),
        (b"PK\x03\x04", "cut short"),
        (b"PK\x05\x06" + bytes(18), "starts with"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "what.pt"
    path.write_bytes(content)
    assert says in str(open_quietly(path))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", Path("/dev/zero"), Path("a\0b")):
        assert isinstance(open_quietly(path), str)


def test_large_values_named_often_are_not_copied_each_time() -> None:
    large = dict.fromkeys(range(300_000))
    objects = [Foreign("x", (), state=(large, {"_content": 1})), bytes(32 << 20), {bytes(32 << 20): 2}]
    began = time.process_time()
    read = plain(objects * 20_000)
    # copied, the dictionaries alone take minutes
    assert time.process_time() - began < 20
    assert read[0] == 1
    assert read[1].startswith("b'\\x00")
    assert len(read[1]) == 200
    assert list(read[2].values()) == [2]


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_as_a_pickle(data: bytes) -> None:
    try:
        json.dumps(plain(read_pickle(b"\x80\x02" + data, "x")))
    except CheckpointError as error:
        one_line(error)


OPCODES = st.sampled_from(
    [b"(", b".", b"0", b"1", b"2", b"N", b"]", b"}", b")", b"a", b"e", b"s", b"u", b"t", b"\x85", b"\x86",
     b"\x87", b"R", b"b", b"o", b"\x81", b"\x92", b"\x94", b"\x93", b"Q", b"q\x00", b"h\x00", b"\x8f", b"\x90",
     b"\x91", b"K\x01",
     b"cos\nsystem\n", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nSize\n",
     b"ctorch\nFloatStorage\n", b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000", b"\x88",
     b"ia\nb\n",
     b"G" + bytes(8)]
)  # fmt: skip


@given(st.lists(OPCODES, max_size=60))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_opcodes_as_a_torch_file(tmp_path: Path, opcodes: list[bytes]) -> None:
    open_quietly(write_zip(tmp_path / "any.pt", b"\x80\x02" + b"".join(opcodes) + b".", {"0": bytes(16)}))
