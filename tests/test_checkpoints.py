"""Checkpoints: good files read as torch and safetensors read them, damage is a CheckpointError of one line."""

from __future__ import annotations

import argparse
import json
import pickle
import random
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lada_rt.errors import CheckpointError
from lada_rt_export.checkpoints import LazyTensor, open_tensors, select
from lada_rt_export.safe_pickle import plain, read_pickle
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
    refused: list[str] = []
    for raw in damaged(good, how):
        path.write_bytes(raw)
        try:
            read = read_all(path)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            assert kind != "zip" or same(read, tensors)
    assert refused
    assert not any("\n" in message for message in refused)


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
        "namespace": argparse.Namespace(lr=0.1),
        "function": len,
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
