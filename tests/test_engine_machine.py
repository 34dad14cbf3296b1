"""What a machine is, to engines: the GPU that torch computes on, whatever the driver's tool lists, or whether it is
there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from lada_rt import EngineError, cli
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.engines import cache, machine_for
from lada_rt.engines.cache import EngineEntry, EngineKey, Machine, engine_report, find_engine, write_engine
from lada_rt_export.engine_builders import check_backend, engine_device

VERSION = "2.13.0"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(demo_bundle_path(), tmp_path / "demo.bundle"))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lada_rt_export.host_code.check_compiler", lambda device: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(cache, "_version", lambda backend: VERSION)


def file_engine(bundle: Bundle, backend: str, arch: str) -> EngineEntry:
    key = EngineKey("denoiser", bundle.stages["denoiser"].sha256, backend, VERSION, arch, "fp32", {"T": (1, 2, 3)})
    (bundle.path / "engine.bin").write_bytes(arch.encode())
    return write_engine(bundle.path / "engines", key, [bundle.path / "engine.bin"], {"max_rel_error": 0.0})


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("listed", ["sm_86", None])
@pytest.mark.parametrize("backend", ["torch", "tensorrt"])
def test_engines_are_built_shown_and_run_for_the_gpu_of_torch(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, listed: str | None, backend: str
) -> None:
    """CUDA_VISIBLE_DEVICES=1 with two kinds of GPU, and a container without the driver's tool."""
    monkeypatch.setattr(cache, "_driver_arch", lambda: listed)
    monkeypatch.setattr("lada_rt.engines.torch.device_key", lambda device: "sm_89" if device == "cuda" else "cpu-x")
    check_backend(backend)
    assert engine_device(backend, "auto") == "cuda"
    here = machine_for(backend, "cuda")
    assert here == cache.this_machine(backend) == Machine(VERSION, "sm_89")
    file_engine(bundle, backend, "sm_86")
    with pytest.raises(EngineError, match="was built for sm_86, this device is sm_89; rebuild it with"):
        find_engine(bundle, "denoiser", backend, here)
    fits = file_engine(bundle, backend, "sm_89")
    assert find_engine(bundle, "denoiser", backend, here) == fits
    assert {engine["arch"]: engine["misfit"] for engine in engine_report(bundle)} == {
        "sm_86": "was built for sm_86, this device is sm_89",
        "sm_89": None,
    }


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("backend", ["torch", "tensorrt"])
def test_nothing_is_built_where_torch_does_not_see_the_gpu(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Nor, without a word, for the CPU in its place."""
    monkeypatch.setattr(cache, "_driver_arch", lambda: "sm_90")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device in ("auto", "cuda"):
        with pytest.raises(EngineError, match="expected a CUDA device, this torch sees none; use --device cpu, or"):
            check_backend(backend, device)
    if backend == "torch":
        check_backend(backend, "cpu")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("error", [OSError("libcudart.so.13: cannot open"), RuntimeError("in forked subprocess")])
def test_a_broken_torch_is_for_the_loader_to_tell_of(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(device: str) -> str:
        raise error

    monkeypatch.setattr(cache, "_driver_arch", lambda: "sm_90")
    monkeypatch.setattr("lada_rt.engines.torch.device_key", broken)
    assert cache.this_machine("torch") == Machine(VERSION, "sm_90")


def test_a_bundle_is_inspected_without_torch(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "_version", lambda backend: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    for arch in ("sm_90", "cpu-x86_64-avx2"):
        file_engine(bundle, "torch", arch)
    assert cli.run(["inspect", str(bundle.path)]) == 0
    assert capfd.readouterr().out.count(f"it needs torch {VERSION}, which is not installed") == 2
