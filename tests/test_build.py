"""build-engine from the released files to a bundle: the whole command, resuming, rebuilding what changed, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from lada_rt import cli
from lada_rt.bundle import STAGES, Bundle
from lada_rt.engines import load_engines
from lada_rt.engines.cache import EngineEntry, list_engines, misfit, this_machine
from lada_rt.errors import CheckpointError, EngineError, ExportError
from lada_rt.params import GenerationParams
from lada_rt.pipeline import Pipeline
from lada_rt_export import torch_builder, workspace
from lada_rt_export.build import BuildOptions, build_bundle
from lada_rt_export.checkpoints import open_tensors
from lada_rt_export.engine_builders import EngineJob
from lada_rt_export.onnx_check import check_graph
from lada_rt_export.release import Release
from lada_rt_export.release_modules import ReleaseSource
from lada_rt_export.stages import StageSpec, stage_spec
from lada_rt_export.synthetic_release import SyntheticRelease, write_synthetic_release
from lada_rt_export.torch_engine import TorchEngine
from lada_rt_export.workspace import check_disk, check_memory, locked
from stubs import sung

MUCODEC, AUDIOLDM = "mucodec/mucodec.pt", "mucodec/audioldm_48k.pth"


@dataclass(frozen=True, slots=True)
class Built:
    """A tiny release and the bundle that the command made of it. Tests copy what they change."""

    release: SyntheticRelease
    bundle: Path
    log: str

    def source(self) -> ReleaseSource:
        return source_of(self.release.checkpoint, self.release.pretrained_root)

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.bundle, folder / "song.bundle"))

    def release_copy(self, folder: Path) -> tuple[Path, Path]:
        """Checkpoint and pretrained root of a copy."""
        shutil.copytree(self.release.checkpoint.parent, folder / "release", symlinks=True)
        return folder / "release" / self.release.checkpoint.name, folder / "release" / "pretrained"


def source_of(checkpoint: Path, root: Path) -> ReleaseSource:
    return ReleaseSource(Release.locate(checkpoint, root))


def command(checkpoint: Path, root: Path, out: Path, *more: str) -> list[str]:
    return ["build-engine", "--checkpoint", str(checkpoint), "--pretrained-root", str(root), "--out", str(out), *more]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("build")
    release = write_synthetic_release(folder / "release", "tiny", 7)
    out = folder / "song.bundle"
    args = command(release.checkpoint, release.pretrained_root, out)
    run = subprocess.run([sys.executable, "-P", "-m", "lada_rt.cli", *args], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{out}\n"
    return Built(release, out, run.stderr)


# -- the bundle


def test_every_stage_is_there_and_proven(built: Built) -> None:
    bundle = Bundle.open(built.bundle)
    bundle.verify()
    assert set(bundle.stages) == set(STAGES)
    for stage in bundle.stages.values():
        assert stage.precision == "fp32"
        assert stage.build_key
        assert 0 <= stage.proof["max_rel_error"] <= stage.proof["tolerance"] <= 0.01
        sizes = stage.proof["sizes"]
        assert list(sizes) in (["smallest", "typical", "largest"], ["smallest", "largest"])
    assert bundle.stages["denoiser"].proof["tolerance"] == 1e-4
    assert not bundle.trained
    names = {Path(f).name for f in built.source().source_files()}
    assert {s["name"] for s in bundle.sources} == names
    assert not list(built.bundle.parent.glob("*.building*"))


def test_tensorrt_would_take_every_graph(built: Built) -> None:
    for stage in Bundle.open(built.bundle).stages.values():
        assert check_graph(built.bundle / stage.graph.path) == []


def test_the_log_names_each_stage_with_its_error_and_the_time_left(built: Built) -> None:
    for index, name in enumerate(STAGES):
        assert f"{name} ({index + 1} of 7)" in built.log
    assert built.log.count("of 1e-04") == 6  # six stages with a float result
    assert "left" not in built.log.split("text_encoder (")[0]
    assert " left" in built.log.split("vocoder (")[1].splitlines()[0]


def test_generated_codes_equal_those_of_the_torch_modules(built: Built, tmp_path: Path) -> None:
    source = built.source()
    bundle = Bundle.open(built.bundle)
    modules = {name: TorchEngine(source.module(name), [t.name for t in bundle.stages[name].outputs]) for name in STAGES}
    vocal, reference_audio = (sung(3 * 48_000), 48_000), (sung(48_000, seed=1), 48_000)
    params = GenerationParams(steps=6, flow_steps=2, guidance=1.5, seed=11)
    results = [
        pipe.generate(vocal, text="warm city pop", reference=reference_audio, params=params)
        for pipe in (
            Pipeline.load(built.bundle, backend="onnxruntime", device="cpu"),
            Pipeline(bundle, modules, backend="torch modules", device="cpu"),
        )
    ]
    np.testing.assert_array_equal(results[0].codes, results[1].codes)
    assert len(set(results[0].codes.tolist())) > 10
    assert results[0].audio.shape == results[1].audio.shape == (2, 76 * 1920)
    np.testing.assert_allclose(results[0].audio, results[1].audio, atol=2e-4)


def test_generate_from_the_bundle_by_command(built: Built, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import soundfile

    vocal = tmp_path / "vocal.wav"
    soundfile.write(vocal, sung(48_000), 48_000)
    out = tmp_path / "out.wav"
    args = ["generate", str(vocal), "-o", str(out), "--bundle", str(built.bundle), "--steps", "2", "--flow-steps", "1"]
    assert cli.run(args) == 0
    assert "UNTRAINED" in capfd.readouterr().err
    audio, rate = soundfile.read(out)
    assert rate == 48_000
    assert audio.shape == (26 * 1920, 2)
    assert np.abs(audio).max() > 0


# -- building again, building on


def build(out: Path, source: ReleaseSource, **options: object) -> tuple[Bundle | None, list[str]]:
    log: list[str] = []
    return build_bundle(out, source, BuildOptions(**options), log.append), log  # type: ignore[arg-type]  # a test's shorthand


def rebuilt(log: list[str]) -> set[str]:
    return {line.split(" ")[0] for line in log if " of " in line and " weights" in line}


def test_an_unchanged_release_is_not_built_again(built: Built, tmp_path: Path) -> None:
    out = built.copy(tmp_path)
    leftovers = [Path("graphs/flow.fp16.onnx"), Path("notes.txt"), Path("engines/flow.building/engine.plan")]
    for leftover in leftovers:  # of a build that was killed
        path = out.with_name(out.name + ".building") / "bundle" / leftover
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half of something")
    bundle, log = build(out, built.source())
    assert bundle is not None
    assert rebuilt(log) == set()
    assert not [leftover for leftover in leftovers if (out / leftover).exists()]
    assert bundle.sha256 == Bundle.open(built.bundle).sha256
    assert (out / "manifest.json").read_bytes() == (built.bundle / "manifest.json").read_bytes()
    bundle.verify()


@pytest.mark.parametrize("name", [".", "..", "../song.bundle"])
def test_a_bundle_named_from_within_itself(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """`rebuild_command` says `--out .` of a bundle that was opened as such."""
    out = built.copy(tmp_path)
    monkeypatch.chdir(out / "graphs" if name == ".." else out)
    again, log = build(Path(name), built.source())
    assert again is not None
    assert rebuilt(log) == set()
    assert again.path == out
    assert [path.name for path in tmp_path.iterdir()] == ["song.bundle"]


def test_a_changed_file_rebuilds_its_stages_only(built: Built, tmp_path: Path) -> None:
    other = write_synthetic_release(tmp_path / "other", "tiny", 8)
    out = built.copy(tmp_path)
    checkpoint, root = built.release_copy(tmp_path)
    shutil.copyfile(other.checkpoint, checkpoint)
    bundle, log = build(out, source_of(checkpoint, root))
    assert bundle is not None
    assert rebuilt(log) == {"denoiser"}
    before = Bundle.open(built.bundle)
    changed = {name for name in STAGES if bundle.stages[name].graph != before.stages[name].graph}
    assert changed == {"denoiser"}
    assert bundle.sha256 != before.sha256
    bundle.verify()


def test_a_damaged_stage_of_the_old_bundle_is_built_again(built: Built, tmp_path: Path) -> None:
    out = built.copy(tmp_path)
    graph = out / "graphs" / "text_encoder.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    bundle, log = build(out, built.source())
    assert bundle is not None
    assert rebuilt(log) == {"text_encoder"}
    assert bundle.sha256 == Bundle.open(built.bundle).sha256


def test_stages_are_built_one_by_one(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "song.bundle"
    bundle, log = build(out, built.source(), stages=("text_encoder",))
    assert bundle is None
    assert not out.exists()
    assert "still to be built" in log[-1]
    assert "denoiser" in log[-1]
    _, log = build(out, built.source(), stages=("text_encoder",))
    assert rebuilt(log) == set()


#: lines of the log after which the build is killed, in turn
KILLS = ["text_encoder (", "  module run", "  largest", "denoiser: ", "vocoder: "]


def test_killed_at_any_stage_the_next_build_ends_with_the_same_bundle(built: Built, tmp_path: Path) -> None:
    """Four stages have to be built; the other three are taken over, so that the test is bearable."""
    out = built.copy(tmp_path)
    manifest = json.loads((out / "manifest.json").read_text())
    for name in ("text_encoder", "denoiser", "flow", "vocoder"):
        manifest["stages"][name]["build_key"] = ""
    (out / "manifest.json").write_text(json.dumps(manifest))
    args = command(built.release.checkpoint, built.release.pretrained_root, out)
    up_to_date = []
    for pattern in [*KILLS, None]:
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "lada_rt.cli", *args],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line.removeprefix("lada-rt: "))
                if pattern is not None and lines[-1].startswith(pattern):
                    os.kill(process.pid, signal.SIGKILL)
                    break
        assert process.wait() == (0 if pattern is None else -signal.SIGKILL), "".join(lines)
        up_to_date.append(sum("up to date" in line for line in lines))
        if pattern is not None:
            Bundle.open(out)  # the old bundle stays whole until the new one is
    assert up_to_date == sorted(up_to_date)
    assert up_to_date[-1] >= 6
    assert Bundle.open(out).sha256 == Bundle.open(built.bundle).sha256
    assert tree(out) == tree(built.bundle)
    assert not list(tmp_path.glob("*.building*"))


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_a_second_build_of_the_same_bundle_is_refused(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "song.bundle"
    with locked(out), pytest.raises(ExportError, match="being built by another process"):
        build(out, built.source())
    with locked(out):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_bundle_is_left_alone(built: Built, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="is not a bundle"):
        build(tmp_path / "precious", built.source())
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "mine"


# -- refusals


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--backend", "magic"], 2, "--backend"),
        (["--precision", "fp8"], 2, "--precision"),
        (["--precision", "bf16,encoder=bf16"], 2, "encoder=bf16"),
        (["--precision", "fp32,organ=fp32"], 2, "organ"),
        (["--stages", "denoiser,organ"], 2, "organ"),
        (["--stages", ""], 2, "--stages"),
        (["--max-seconds", "0"], 2, "--max-seconds"),
        (["--max-seconds", "361"], 2, "--max-seconds"),
        (["--device", "tpu"], 2, "--device"),
        (["--compatibility", "ampere-plus"], 2, "--compatibility"),
        (["--demo"], 2, "--demo"),
        (["--tokenizer", "nowhere.json"], 4, "nowhere.json"),
    ],
)
def test_options_are_checked_before_any_work(
    built: Built, tmp_path: Path, capfd: pytest.CaptureFixture[str], args: list[str], code: int, says: str
) -> None:
    out = tmp_path / "song.bundle"
    assert cli.run(command(built.release.checkpoint, built.release.pretrained_root, out, *args)) == code
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_missing_option_or_backend(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["build-engine", "--out", str(tmp_path / "b"), "--checkpoint", "x"]) == 2
    assert "--pretrained-root" in capfd.readouterr().err
    assert cli.run(command(tmp_path / "x", tmp_path, tmp_path / "b")) == 4
    assert "release files" in capfd.readouterr().err


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_weight(path: Path) -> None:
    """One bit in the middle of the largest tensor."""
    with open_tensors(path) as file:
        place = max(file.places.values(), key=lambda entry: entry.size)
        at = place.start + place.size // 2
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def web_page(path: Path) -> None:
    path.write_text("<!doctype html><title>Sign in</title>")


def run_a_command(path: Path) -> None:
    """A pickle that would touch a file beside the checkpoint."""

    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {path.parent}/owned",)

    torch.save({"state_dict": {"model.x": Evil()}}, path)


def misshape(path: Path) -> None:
    state = torch.load(path, weights_only=False)
    state["state_dict"]["model.to_logits.weight"] = torch.zeros(3, 3)
    torch.save({"state_dict": state["state_dict"]}, path)


def few_counts(path: Path) -> None:
    state = torch.load(path)
    state["normfeat.counts"].fill_(5)
    torch.save(state, path)


BAD = {
    "checkpoint truncated": ("", truncate, ""),
    "checkpoint flipped": ("", flip_a_weight, "denoiser"),
    "checkpoint a web page": ("", web_page, ""),
    "checkpoint malicious": ("", run_a_command, ""),
    "checkpoint misshaped": ("", misshape, ""),
    "checkpoint empty": ("", lambda path: path.write_bytes(b""), ""),
    "checkpoint gone": ("", Path.unlink, ""),
    "mucodec truncated": (MUCODEC, truncate, ""),
    "mucodec unfinished": (MUCODEC, few_counts, ""),
    "audioldm flipped": (AUDIOLDM, flip_a_weight, "vocoder,mel_decoder"),
    "MERT config no JSON": ("MERT-v1-95M/config.json", lambda path: path.write_text("{"), ""),
    "preprocessor gone": ("MERT-v1-95M/preprocessor_config.json", Path.unlink, ""),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gives_exit_code_4_and_one_line(
    built: Built, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    file, damage, stages_read = BAD[name]
    checkpoint, root = built.release_copy(tmp_path)
    damage(checkpoint if file == "" else root / file)  # type: ignore[operator]  # a table of functions
    more = ("--stages", stages_read) if stages_read else ()
    assert cli.run(command(checkpoint, root, tmp_path / "song.bundle", *more)) == 4
    lines = capfd.readouterr().err.splitlines()
    # a tensor's own bytes are read with its stage, whose name was then announced
    assert len([line for line in lines if "Error" in line]) == 1
    assert len(lines) == 1 or stages_read
    assert "CheckpointError: " in lines[-1]
    assert not (tmp_path / "song.bundle").exists()
    assert not (checkpoint.parent / "owned").exists()


def test_disk_and_memory_are_checked_before_the_work(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match=r"expected 1000000\.07 GB of free disk space, got [\d.]+ GB"):
        check_disk(tmp_path / "not" / "yet", 10**15)
    with pytest.raises(ExportError, match=r"flow: expected 1000000\.0 GB of free memory"):
        check_memory("flow", 10**15)
    monkeypatch.setattr(workspace, "available_memory", lambda: 1 << 20)
    with pytest.raises(ExportError, match="of free memory to build it, got 0"):
        build(tmp_path / "song.bundle", built.source(), stages=("text_encoder",))
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1))  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match="free disk space"):
        build(tmp_path / "song.bundle", built.source(), stages=("text_encoder",))


# -- engines and sizes


def test_max_seconds_limits_the_denoiser(built: Built) -> None:
    release = Release.locate(built.release.checkpoint, built.release.pretrained_root)
    short = ReleaseSource(release, max_seconds=10)
    assert short.sizes.max_frames == 251
    assert short.module("denoiser").max_positions == 253
    spec = stage_spec("denoiser", short.module("denoiser"), short.sizes)
    assert spec.profile["T"] == (1, 251, 251)
    assert short.facts("denoiser") != built.source().facts("denoiser")
    assert short.facts("flow") == built.source().facts("flow")


def test_a_torch_engine_is_built_filed_and_used(built: Built, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = built.copy(tmp_path)
    bundle, log = build(out, built.source(), backend="torch", device="cpu", stages=("text_encoder",))
    assert bundle is not None
    (entry,) = list_engines(bundle)
    assert (entry.key.stage, entry.key.backend, entry.key.backend_version) == (
        "text_encoder",
        "torch",
        version("torch"),
    )
    assert 0 <= entry.proof["max_rel_error"] <= entry.proof["tolerance"] == 1e-4
    assert bundle.sha256 == Bundle.open(built.bundle).sha256  # engines are no part of what a bundle is
    engines, backend, device = load_engines(bundle, backend="torch", device="cpu", n_threads=1)
    assert (backend, device) == ("torch", "cpu")
    assert "no torch engine for encoder, ref_encoder, denoiser" in caplog.text
    assert set(engines) == set(STAGES)
    inputs = {"ids": np.array([[0, 9, 2]]), "positions": np.array([[2, 3, 4]])}
    wanted = load_engines(bundle, backend="onnxruntime", device="cpu")[0]["text_encoder"].run(**inputs)["feature"]
    np.testing.assert_allclose(engines["text_encoder"].run(**inputs)["feature"], wanted, atol=1e-5)
    # building anew keeps the engine while its graph is the same
    again, log = build(out, built.source(), backend="torch", device="cpu", stages=("text_encoder",))
    assert again is not None
    assert "text_encoder: torch engine up to date" in log
    assert [e.folder.name for e in list_engines(again)] == [entry.folder.name]


def test_a_torch_engine_is_filed_under_the_version_it_is_looked_for(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.__version__ has a suffix on GPU builds that the installed distribution's version has not."""
    limits: list[int] = []
    description = {
        "torch": "2.11.0+cu130",
        "device_key": "sm_90",
        "parts": [{"name": "denoiser", "file": "denoiser.pt2"}],
        "proof": {"max_rel_error": 0.0, "tolerance": 1.0},
    }
    monkeypatch.setattr(
        torch_builder, "build_engine", lambda *_, **options: limits.append(options["memory_bytes"]) or description
    )
    bundle, source = Bundle.open(built.bundle), built.source()

    def spec() -> StageSpec:
        return stage_spec("denoiser", source.module("denoiser"), source.sizes)

    job = EngineJob(bundle, "denoiser", spec, "torch", "cuda", frozenset(), 1 << 40, lambda line: None)
    key = torch_builder.build(job, tmp_path).key
    assert limits == [1 << 40]  # --memory-gb holds for the engine's proof too
    entry = EngineEntry(key, tmp_path, (), description["proof"])
    monkeypatch.setattr("lada_rt.engines.cache._gpu_arch", lambda: "sm_90")
    assert misfit(entry, bundle, this_machine("torch", "cuda")) is None


def test_stage_sources_name_the_file_that_is_wrong(built: Built, tmp_path: Path) -> None:
    checkpoint, root = built.release_copy(tmp_path)
    flip_a_weight(root / AUDIOLDM)
    source = source_of(checkpoint, root)
    assert len(source.module("denoiser").state_dict()) > 0
    with pytest.raises(CheckpointError, match=r"audioldm_48k\.pth"):
        [source.module(name) for name in ("mel_decoder", "vocoder")]


def test_a_bfloat16_graph_is_refused_on_the_cpu(built: Built) -> None:
    bundle = Bundle.open(built.bundle)
    stage = replace(bundle.stages["denoiser"], precision="bf16")
    with pytest.raises(EngineError, match="bf16, which ONNX Runtime cannot run on the CPU"):
        load_engines(replace(bundle, stages={"denoiser": stage}), backend="onnxruntime", device="cpu")
