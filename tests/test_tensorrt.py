"""The TensorRT backend against a stand-in, the type stub, and the cache of compiled engines. No GPU is needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lada_rt import GenerationParams, Pipeline, cli
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.engines import cache, load_engines
from lada_rt.engines.base import loop_of
from lada_rt.engines.cache import EngineEntry, EngineKey, Machine, find_engine, list_engines, misfit, write_engine
from lada_rt.engines.tensorrt import TensorRTEngine
from lada_rt.errors import EngineError, ExportError
from lada_rt.torch_loop.device import capture
from lada_rt_export.demo.source import DEMO_WEIGHTS, TrainedSource
from lada_rt_export.engine_builders import EngineJob, build_engine, check_backend
from lada_rt_export.revision import EXPORTER
from lada_rt_export.stages import StageSpec, stage_spec
from stubs import sung

ROOT = Path(__file__).resolve().parent.parent
STANDIN = Path(__file__).parent / "standin"
VERSION = "11.4.0.106"


@pytest.fixture(scope="module")
def source() -> TrainedSource:
    return TrainedSource(DEMO_WEIGHTS)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(demo_bundle_path(), tmp_path / "demo.bundle"))


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """TensorRT's stand-in here and in child processes, on a machine that says it has an H100; the file of calls."""
    calls = tmp_path / "calls.txt"
    calls.touch()
    monkeypatch.setenv("STANDIN_CALLS", str(calls))
    monkeypatch.setenv("STANDIN_MODE", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STANDIN), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(STANDIN))
    monkeypatch.setattr(cache, "_gpu_arch", lambda: "sm_90")
    monkeypatch.setattr(cache, "_version", lambda backend: VERSION)
    from lada_rt.engines import tensorrt

    monkeypatch.setattr(tensorrt, "TorchDevice", tensorrt.TorchDevice)  # put back what the stand-in replaces
    yield calls
    sys.modules.pop("tensorrt", None)


def called(calls: Path) -> list[list[str]]:
    return [json.loads(line) for line in calls.read_text().splitlines()]


def demo_spec(source: TrainedSource, stage: str) -> StageSpec:
    return stage_spec(stage, source.module(stage), source.sizes)


def job(bundle: Bundle, source: TrainedSource, stage: str, log: list[str], **changes: frozenset[str]) -> EngineJob:
    made = EngineJob(
        bundle, stage, partial(demo_spec, source, stage), "tensorrt", "cuda", frozenset(), 1 << 40, log.append
    )
    return replace(made, **changes)


# -- building


def test_a_plan_is_built_proven_and_run(bundle: Bundle, source: TrainedSource, standin: Path) -> None:
    log: list[str] = []
    entry = build_engine(job(bundle, source, "denoiser", log))
    made = [name for name, *_ in called(standin)]
    assert made[:5] == ["parse", "clear_flag", "set_timing_cache", "build", "deserialize"]
    assert ["clear_flag", "TF32"] in called(standin)
    assert ["build", "SAME_COMPUTE_CAPABILITY"] in called(standin)  # the key says sm_90, not which model of it
    assert not any(name == "set_flag" for name in made)
    assert made.count("execute") == len(entry.proof["sizes"]) == 3
    assert entry.proof["max_rel_error"] <= 1e-4
    assert entry.proof["method"] == "plan in TensorRT on the GPU"
    assert entry.key == EngineKey(
        "denoiser", bundle.stages["denoiser"].sha256, "tensorrt", VERSION, "sm_90", "fp32",
        {"T": (1, 751, 9001), "P": (0, 2, 2), "R": (1, 751, 9001)}, exporter=EXPORTER,
    )  # fmt: skip
    assert list_engines(bundle) == [entry]
    assert sorted(p.name for p in (bundle.path / "engines").iterdir()) == [
        entry.folder.name,
        f"timings-{VERSION}-sm_90.cache",
    ]
    assert "sm_90" in log[-1]
    standin.write_text("")
    assert build_engine(job(bundle, source, "denoiser", log)) == entry
    assert called(standin) == []
    assert "up to date" in log[-1]

    engines, backend, device = load_engines(bundle, backend="tensorrt")
    assert (backend, device) == ("tensorrt", "cuda")
    inputs = {name: t.numpy() for name, t in demo_spec(source, "denoiser").cases()[1].inputs.items()}
    assert inputs["prefix"].size == 0  # an empty tensor has an address too
    expected = load_engines(bundle, backend="onnxruntime", device="cpu")[0]["denoiser"].run(**inputs)["logits"]
    np.testing.assert_allclose(engines["denoiser"].run(**inputs)["logits"], expected, atol=1e-5)


def test_each_concurrent_run_has_a_context(bundle: Bundle, source: TrainedSource, standin: Path) -> None:
    build_engine(job(bundle, source, "text_encoder", []))
    engine = load_engines(bundle, backend="tensorrt")[0]["text_encoder"]
    standin.write_text("")
    inputs = {name: t.numpy() for name, t in demo_spec(source, "text_encoder").cases()[0].inputs.items()}
    first = engine.run(**inputs)["feature"]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: engine.run(**inputs)["feature"], range(32)):
            np.testing.assert_array_equal(found, first)
    made = [name for name, *_ in called(standin)]
    assert made.count("execute") == 33
    assert 1 <= made.count("create_execution_context") <= 5


def test_a_graph_keeps_the_context_it_was_captured_in(bundle: Bundle, source: TrainedSource, standin: Path) -> None:
    """Runs of other shapes must not touch it, and it goes with the graph."""
    build_engine(job(bundle, source, "text_encoder", []))
    engine = load_engines(bundle, backend="tensorrt")[0]["text_encoder"]
    assert isinstance(engine, TensorRTEngine)
    case = {name: tensor.repeat(1, 2) for name, tensor in demo_spec(source, "text_encoder").cases()[0].inputs.items()}
    standin.write_text("")
    first = engine.run_device(**case)["feature"]
    holds: list[object] = []
    with capture(holds):
        captured = engine.run_device(**case)["feature"]
    assert torch.equal(captured, first)
    made = [name for name, *_ in called(standin)]
    assert made.count("create_execution_context") == 1
    assert made.count("set_input_shape") == len(case)  # before the first run, and never in the capture
    assert len(holds) == 1
    longer = {name: tensor.repeat(1, 2) for name, tensor in case.items()}
    for _ in range(2):
        engine.run_device(**longer)
        engine.run_device(**case)
    made = [name for name, *_ in called(standin)]
    assert made.count("create_execution_context") == 2
    assert not any(context in holds for contexts in engine._idle.values() for context in contexts)


def test_the_main_path_runs_on_plans(bundle: Bundle, standin: Path) -> None:
    """Denoiser, flow, mel decoder and vocoder from plans, their loops on torch tensors, against ONNX Runtime."""
    for stage in ("denoiser", "flow", "mel_decoder", "vocoder"):
        inputs = {entry.name: entry.shape for entry in bundle.stages[stage].inputs}
        shapes = {
            name: [[0 if isinstance(n, str) else n for n in shape], [], [9999] * len(shape)]
            for name, shape in inputs.items()
        }
        plan = bundle.path / "engine.plan"
        graph = bundle.file_path(bundle.stages[stage].graph)
        plan.write_text(json.dumps({"graph": str(graph), "shapes": shapes}))
        key = EngineKey(stage, bundle.stages[stage].sha256, "tensorrt", VERSION, "sm_90", "fp32", {"T": (1, 2, 3)})
        write_engine(bundle.path / "engines", key, [plan], {"max_rel_error": 0.0, "tolerance": 1.0})
    params = GenerationParams(steps=3, flow_steps=1, guidance=1.0)
    vocal = (sung(48_000), 48_000)
    pipe = Pipeline.load(bundle.path, backend="tensorrt")
    looped = {name for name, engine in pipe._engines.items() if loop_of(engine) is not None}
    assert looped == {"denoiser", "flow", "mel_decoder"}
    found = pipe.generate(vocal, text="", params=params)
    expected = Pipeline.load(bundle.path, backend="onnxruntime", device="cpu").generate(vocal, text="", params=params)
    np.testing.assert_array_equal(found.codes, expected.codes)
    # measured 3.5e-5; the demo's mel decoder alone is 1e-5 from torch, as its manifest says
    np.testing.assert_allclose(found.audio, expected.audio, atol=1e-4 * np.abs(expected.audio).max())
    assert ["execute"] in called(standin)


def test_wrong_inputs_are_named(bundle: Bundle, source: TrainedSource, standin: Path) -> None:
    build_engine(job(bundle, source, "text_encoder", []))
    engine = load_engines(bundle, backend="tensorrt")[0]["text_encoder"]
    ids = np.zeros((1, 200), np.int64)
    with pytest.raises(EngineError, match=r"ids: expected a shape from \[1, 2\] to \[4, 128\], got \[1, 200\]"):
        engine.run(ids=ids, positions=ids)
    with pytest.raises(EngineError, match="ids: expected int64, got int32"):
        engine.run(ids=ids.astype(np.int32), positions=ids)
    with pytest.raises(EngineError, match="expected inputs ids, positions, got ids"):
        engine.run(ids=ids)


def test_compatible_engines_ask_for_it_and_say_so(bundle: Bundle, source: TrainedSource, standin: Path) -> None:
    both = frozenset({"later-versions", "ampere-plus"})
    entry = build_engine(job(bundle, source, "text_encoder", [], compatibility=both))
    assert ["set_flag", "VERSION_COMPATIBLE"] in called(standin)
    assert ["build", "AMPERE_PLUS"] in called(standin)
    assert ["deserialize", "True"] in called(standin)
    assert (entry.key.arch, entry.key.any_later_version) == ("sm_80+", True)
    for version, arch, fits in [(VERSION, "sm_80", True), ("11.5.0.1", "sm_120", True), ("11.3.0.1", "sm_90", False)]:
        assert (misfit(entry, bundle, Machine(version, arch)) is None) == fits, (version, arch)


def test_an_engine_less_compatible_than_asked_is_not_enough(
    bundle: Bundle, source: TrainedSource, standin: Path
) -> None:
    log: list[str] = []
    plain = build_engine(job(bundle, source, "text_encoder", log))
    both = frozenset({"later-versions", "ampere-plus"})
    wide = build_engine(job(bundle, source, "text_encoder", log, compatibility=both))
    assert wide.key != plain.key
    assert build_engine(job(bundle, source, "text_encoder", log, compatibility=both)) == wide
    assert build_engine(job(bundle, source, "text_encoder", log)) == plain
    assert [line for line in log if "up to date" in line] == ["text_encoder: tensorrt engine up to date"] * 2
    # the one for this very machine is the faster one
    assert find_engine(bundle, "text_encoder", "tensorrt", HERE) == plain
    assert find_engine(bundle, "text_encoder", "tensorrt", Machine(VERSION, "sm_120")) == wide


def test_timings_are_kept_and_those_of_another_release_dropped(
    bundle: Bundle, source: TrainedSource, standin: Path
) -> None:
    build_engine(job(bundle, source, "text_encoder", []))
    timings = bundle.path / "engines" / f"timings-{VERSION}-sm_90.cache"
    assert timings.read_bytes().endswith(VERSION.encode())
    shutil.rmtree(list_engines(bundle)[0].folder)
    standin.write_text("")
    build_engine(job(bundle, source, "text_encoder", []))
    assert [c for c in called(standin) if c[0] == "set_timing_cache"] == [
        ["set_timing_cache", str(len(timings.read_bytes()))]
    ]
    shutil.rmtree(list_engines(bundle)[0].folder)
    timings.write_bytes(b"of 10.15")
    standin.write_text("")
    build_engine(job(bundle, source, "text_encoder", []))
    assert [c[1] for c in called(standin) if c[0] == "set_timing_cache"] == ["8", "0"]


@pytest.mark.parametrize(
    ("mode", "kind", "says"),
    [
        ("refuse", ExportError, r"refuses the graph: Attention node_7: no such thing"),
        ("nothing", ExportError, r"built no engine"),
        ("crash", EngineError, r"was killed by SIGABRT"),
        ("wrong", ExportError, r"feature of the smallest size .* differs from the float32 module by 1\.00e\+00"),
    ],
)
def test_a_failed_build_leaves_no_engine(
    bundle: Bundle, source: TrainedSource, standin: Path, monkeypatch: pytest.MonkeyPatch, mode: str,
    kind: type[Exception], says: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("STANDIN_MODE", mode)
    with pytest.raises(kind, match=says):
        build_engine(job(bundle, source, "text_encoder", []))
    assert list_engines(bundle) == []
    assert not [p for p in (bundle.path / "engines").iterdir() if p.is_dir()]


def test_without_a_gpu_or_the_package_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_gpu_arch", lambda: None)
    monkeypatch.syspath_prepend(str(STANDIN))
    with pytest.raises(EngineError, match="no NVIDIA GPU found"):
        check_backend("tensorrt")


# -- the cache


def entry_for(bundle: Bundle, stage: str = "denoiser", **changes: object) -> EngineEntry:
    """An engine of random bytes, filed under a key."""
    key = EngineKey(stage, bundle.stages[stage].sha256, "tensorrt", VERSION, "sm_90", "fp32", {"T": (1, 751, 9001)})
    plan = bundle.path / "engine.plan"
    plan.write_bytes(os.urandom(64))
    return write_engine(
        bundle.path / "engines",
        replace(key, **changes),
        [plan],
        {"max_rel_error": 1e-5, "tolerance": 1e-4},  # type: ignore[arg-type]
    )


HERE = Machine(VERSION, "sm_90")


def test_the_folder_names_everything_an_engine_depends_on(bundle: Bundle) -> None:
    entry = entry_for(bundle)
    graph = bundle.stages["denoiser"].sha256[:12]
    assert re.fullmatch(rf"denoiser-{graph}-tensorrt-11\.4\.0\.106-sm_90-fp32-[0-9a-f]{{8}}", entry.folder.name)
    names = {entry.folder.name}
    for change in (
        {"stage": "flow"}, {"network_sha256": "0" * 64}, {"backend": "torch"}, {"backend_version": "11.4"},
        {"arch": "sm_100"}, {"arch": "sm_90+"}, {"precision": "bf16"}, {"profile": {"T": (1, 750, 9001)}},
        {"any_later_version": True}, {"exporter": "another"},
    ):  # fmt: skip
        names.add(replace(entry.key, **change).folder_name)  # type: ignore[arg-type]  # a table of changes
    assert len(names) == 11


@pytest.mark.parametrize(
    ("changes", "machine", "says"),
    [
        ({}, HERE, None),
        ({"network_sha256": "0" * 64}, HERE, "another network"),
        ({"precision": "bf16"}, HERE, "another network"),
        ({"backend_version": "10.16.1.11"}, HERE, "was built by tensorrt 10.16.1.11, this is 11.4.0.106"),
        ({"backend_version": "10.16.1.11", "any_later_version": True}, HERE, None),
        ({"backend_version": "11.10.0.1", "any_later_version": True}, HERE, "was built by tensorrt 11.10.0.1"),
        ({}, Machine(VERSION, "sm_89"), "was built for sm_90, this device is sm_89"),
        ({}, Machine(VERSION, "sm_120"), "was built for sm_90, this device is sm_120"),
        ({"arch": "sm_80+"}, Machine(VERSION, "sm_120"), None),
        ({"arch": "sm_80+"}, Machine(VERSION, "sm_75"), "was built for sm_80+"),
        ({}, Machine(VERSION, "cpu-x86_64"), "this device is cpu-x86_64"),
        ({}, Machine(None, "sm_90"), "which is not installed"),
    ],
)
def test_stale_and_foreign_engines_are_refused(
    bundle: Bundle, changes: dict[str, object], machine: Machine, says: str | None
) -> None:
    entry = entry_for(bundle, **changes)
    reason = misfit(entry, bundle, machine)
    if says is None:
        assert reason is None
        assert find_engine(bundle, "denoiser", "tensorrt", machine) == entry
        return
    assert reason is not None
    assert says in reason
    remedy = r"rebuild it with: lada-rt build-engine .* --backend tensorrt"
    if machine.backend_version is None:
        remedy = "install it with: pip install"
    with pytest.raises(EngineError, match=remedy):
        find_engine(bundle, "denoiser", "tensorrt", machine)


def test_an_engine_of_other_weights_is_refused(bundle: Bundle) -> None:
    """Two checkpoints of one size have the same graph where all weights lie beside it."""
    flow = bundle.stages["flow"]
    entry = entry_for(bundle, stage="flow", network_sha256=flow.sha256)
    assert misfit(entry, bundle, HERE) is None
    assert flow.external_data
    other = replace(flow, external_data=(replace(flow.external_data[0], sha256="0" * 64), *flow.external_data[1:]))
    assert other.graph == flow.graph
    retrained = replace(bundle, stages={**bundle.stages, "flow": other})
    assert "another network" in str(misfit(entry, retrained, HERE))


def test_an_altered_engine_is_refused(bundle: Bundle) -> None:
    entry = entry_for(bundle)
    (entry.folder / "engine.plan").write_bytes(b"something else")
    with pytest.raises(EngineError, match="missing or altered"):
        find_engine(bundle, "denoiser", "tensorrt", HERE)


def test_what_is_no_engine_is_left_out(bundle: Bundle) -> None:
    entry = entry_for(bundle)
    good = (entry.folder / "engine.json").read_text()
    endless = re.sub(r'"bytes": \d+', '"bytes": Infinity', good)
    for name, text in {"a": "{", "b": "[]", "c": "{}", "d": good, entry.folder.name + "x": endless}.items():
        (bundle.path / "engines" / name).mkdir()
        (bundle.path / "engines" / name / "engine.json").write_text(text)
    assert list_engines(bundle) == [entry]


def test_falling_back_is_never_silent(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(cache, "_gpu_arch", lambda: "sm_89")
    monkeypatch.setattr("lada_rt.engines.torch.device_key", lambda device: "sm_89")
    monkeypatch.setattr(cache, "_version", lambda backend: VERSION)
    assert load_engines(bundle)[1] == "onnxruntime"
    assert not caplog.records
    entry_for(bundle)
    assert load_engines(bundle, device="cpu")[1] == "onnxruntime"
    assert not caplog.records  # the CPU was asked for
    assert load_engines(bundle)[1] == "onnxruntime"
    assert "backend tensorrt is not used: the engine of denoiser was built for sm_90" in caplog.text
    assert "rebuild it with" in caplog.text
    soundfile.write(tmp_path / "vocal.wav", sung(4800), 48_000)
    args = ["generate", str(tmp_path / "vocal.wav"), "-o", str(tmp_path / "out.wav"), "--bundle", str(bundle.path)]
    assert cli.run([*args, "--steps", "1", "--flow-steps", "1"]) == 0
    assert "lada-rt: backend tensorrt is not used" in capfd.readouterr().err
    with pytest.raises(EngineError, match="was built for sm_90, this device is sm_89"):
        load_engines(bundle, backend="tensorrt")
    with pytest.raises(EngineError, match="has no engine for it; build them with"):
        load_engines(bundle, backend="torch")


def test_inspect_shows_what_fits(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    entry_for(bundle)
    foreign = entry_for(bundle, backend_version="10.15.1.29")
    monkeypatch.setattr(cache, "_gpu_arch", lambda: "sm_90")
    monkeypatch.setattr(cache, "_version", lambda backend: VERSION)
    assert cli.run(["inspect", str(bundle.path), "--json", str(tmp_path / "i.json")]) == 0
    printed = capfd.readouterr().out
    assert "error 1.0e-05, fits this machine" in printed
    assert "does not run here: it was built by tensorrt 10.15.1.29" in printed
    assert "2 compiled engines" in printed
    report = json.loads((tmp_path / "i.json").read_text())
    assert sorted(e["misfit"] is None for e in report["engines"]) == [False, True]
    (foreign.folder / foreign.files[0].path).write_bytes(b"altered")
    assert cli.run(["inspect", str(bundle.path)]) == EngineError.exit_code
    assert "the file is missing or altered; remove" in capfd.readouterr().err


# -- the type stub

SNIPPET = """\
import tensorrt as trt

def build(builder: trt.Builder, network: trt.INetworkDefinition, context: trt.IExecutionContext) -> None:
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.set_flag(trt.BuilderFlag.FP16)  # bad
    config.set_flag(trt.BuilderFlag.TF32, True)  # bad
    config.max_workspace_size = 1 << 30  # bad
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.HOPPER  # bad
    builder.build_serialized_network(network, config)
    builder.build_engine(network, config)  # bad
    builder.create_optimization_profile().set_shape("x", trt.Dims([1]), trt.Dims([1]), trt.Dims([2]))
    builder.create_optimization_profile().set_shape("x", trt.Dims([1]), trt.Dims([2]))  # bad
    context.set_input_shape("x", (1, 2))
    context.set_binding_shape(0, (1, 2))  # bad
    context.execute_async_v2([1], 0)  # bad
    context.execute_async_v3("stream")  # bad
    trt.IExecutionContext()  # bad
    trt.nptype(trt.DataType.FLOAT)  # bad
    network.num_inputs = 3  # bad
"""


def test_mypy_rejects_what_tensorrt_11_lacks(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", os.devnull, "--python-version", "3.11", "--cache-dir",
         str(tmp_path / "cache"), str(tmp_path / "snippet.py")],
        capture_output=True, text=True, env=os.environ | {"MYPYPATH": str(ROOT / "export" / "typings")}, cwd=tmp_path,
    )  # fmt: skip
    found = {int(number) for number in re.findall(r"snippet\.py:(\d+): error", run.stdout)}
    bad = {index for index, line in enumerate(SNIPPET.splitlines(), 1) if line.endswith("# bad")}
    assert found == bad, run.stdout


LISTING = """TensorRT 11.4.0 Python bindings.

class Color:
    RED
    DARK_BLUE

class Thing:
    __init__(...)
    allocator
    name: str  (read-only)
    size: int
    1. get(self: Thing, name: str) -> Dims
    2. get(self: Thing, name: nvinfer1::v_1_0::ITensor, color: Color = <Color.RED: 0>) -> list[Dims]
    run(self: Thing, data: typing_extensions.Buffer, path: str = None) -> bool
"""


def test_the_stub_is_generated_from_a_listing(tmp_path: Path) -> None:
    (tmp_path / "listing.txt").write_text(LISTING)
    run = subprocess.run(
        [sys.executable, str(ROOT / "export" / "typings" / "generate.py"), str(tmp_path / "listing.txt")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for line in (
        "class Color(enum.Enum):\n    RED = ...\n    DARK_BLUE = ...",
        "allocator: typing.Any",
        "@property\n    def name(self) -> str: ...",
        "    size: int\n",
        "@typing.overload\n    def get(self, name: str) -> Dims: ...",
        "@typing.overload\n    def get(self, name: ITensor, color: Color = ...) -> list[Dims]: ...",
        "def run(self, data: typing_extensions.Buffer, path: str | None = ...) -> bool: ...",
        "class ITensor: ...",
        "class Dims: ...",
    ):
        assert line in run.stdout, line
