"""`Pipeline` with its loops on a device, which is the CPU here: codes, audio and manners are those of the host's loops.

Both pipelines hold the same small networks at a short window. One runs the loops of denoise.py and decode.py around
them, with the C++ kernels, the other those of torch_loop.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lada_rt
import numpy as np
import pytest
import torch
from device_stages import CPU, DENOISER, GEOMETRY, MASK, VOCAB, engines_of, exact_engine, small_modules, whole_engines
from lada_rt import EngineError, GenerationCancelled, GenerationParams, ParamError, Pipeline, cli
from lada_rt.bench.check import Recorder
from lada_rt.bench.loops import check_loops, have_loops
from lada_rt.bundle import Bundle, demo_bundle_path
from lada_rt.engines.base import loop_of
from lada_rt.engines.cache import EngineKey, write_engine
from lada_rt.engines.torch import TorchEngine, device_key
from lada_rt.progress import Progress
from lada_rt.results import Song
from lada_rt.saved_run import load_codes, save_codes
from lada_rt.torch_loop.path import engines_on_device
from stubs import no_threads_left, stub_engines, sung, write_stub_bundle
from torch import Tensor

PARAMS = GenerationParams(steps=5, flow_steps=2, seed=7)
VOCAL = (sung(48_000 * 6), 48_000)  # 151 codes: three windows
#: largest difference of audio over its largest value; measured 6e-7
AUDIO = 1e-5


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("device") / "stub.bundle"
    return Bundle.open(
        write_stub_bundle(
            folder,
            geometry=GEOMETRY.to_json(),
            vocab_size=VOCAB,
            mask_id=MASK,
            prefix_dim=DENOISER.condition_size,
            max_seconds=20,
        )
    )


@pytest.fixture(scope="module")
def engines() -> dict[str, Any]:
    """On the device, the flow in its two parts; text and reference encoder and encoder on the host."""
    return {**stub_engines(), **engines_of(small_modules()), "denoiser": exact_engine()}


@pytest.fixture(scope="module")
def host(bundle: Bundle) -> Pipeline:
    modules = small_modules()
    whole = {**stub_engines(), **whole_engines(modules), "denoiser": exact_engine()}
    assert all(loop_of(engine) is None for engine in whole.values())
    return Pipeline(bundle, whole, backend="host", device="cpu")


def device_pipeline(bundle: Bundle, engines: dict[str, Any], **changes: Any) -> Pipeline:
    held = {name: engine for name, engine in {**engines, **changes}.items() if name != "flow"}
    return Pipeline(bundle, engines_on_device(held, bundle.geometry), backend="torch", device="cpu")


@pytest.fixture(scope="module")
def device(bundle: Bundle, engines: dict[str, Any]) -> Pipeline:
    pipe = device_pipeline(bundle, engines)
    assert {name for name, e in pipe._engines.items() if loop_of(e)} == {"denoiser", "flow", "mel_decoder"}
    return pipe


def test_codes_equal_and_audio_is_close(host: Pipeline, device: Pipeline) -> None:
    for params in (PARAMS, replace(PARAMS, strategy="random", guidance=1.0), replace(PARAMS, strategy="one_shot")):
        expected, found = (pipe.generate(VOCAL, text="soul", params=params) for pipe in (host, device))
        assert np.array_equal(found.codes, expected.codes)
        assert found.audio.shape == expected.audio.shape
        assert np.abs(found.audio - expected.audio).max() < AUDIO * np.abs(expected.audio).max()
        assert found.origin is not None
        assert expected.origin is not None
        assert found.origin.layers[0].latents.shape == expected.origin.layers[0].latents.shape
    assert no_threads_left()


def test_progress_and_timings_are_those_of_the_host(host: Pipeline, device: Pipeline) -> None:
    seen: list[dict[str, list[tuple[int, int]]]] = []
    for pipe in (host, device):
        steps: dict[str, list[tuple[int, int]]] = {}

        def note(progress: Progress, steps: dict[str, list[tuple[int, int]]] = steps) -> None:
            steps.setdefault(progress.stage, []).append((progress.step, progress.total))

        timings = pipe.generate(VOCAL, params=PARAMS, on_progress=note).timings
        seen.append(steps)
        busy = {"encoder", "denoiser", "flow", "mel_decoder"}
        assert busy <= set(timings.engines_s)
        assert all(timings.engines_s[name] > 0 for name in busy)
        assert timings.first_window_s > 0
    assert seen[0] == seen[1]


def test_chunks_joined_equal_generate(device: Pipeline) -> None:
    result = device.generate(VOCAL, params=PARAMS)
    chunks = [chunk.samples for chunk in device.stream(VOCAL, params=PARAMS)]
    assert len(chunks) == 3
    assert np.array_equal(np.concatenate(chunks, axis=1), result.audio)


def test_a_batch_equals_its_songs_alone(device: Pipeline) -> None:
    songs = [Song((sung(48_000, 1), 48_000), text="soul"), Song((sung(60_000, 2), 48_000))]
    found = list(device.generate_batch(songs, params=PARAMS, variations=2))
    assert len(found) == 4
    for index, result in enumerate(found):
        song = songs[index // 2]
        alone = device.generate(song.vocal, text=song.text, params=replace(PARAMS, seed=PARAMS.seed + index % 2))
        assert np.array_equal(result.codes, alone.codes)
        assert np.array_equal(result.audio, alone.audio)


def test_a_region_is_drawn_anew_and_the_rest_kept(host: Pipeline, device: Pipeline) -> None:
    before, wanted = (pipe.generate(VOCAL, params=PARAMS) for pipe in (device, host))
    redone, expected = (
        pipe.regenerate(result, 3.0, 3.6, seed=5) for pipe, result in ((device, before), (host, wanted))
    )
    assert np.array_equal(redone.codes, expected.codes)
    assert not np.array_equal(redone.codes, before.codes)
    assert np.abs(redone.audio - expected.audio).max() < AUDIO * np.abs(expected.audio).max()
    far = slice(0, int(2.4 * 48_000))
    assert np.array_equal(redone.audio[:, far], before.audio[:, far])


def test_a_saved_run_sounds_the_same(device: Pipeline, tmp_path: Path) -> None:
    result = device.generate(VOCAL, params=PARAMS)
    save_codes(tmp_path / "run.npz", result)
    back = device.restore(load_codes(tmp_path / "run.npz"), VOCAL)
    assert np.array_equal(back.audio, result.audio)


def test_long_songs_are_drawn_in_spans(host: Pipeline, device: Pipeline) -> None:
    vocal = (sung(48_000 * 23), 48_000)
    params = replace(PARAMS, steps=2, flow_steps=1)
    expected, found = (pipe.generate(vocal, params=params, long=True) for pipe in (host, device))
    assert len(found.codes) > device._loaded.max_codes
    assert np.array_equal(found.codes, expected.codes)


def test_threads_get_what_one_gets(device: Pipeline) -> None:
    vocals = [(sung(20_000 * n, n), 48_000) for n in range(1, 5)]
    alone = [device.generate(vocal, params=PARAMS) for vocal in vocals]
    found: dict[int, Any] = {}

    def work(index: int) -> None:
        found[index] = device.generate(vocals[index], params=PARAMS)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        assert np.array_equal(found[index].codes, expected.codes)
        assert np.array_equal(found[index].audio, expected.audio)


@pytest.mark.parametrize(("stage", "step"), [("denoise", 0), ("denoise", 3), ("flow", 1), ("flow", 4), ("render", 1)])
def test_cancelling_stops_and_leaves_all_in_order(device: Pipeline, stage: str, step: int) -> None:
    after: list[Progress] = []

    def stop(progress: Progress) -> bool | None:
        if (progress.stage, progress.step) == (stage, step):
            return False
        if after or progress.stage == stage:
            after.append(progress)
        return None

    with pytest.raises(GenerationCancelled):
        device.generate(VOCAL, params=PARAMS, on_progress=stop)
    assert no_threads_left()
    # nothing is held: the next song runs, and is right
    assert len(device.generate((sung(4800), 48_000), params=PARAMS).codes) == 3


def test_an_error_of_the_callback_is_its_own(device: Pipeline) -> None:
    def fail(progress: Progress) -> None:
        if progress.stage == "flow":
            raise RuntimeError("CUDA error of somebody else")

    with pytest.raises(RuntimeError, match="somebody else"):
        device.generate(VOCAL, params=PARAMS, on_progress=fail)
    assert device.generate((sung(4800), 48_000), params=PARAMS).audio.size


def test_a_song_that_waits_for_its_turn_can_be_cancelled(bundle: Bundle, engines: dict[str, Any]) -> None:
    entered, gate = threading.Event(), threading.Event()

    def slow(**inputs: Tensor) -> Tensor:
        entered.set()
        assert gate.wait(30)
        logits: Tensor = exact_engine().run_device(**inputs)["logits"]
        return logits

    pipe = device_pipeline(bundle, engines, denoiser=TorchEngine(slow, ["logits"], CPU))
    first = threading.Thread(target=pipe.generate, args=(VOCAL,), kwargs={"params": PARAMS})
    first.start()
    assert entered.wait(10)
    start = time.monotonic()
    with pytest.raises(GenerationCancelled):
        pipe.generate(VOCAL, params=PARAMS, on_progress=lambda p: time.monotonic() < start + 0.5)
    assert time.monotonic() < start + 5
    gate.set()
    first.join()


# -- what is measured is checked


def test_loops_are_checked_before_they_are_timed(
    bundle: Bundle, device: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(device._engines, PARAMS.steps, PARAMS.flow_steps)
    result = Pipeline(bundle, recorder.engines, backend="torch", device="cpu").generate(VOCAL, params=PARAMS)
    assert len(recorder.rows) == PARAMS.steps  # seen, so they ran on the host
    assert have_loops(device._engines)
    assert not have_loops(recorder.engines)
    errors = check_loops(bundle, device._engines, recorder, PARAMS, result)
    assert errors["loop, one draw"] == 0
    assert errors["loop, audio"] < AUDIO

    def other(name: str, change: Callable[..., Any]) -> dict[str, Any]:
        class Changed:
            run = device._engines[name].run
            loop = staticmethod(change)

        return {**device._engines, name: Changed()}

    loops = {name: loop_of(engine) for name, engine in device._engines.items()}
    draw, decode = loops["denoiser"], loops["flow"]
    assert draw is not None
    assert decode is not None

    def other_seed(vocal: Any, prefix: Any, params: GenerationParams, mask_id: int, **options: Any) -> Any:
        return draw(vocal, prefix, replace(params, seed=params.seed + 1), mask_id, **options)

    def less_guided(*args: Any, **options: Any) -> Any:
        return decode(*args, **{**options, "guidance": 1.2})

    for engines, what in ((other("denoiser", other_seed), "one draw"), (other("flow", less_guided), "audio")):
        with pytest.raises(EngineError, match=f"check: loop, {what}: expected an error of at most"):
            check_loops(bundle, engines, recorder, PARAMS, result)


class OutOfMemory:
    """Fails as torch does where a device's memory ends."""

    def __init__(self, engine: TorchEngine, error: type[Exception]) -> None:
        self.device, self.run, self.error = engine.device, engine.run, error

    def run_device(self, **inputs: Tensor) -> dict[str, Tensor]:
        raise self.error("CUDA out of memory.\nTried to allocate 20.00 GiB.")


@pytest.mark.parametrize("stage", ["denoiser", "flow_prepare", "flow_step", "mel_decoder", "vocoder"])
@pytest.mark.parametrize("inside", ["engine", "package", None])
def test_no_memory_left_is_one_line_with_a_remedy(
    bundle: Bundle, engines: dict[str, Any], stage: str, inside: str | None
) -> None:
    engine = engines[stage]
    # what fails inside a package comes out of it as a plain RuntimeError
    failing = OutOfMemory(engine, RuntimeError if inside == "package" else torch.OutOfMemoryError)
    if inside is not None:
        failing = TorchEngine(failing.run_device, engine._output_names, CPU, name=stage)
    pipe = device_pipeline(bundle, engines, **{stage: failing})
    with pytest.raises(EngineError, match=r"out of memory .*lower max_concurrent.*inspect --device cuda") as caught:
        pipe.generate((sung(9600), 48_000), params=PARAMS)
    assert "\n" not in str(caught.value)
    assert no_threads_left()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_applications_default_dtype_does_not_reach_the_engines(
    bundle: Bundle, engines: dict[str, Any], dtype: torch.dtype
) -> None:
    """Compiled packages take what they get for what they were compiled for."""
    expected = device_pipeline(bundle, engines).generate((sung(9600), 48_000), params=PARAMS)
    torch.set_default_dtype(dtype)
    try:
        found = device_pipeline(bundle, engines).generate((sung(9600), 48_000), params=PARAMS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(found.codes, expected.codes)
    assert np.array_equal(found.audio, expected.audio)


def test_warming_up_meets_every_stage(bundle: Bundle, engines: dict[str, Any]) -> None:
    lengths: dict[str, set[int]] = {}

    def noting(name: str, engine: Any) -> Any:
        def run_device(**inputs: Any) -> Any:
            lengths.setdefault(name, set()).add(max(tensor.shape[-1] for tensor in inputs.values()))
            return tuple(engine.run_device(**inputs).values())

        return TorchEngine(run_device, engine._output_names, CPU)

    class Host:
        def __init__(self, name: str, engine: Any) -> None:
            self._name, self._engine = name, engine

        def run(self, **inputs: Any) -> Any:
            lengths.setdefault(self._name, set())
            return self._engine.run(**inputs)

    noted = {
        name: noting(name, engine) if hasattr(engine, "run_device") else Host(name, engine)
        for name, engine in engines.items()
    }
    pipe = device_pipeline(bundle, noted)
    pipe.warmup(2.0, PARAMS)
    assert set(lengths) == set(noted) - {"flow"}
    assert max(lengths["denoiser"]) == 51  # codes of 2 s
    for bad in (0, -1, float("nan"), True, "3"):
        with pytest.raises(ParamError, match="seconds"):
            pipe.warmup(bad)  # type: ignore[arg-type]


# -- the memory plan


def test_inspect_prints_the_memory_plan_without_torch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "torch", "triton")
    assert cli.run(["inspect", "--json", str(tmp_path / "plain.json")]) == 0
    assert "planned GB" not in capfd.readouterr().out
    assert cli.run(["inspect", "--device", "cuda", "--json", str(tmp_path / "plan.json")]) == 0
    printed = capfd.readouterr().out
    assert "planned GB on a GPU" in printed
    assert "163.84 s" in printed
    plans = json.loads((tmp_path / "plan.json").read_text())["memory_plans"]
    assert list(plans) == ["30", "163.84", "240", "360"]
    sizes = Bundle.open(demo_bundle_path()).stages.values()
    assert {plan["weights"] for plan in plans.values()} == {sum(stage.bytes for stage in sizes)}
    peaks = [plan["peak"] for plan in plans.values()]
    assert peaks == sorted(peaks)
    assert peaks[-1] < 4e9  # the demo's networks, not the released ones


# -- what is missing


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)


def engine_bundle(bundle: Bundle, folder: Path, arch: str) -> Bundle:
    """A copy that says it has a torch engine for its denoiser."""
    copied = Bundle.open(write_stub_bundle(folder / "with-engine.bundle"))
    package = folder / "denoiser.pt2"
    package.write_bytes(b"no package")
    key = EngineKey(
        "denoiser", copied.stages["denoiser"].sha256, "torch", version("torch"), arch, "fp32", {"T": (1, 2, 3)}
    )
    part = {"name": "denoiser", "file": package.name, "sha256": "0" * 64, "bytes": 10, "outputs": ["logits"]}
    write_engine(copied.path / "engines", key, [package], {"max_rel_error": 0.0, "tolerance": 1.0}, {"parts": [part]})
    return copied


def test_no_gpu_is_one_line_and_exit_code_5(
    bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for arch in ("sm_90", device_key("cpu")):
        folder = tmp_path / arch
        folder.mkdir()
        opened = engine_bundle(bundle, folder, arch)
        with pytest.raises(EngineError, match="expected a CUDA device, this torch sees none"):
            Pipeline.load(opened.path, backend="torch", device="cuda")
        args = ["generate", str(tmp_path / "v.wav"), "-o", str(tmp_path / "o.wav"), "--bundle", str(opened.path)]
        (tmp_path / "v.wav").touch()
        assert cli.run([*args, "--backend", "torch", "--device", "cuda"]) == 5
        assert capfd.readouterr().err.strip().count("\n") == 0


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_missing_packages_are_named(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    opened = engine_bundle(bundle, tmp_path, device_key("cpu"))
    # importing the package anew also hangs it on its parent: set, so that it is put back too
    monkeypatch.setattr(lada_rt, "torch_loop", sys.modules["lada_rt.torch_loop"])
    loaded = [name for name in sys.modules if name.startswith(("lada_rt_kernels", "lada_rt.torch_loop"))]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    without(monkeypatch, package)
    load: Callable[..., Any] = Pipeline.load
    if package == "triton":  # everything else is there
        monkeypatch.setattr("lada_rt.engines.torch.load_package", lambda folder, part, device: exact_engine())
        monkeypatch.setattr("lada_rt.engines._onnx_engine", lambda *args: exact_engine())
    with pytest.raises(EngineError, match=f"the package {package} is missing; install it with: pip install"):
        load(opened.path, backend="torch", device="cpu")


@pytest.mark.gpu
def test_gpu_pipeline_draws_the_codes_of_the_host(
    host: Pipeline, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # products have no TF32 by default
    cuda = torch.device("cuda")
    held = {**stub_engines(), **engines_of(small_modules(), "fp32", cuda), "denoiser": exact_engine(cuda)}
    held.pop("flow", None)
    pipe = Pipeline(bundle, engines_on_device(held, bundle.geometry), backend="torch", device="cuda")
    expected = host.generate(VOCAL, params=PARAMS)
    for _ in range(2):  # the second time from the graphs
        found = pipe.generate(VOCAL, params=PARAMS)
        assert np.array_equal(found.codes, expected.codes)
        # other summation orders and transcendentals; not measured yet
        assert np.abs(found.audio - expected.audio).max() < 1e-3 * np.abs(expected.audio).max()
