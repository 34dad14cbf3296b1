"""Untrusted checkpoints: nothing in a file runs, damage is a CheckpointError, good files read as torch reads them."""

from __future__ import annotations

import builtins
import copyreg
import io
import json
import os
import pickle
import random
import struct
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lada_rt.errors import CheckpointError
from lada_rt_export.checkpoints import LazyTensor, open_tensors, select
from lada_rt_export.safe_pickle import MAX_OPCODES, Foreign, plain, read_pickle
from safetensors.numpy import load_file
from safetensors.torch import save_file

# -- files to read


def sample_tensors() -> dict[str, torch.Tensor]:
    """Every dtype and layout that state dicts contain."""
    rng = torch.Generator().manual_seed(5)
    base = torch.randn(6, 8, generator=rng)
    return {
        "float32": base,
        "float64": base.double() * 1.1,
        "float16": base.half(),
        "bfloat16": base.bfloat16(),
        "int64": torch.arange(-4, 5),
        "int32": torch.arange(7, dtype=torch.int32),
        "int16": torch.arange(7, dtype=torch.int16),
        "int8": torch.arange(-3, 3, dtype=torch.int8),
        "uint8": torch.arange(250, 256, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.t(),
        "slice": base[1:5:2, 2:7],
        "shared": base[3],
    }


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


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a flat file, through both views, as own copies."""
    with open_tensors(path) as file:
        read = {}
        for name, tensor in file.tensors().items():
            read[name] = tensor.torch().clone()
            array = tensor.numpy()
            assert array.shape == tuple(tensor.shape)
            assert torch.equal(
                torch.from_numpy(np.array(array)).nan_to_num(),
                read[name].float().nan_to_num() if tensor.dtype == "bfloat16" else read[name].nan_to_num(),
            )
        json.dumps(file.data())
        return read


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_files_read_as_torch_reads_them(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "sample.pt"
    torch.save(sample_tensors(), path, _use_new_zipfile_serialization=not legacy)
    want = torch.load(path, weights_only=True)
    assert same(read_all(path), want)
    with open_tensors(path) as file:
        assert file.kind == ("torch legacy" if legacy else "torch zip")
        for name in ("float16", "bfloat16"):
            assert torch.equal(file.tensors()[name].torch(widen=True), want[name].float())
            assert torch.equal(torch.from_numpy(file.tensors()[name].numpy(widen=True).copy()), want[name].float())


def test_parameters_and_modules_of_a_state_dict(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    path = tmp_path / "state.pt"
    torch.save({"state_dict": module.state_dict(), "raw": dict(module.named_parameters())}, path)
    with open_tensors(path) as file:
        for group, want in (("state_dict", module.state_dict()), ("raw", dict(module.named_parameters()))):
            read = file.tensors(group)
            assert list(read) == list(want)
            assert all(torch.equal(read[name].torch(), want[name]) for name in want)
        with pytest.raises(CheckpointError, match=r"expected an entry 'state_dict/nope'"):
            file.entry("state_dict", "nope")


def test_a_whole_module_is_not_a_state_dict(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with open_tensors(tmp_path / "module.pt") as file, pytest.raises(CheckpointError, match="state_dict"):
        file.tensors()


def test_safetensors_read_as_the_library_reads_them(tmp_path: Path) -> None:
    tensors = {name: t.contiguous().clone() for name, t in sample_tensors().items()}
    save_file(tensors, tmp_path / "sample.safetensors", metadata={"a": "b"})
    assert same(read_all(tmp_path / "sample.safetensors"), tensors)


def test_views_are_private_and_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sample.pt"
    torch.save({"a": torch.arange(12.0)}, path)
    before = path.read_bytes()
    file = open_tensors(path)
    lazy = file.tensors()["a"]
    tensor, array = lazy.torch(), lazy.numpy()
    assert not array.flags.writeable
    file.close()
    file.close()
    tensor.mul_(2)  # a private page: the file keeps its bytes
    assert torch.equal(tensor, 2 * torch.arange(12.0))
    assert path.read_bytes() == before
    with pytest.raises(CheckpointError, match="closed"):
        lazy.torch()


def test_reading_maps_instead_of_copying(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    torch.save({"a": torch.zeros(16 << 20), "b": torch.ones(4)}, path)
    tracemalloc.start()
    try:
        with open_tensors(path) as file:
            assert float(file.tensors()["a"].numpy()[-1]) == 0
            peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20  # of 64 MiB


def test_goldens_read_as_torch_reads_them(golden: Path) -> None:
    for path in [p for p in sorted(golden.iterdir()) if p.suffix in (".ckpt", ".pth", ".pt", ".bin")]:
        want = torch.load(path, weights_only=True)
        with open_tensors(path) as file:
            assert list(file.root) == list(want)
            for group, tensors in want.items():
                if isinstance(tensors, dict) and tensors and all(isinstance(t, torch.Tensor) for t in tensors.values()):
                    read = {name: t.torch() for name, t in file.tensors(group).items()}
                    assert same(read, tensors)


def test_golden_checkpoint_equals_its_weights(golden: Path) -> None:
    for sidecar in golden.glob("*_ckpt.json"):
        told = json.loads(sidecar.read_text())
        path = golden / (sidecar.stem.removesuffix("_ckpt") + ".ckpt")
        want = load_file(golden / told["weights_equal_to"])
        with open_tensors(path) as file:
            read = file.tensors("state_dict")
            own = {name: t for name, t in read.items() if name.startswith(told["config"]["weight_key_prefix"])}
            assert len(own) == told["model_keys"]
            assert len(read) - len(own) == told["other_keys"]
            assert own.keys() == want.keys()
            assert all(np.array_equal(own[name].numpy(), want[name]) for name in want)


def test_golden_safetensors_read_as_the_library_reads_them(golden: Path) -> None:
    for path in sorted(golden.glob("*.safetensors")):
        if path.stat().st_size < 1 << 20:
            want = load_file(path)
            with open_tensors(path) as file:
                read = file.tensors()
                assert read.keys() == want.keys()
                assert all(read[name].numpy().tobytes() == want[name].tobytes() for name in want)  # NaN included


# -- files that attack


class _Reduce:
    """Pickles as a call of anything."""

    def __init__(self, *value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return self.value


def _global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


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


def one_line(error: CheckpointError) -> str:
    message = str(error)
    assert "\n" not in message
    assert error.exit_code == 4
    return message


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
    assert np.array_equal(read_all(path)["w"].numpy(), data)


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


# -- damage


def damaged(good: bytes, how: str) -> list[bytes]:
    rng = random.Random(11)
    if how == "cut":
        return [good[:n] for n in sorted({*range(0, len(good), max(1, len(good) // 150)), len(good) - 1})]
    if how == "flipped":
        made = []
        for _ in range(400):
            raw = bytearray(good)
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            made.append(bytes(raw))
        return made
    made = []
    for _ in range(150):
        raw = bytearray(good)
        for _ in range(rng.randrange(2, 40)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        made.append(bytes(raw))
    return made


@pytest.mark.parametrize("how", ["cut", "flipped", "scribbled"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damage_is_noticed_or_harmless(tmp_path: Path, kind: str, how: str) -> None:
    """A torch zip file reads right or not at all. The other two carry no checksums: values may change, nothing else."""
    tensors = {name: t.contiguous().clone() for name, t in sample_tensors().items()}
    path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pt")
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    good = path.read_bytes()
    n_refused = 0
    for raw in damaged(good, how):
        path.write_bytes(raw)
        try:
            read = read_all(path)
        except CheckpointError as error:
            one_line(error)
            n_refused += 1
        else:
            assert kind != "zip" or same(read, tensors)
    assert n_refused > 0


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


PLAIN_DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(-99, 99), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(PLAIN_DATA, st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_plain_data_reads_as_python_reads_it(value: Any, protocol: int) -> None:
    assert read_pickle(pickle.dumps(value, protocol), "x") == value


@given(st.binary(), st.integers(3, 5))
@settings(deadline=None)
def test_bytes_read_as_python_reads_them(value: bytes, protocol: int) -> None:
    data = [value, bytearray(value)] if protocol == 5 else [value]
    assert read_pickle(pickle.dumps(data, protocol), "x") == data


# -- readable configurations


class Node:
    """A configuration value as omegaconf pickles it."""

    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


class Slotted:
    __slots__ = ("kind",)

    def __init__(self) -> None:
        self.kind = "slots"


def test_configurations_become_readable() -> None:
    value = {
        "model": Node(_metadata=None, _content={"is_flash": Node(_val=False), "dims": Node(_content=[Node(_val=3)])}),
        "task": Node(name="mert", rate=25),
        "slotted": Slotted(),
        "path": Path("/x/y"),
        "namespace": __import__("argparse").Namespace(lr=0.1),
        "function": builtins.len,
        "ordered": OrderedDict(a=1),
    }
    read = plain(read_pickle(pickle.dumps(value, 4), "x"))
    assert read["model"] == {"is_flash": False, "dims": [3]}
    assert read["task"] == {"name": "mert", "rate": 25}
    assert read["slotted"] == {"kind": "slots"}
    assert read["namespace"] == {"lr": 0.1}
    assert read["function"] == "<builtins.len>"
    assert read["ordered"] == {"a": 1}


# -- picking tensors


def lazy(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    torch.save(tensors, tmp_path / "some.pt")
    return open_tensors(tmp_path / "some.pt").tensors()


def test_select_lists_everything_wrong_at_once(tmp_path: Path) -> None:
    stored = lazy(
        tmp_path,
        {
            "model.a": torch.zeros(2), "model.b": torch.zeros(3), "model.extra": torch.zeros(1),
            "model.line\nbreak": torch.zeros(1), "model._orig_mod.a": torch.zeros(2), "other.model.c": torch.zeros(1),
            "model.dead.x": torch.zeros(1),
        },
    )  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        select(
            stored, {"a": (2,), "b": (4,), "c": (1,), "d": (5, 6), "maybe": (1,)},
            source="some.pt", prefix="model.", dead=[r"dead\."], optional=["maybe"],
        )  # fmt: skip
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("some.pt: expected 5 tensors under 'model.'")
    assert "2 missing: c [1], d [5, 6];" in message
    assert "2 unexpected: extra, line\\nbreak;" in message
    assert "1 of another shape: b [3] instead of [4];" in message
    assert "1 stored twice: a;" in message
    assert "dead" not in message
    assert "maybe" not in message


def test_select_accepts_both_spellings_and_compiled_names(tmp_path: Path) -> None:
    stored = lazy(
        tmp_path,
        {
            "_orig_mod.model.x.parametrizations.weight.original0": torch.zeros(1),
            "model.x._orig_mod.parametrizations.weight.original1": torch.ones(2),
            "model.y.weight_g": torch.zeros(3),
            "model.y.weight_v": torch.ones(4),
        },
    )
    old, new = ["weight_g", "weight_v"], ["parametrizations.weight.original0", "parametrizations.weight.original1"]
    expected = {f"x.{old[0]}": (1,), f"x.{old[1]}": (2,), f"y.{new[0]}": (3,), f"y.{new[1]}": (4,)}
    chosen = select(stored, expected, source="some.pt", prefix="model.")
    assert {name: tuple(t.shape) for name, t in chosen.items()} == expected
