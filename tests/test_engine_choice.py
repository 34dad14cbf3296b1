"""Which compiled engine is taken on which machine, and what is said where none can be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from lada_rt import BundleError, EngineError, engines
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.engines import cache, load_engines
from lada_rt.engines.cache import EngineEntry, EngineKey, rebuild_command, write_engine
from lada_rt.engines.onnxruntime import OnnxEngine, load_onnxruntime

VERSION = "2.13.0"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(demo_bundle_path(), tmp_path / "demo.bundle"))


def machine(monkeypatch: pytest.MonkeyPatch, *, slot: str | None, torch_sees: str, version: str | None) -> None:
    """A machine whose first slot, by the driver's tool, holds one architecture, and whose first GPU, by torch, is of
    another."""
    monkeypatch.setattr(cache, "_driver_arch", lambda: slot)
    monkeypatch.setattr(cache, "_version", lambda backend: version)
    monkeypatch.setattr("lada_rt.engines.torch.device_key", lambda device: torch_sees if device == "cuda" else "cpu-x")


def file_engine(bundle: Bundle, backend: str, arch: str, stage: str = "denoiser") -> EngineEntry:
    """An engine of random bytes, filed under a key."""
    entry = bundle.stages[stage]
    key = EngineKey(stage, entry.sha256, backend, VERSION, arch, entry.precision, {"T": (1, 751, 9001)})
    (bundle.path / "engine.bin").write_bytes(os.urandom(64))
    return write_engine(
        bundle.path / "engines", key, [bundle.path / "engine.bin"], {"max_rel_error": 1e-5, "tolerance": 1e-4}
    )


class Recorder:
    """A loader that notes what it was given, and ends the loading there."""

    class Loaded(Exception):
        pass

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries: list[EngineEntry] = []
        monkeypatch.setattr(engines, "LOADERS", {"torch": self, "tensorrt": self})

    def __call__(self, entry: EngineEntry, device: str) -> dict[str, object]:
        self.entries.append(entry)
        raise self.Loaded


@pytest.mark.parametrize("slot", ["sm_86", None])
def test_torch_tells_which_gpu_it_runs_on(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, slot: str | None) -> None:
    """CUDA_VISIBLE_DEVICES, CUDA's own order, and containers without the driver's tool."""
    machine(monkeypatch, slot=slot, torch_sees="sm_89", version=VERSION)
    loader = Recorder(monkeypatch)
    foreign = file_engine(bundle, "torch", "sm_86")
    with pytest.raises(EngineError, match="was built for sm_86, this device is sm_89; rebuild it with"):
        load_engines(bundle, backend="torch", device="cuda")
    assert load_engines(bundle)[1] == "onnxruntime"  # not the foreign one
    shutil.rmtree(foreign.folder)
    fits = file_engine(bundle, "torch", "sm_89")
    for backend, device in (("torch", "cuda"), ("torch", "auto"), ("auto", "auto")):
        with pytest.raises(Recorder.Loaded):
            load_engines(bundle, backend=backend, device=device)
        assert loader.entries.pop() == fits


@pytest.mark.parametrize("error", [EngineError("CUDAExecutionProvider did not start"), BundleError("no bf16 MatMul")])
def test_auto_takes_the_cpu_where_cuda_is_listed_but_does_not_start(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """The GPU build of ONNX Runtime lists CUDA on every machine."""
    monkeypatch.setattr("lada_rt.engines.onnxruntime.cuda_available", lambda: True)
    tried = []
    load = engines._onnx_engine

    def onnx_engine(bundle: Bundle, stage: str, device: str, n_threads: int | None) -> engines.Engine:
        tried.append(device)
        if device == "cuda":
            raise error
        return load(bundle, stage, device, n_threads)

    monkeypatch.setattr(engines, "_onnx_engine", onnx_engine)
    found, backend, device = load_engines(bundle)
    assert (backend, device) == ("onnxruntime", "cpu")
    assert found.keys() == bundle.stages.keys()
    assert tried == ["cuda"] + ["cpu"] * len(found)
    assert f"{error}; the CPU is used" in caplog.text
    with pytest.raises(type(error)):
        load_engines(bundle, device="cuda")


@pytest.mark.parametrize("compiled", ["torch", "tensorrt"])
def test_auto_goes_on_without_a_torch_that_sees_no_gpu(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiled: str
) -> None:
    machine(monkeypatch, slot="sm_90", torch_sees="sm_90", version=VERSION)
    file_engine(bundle, compiled, "sm_90")

    def blind(device: str) -> str:
        raise EngineError("backend torch: expected a CUDA device, this torch sees none")

    monkeypatch.setattr("lada_rt.engines.torch.device_key", blind)
    found, backend, _ = load_engines(bundle)
    assert backend == "onnxruntime"
    assert f"backend {compiled} is not used: backend torch: expected a CUDA device, this torch sees" in caplog.text
    assert found["text_encoder"].run(ids=np.array([[0, 2]]), positions=np.array([[2, 3]]))["feature"].size


def test_tensorrt_on_a_cpu_is_told_of_the_gpu_it_needs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, slot=None, torch_sees="", version=VERSION)
    file_engine(bundle, "tensorrt", "sm_90")
    for device in ("auto", "cpu"):
        with pytest.raises(EngineError, match="expected an NVIDIA GPU and --device cuda, got cpu"):
            load_engines(bundle, backend="tensorrt", device=device)


def test_a_missing_backend_is_to_be_installed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, slot="sm_90", torch_sees="sm_90", version=None)
    file_engine(bundle, "tensorrt", "sm_90")
    with pytest.raises(EngineError, match=rf"needs tensorrt {VERSION}, which is not installed; install it with: pip"):
        load_engines(bundle, backend="tensorrt", device="cuda")


def test_the_command_builds_for_the_device_that_was_asked_for(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, slot="sm_90", torch_sees="sm_90", version=VERSION)
    with pytest.raises(EngineError, match=r"has no engine for it; .* --backend torch --device cpu$"):
        load_engines(bundle, backend="torch", device="cpu")
    entry = file_engine(bundle, "torch", "sm_90")
    with pytest.raises(EngineError, match=r"built for sm_90, this device is cpu-x; .* --device cpu$"):
        load_engines(bundle, backend="torch", device="cpu")
    assert rebuild_command(bundle.path, entry.key).endswith("--backend torch --precision fp32")


def test_onnx_runtime_computes_float32_in_float32_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    class Session:
        def __init__(self, graph: str, options: object, providers: list[object]) -> None:
            given.extend(providers)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def get_outputs(self) -> list[object]:
            return []

    ort = load_onnxruntime()
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    OnnxEngine(tmp_path / "a.onnx", device="cuda")
    assert given == [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]


def test_the_embedded_bundle_is_not_built_into() -> None:
    assert rebuild_command(demo_bundle_path(), backend="torch") == (
        "lada-rt build-engine --demo --out demo.bundle --backend torch, and use --bundle demo.bundle"
    )
