"""When an engine is built again, and which of a format before or after this one is run: none."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.engines.cache import EngineEntry, EngineKey, Machine, find_engine, list_engines, misfit
from lada_rt.engines.torch import device_key
from lada_rt.errors import EngineError
from lada_rt_export import engine_builders
from lada_rt_export.engine_builders import BuiltEngine, EngineJob, build_engine
from lada_rt_export.stages import StageSpec

HERE = Machine(importlib.metadata.version("torch"), device_key("cpu"))
PROFILE = {"T": (1, 751, 9001)}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(demo_bundle_path(), tmp_path / "demo.bundle"))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that were built: in place of torch's compiler, one that writes random bytes."""
    made: list[str] = []

    def build(job: EngineJob, folder: Path) -> BuiltEngine:
        made.append(job.stage)
        stage = job.bundle.stages[job.stage]
        (folder / "engine.bin").write_bytes(os.urandom(64))
        assert HERE.backend_version is not None
        key = EngineKey(
            job.stage, stage.sha256, "torch", HERE.backend_version, HERE.arch, stage.precision, job.spec().profile
        )
        return BuiltEngine(key, [folder / "engine.bin"], {"max_rel_error": 0.0, "tolerance": 1.0})

    module = types.ModuleType("standin_builder")
    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(engine_builders, "BUILDERS", {"torch": (module.__name__, "torch", "")})
    return made


def job(bundle: Bundle, log: list[str], profile: dict[str, tuple[int, int, int]] | None = None) -> EngineJob:
    def spec() -> StageSpec:
        return StageSpec("denoiser", torch.nn.Module(), {}, {}, profile or PROFILE, lambda rng: [])

    return EngineJob(bundle, "denoiser", spec, "torch", "cpu", frozenset(), 1 << 40, log.append)


def other_profile(entry: EngineEntry, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int, int]]:
    return {"T": (1, 751, 751)}


def other_exporter(entry: EngineEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade: what the graph does not hold, as flow_step.py, may have changed."""
    monkeypatch.setattr(engine_builders, "EXPORTER", "lada-rt 9.0.0, revision 1")


def altered_file(entry: EngineEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry.folder / "engine.bin").write_bytes(b"altered")


def missing_file(entry: EngineEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry.folder / "engine.bin").unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_profile, "another exporter or profile"),
        (other_exporter, "another exporter or profile"),
        (altered_file, "missing or altered"),
        (missing_file, "missing or altered"),
    ],
)
def test_an_engine_that_would_be_another_one_now_is_built_again(
    bundle: Bundle, builds: list[str], monkeypatch: pytest.MonkeyPatch, says: str,
    change: Callable[[EngineEntry, pytest.MonkeyPatch], dict[str, tuple[int, int, int]] | None],
) -> None:  # fmt: skip
    log: list[str] = []
    first = build_engine(job(bundle, log))
    assert build_engine(job(bundle, log)) == first
    assert builds == ["denoiser"]
    profile = change(first, monkeypatch)
    again = build_engine(job(bundle, log, profile))
    assert builds == ["denoiser"] * 2
    assert next(line for line in log if "out of date" in line).endswith(says)
    assert again.files != first.files
    # the runtime, which does not look at profile or exporter, must not find the old one
    assert list_engines(bundle) == [again]
    assert find_engine(bundle, "denoiser", "torch", HERE) == again
    assert build_engine(job(bundle, log, profile)) == again


def test_weights_are_not_read_to_see_that_an_engine_is_up_to_date(bundle: Bundle, builds: list[str]) -> None:
    made = job(bundle, [])
    first = build_engine(made)
    lazy = EngineJob(
        bundle, "denoiser", lambda: pytest.fail("read"), "torch", "cpu", frozenset(), 1 << 40, print, profile=PROFILE
    )
    assert build_engine(lazy) == first


def test_an_old_engine_that_an_interrupted_build_carries_along_goes(bundle: Bundle, builds: list[str]) -> None:
    """The new engine is kept, and the old bundle's, of another profile, was copied beside it once more."""
    old = build_engine(job(bundle, [], {"T": (1, 2, 3)}))
    aside = Path(shutil.copytree(old.folder, bundle.path / "aside"))
    new = build_engine(job(bundle, []))
    aside.rename(old.folder)
    assert len(list_engines(bundle)) == 2
    assert build_engine(job(bundle, [])) == new
    assert list_engines(bundle) == [new]


@pytest.mark.parametrize(("version", "says"), [(1, "by an older lada-rt"), (3, "by a newer lada-rt")])
def test_an_engine_of_another_format_is_refused_and_built_again(
    bundle: Bundle, builds: list[str], version: int, says: str
) -> None:
    entry = build_engine(job(bundle, []))
    data = json.loads((entry.folder / "engine.json").read_text())
    assert data["format_version"] == 2
    folder = entry.folder
    if version == 1:  # as lada-rt wrote it before it knew of formats
        del data["format_version"], data["key"]["exporter"]
        name = EngineKey(**{**data["key"], "profile": PROFILE}).folder_name
        folder = entry.folder.rename(entry.folder.with_name(name))
    else:
        data["format_version"] = version
    (folder / "engine.json").write_text(json.dumps(data))
    (old,) = list_engines(bundle)
    reason = misfit(old, bundle, HERE)
    assert reason == f"was built {says}: it is of format {version}, this one runs 2"
    with pytest.raises(EngineError, match=rf"{reason}; rebuild it with: lada-rt build-engine .* --device cpu"):
        find_engine(bundle, "denoiser", "torch", HERE)
    again = build_engine(job(bundle, []))
    assert builds == ["denoiser"] * 2
    assert find_engine(bundle, "denoiser", "torch", HERE) == again


def test_engines_for_a_cpu_are_for_its_instructions(
    bundle: Bundle, builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One built where there is AVX-512 ends the process elsewhere, where it does not know the instruction."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    built = device_key("cpu")
    assert built.endswith("-avx512")
    monkeypatch.setattr(f"{__name__}.HERE", Machine(HERE.backend_version, built))
    build_engine(job(bundle, []))
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    here = Machine(HERE.backend_version, device_key("cpu"))
    says = rf"was built for {built}, this device is {here.arch}; rebuild it with: .* --backend torch .*--device cpu"
    with pytest.raises(EngineError, match=says):
        find_engine(bundle, "denoiser", "torch", here)
