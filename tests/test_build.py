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
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from lada_rt import cli
from lada_rt.bundle import STAGES, Bundle
from lada_rt.engines.onnxruntime import OnnxEngine
from lada_rt.errors import CheckpointError, EngineError, ExportError, ParamError
from lada_rt.params import GenerationParams
from lada_rt.pipeline import Pipeline
from lada_rt_export import stage_graph, stages, to_onnx, workspace
from lada_rt_export.build import BuildOptions, build_bundle
from lada_rt_export.checkpoints import open_tensors
from lada_rt_export.onnx_check import check_graph
from lada_rt_export.proof import ModuleEngine, output_error, prove, reference
from lada_rt_export.release import Release
from lada_rt_export.release_modules import ReleaseSource
from lada_rt_export.stage_graph import GraphJob, build_graph
from lada_rt_export.stages import stage_precisions, stage_spec
from lada_rt_export.synthetic_release import SyntheticRelease, write_synthetic_release
from lada_rt_export.torch_engine import TorchEngine
from lada_rt_export.workspace import Workspace, check_disk, check_memory, locked
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


def test_encoder_proof_meets_many_codes(built: Built) -> None:
    """A proof on which every frame has one code would prove nothing."""
    source = built.source()
    spec = stage_spec("encoder", source.module("encoder"), source.sizes)
    case = spec.cases()[0]
    with torch.inference_mode():
        codes = spec.module(**case.inputs)
    assert len(codes.unique()) > 10


# -- building again, building on


def build(out: Path, source: ReleaseSource, **options: object) -> tuple[Bundle | None, list[str]]:
    log: list[str] = []
    return build_bundle(out, source, BuildOptions(**options), log.append), log  # type: ignore[arg-type]  # a test's shorthand


def rebuilt(log: list[str]) -> set[str]:
    return {line.split(" ")[0] for line in log if " of " in line and " weights" in line}


def test_an_unchanged_release_is_not_built_again(built: Built, tmp_path: Path) -> None:
    out = built.copy(tmp_path)
    bundle, log = build(out, built.source())
    assert bundle is not None
    assert rebuilt(log) == set()
    assert bundle.sha256 == Bundle.open(built.bundle).sha256
    assert (out / "manifest.json").read_bytes() == (built.bundle / "manifest.json").read_bytes()
    bundle.verify()


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


def test_source_hashes_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    work = Workspace(tmp_path / "song.bundle")
    first = work.sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "file_sha256", lambda path: pytest.fail("hashed again"))
        assert work.sha256(path) == first == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two!")
    assert work.sha256(path) == hashlib.sha256(b"two!").hexdigest()


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


# -- precision and proof


def test_the_precision_of_each_stage() -> None:
    assert set(stage_precisions("fp32").values()) == {"fp32"}
    half = stage_precisions("bf16")
    assert {name for name, precision in half.items() if precision == "bf16"} == {"denoiser", "flow"}
    assert stage_precisions("bf16,vocoder=fp16,flow=fp32") == half | {"vocoder": "fp16", "flow": "fp32"}
    with pytest.raises(ParamError):
        stage_precisions("fp16,ref_encoder=fp16")


@pytest.mark.parametrize(
    ("stage", "precision", "words"),
    [("denoiser", "fp16", "graph in ONNX Runtime"), ("denoiser", "bf16", "torch module"), ("flow", "fp16", "graph in")],
)
def test_half_precision_is_proven_against_the_float32_module(
    built: Built, tmp_path: Path, stage: str, precision: str, words: str
) -> None:
    source = built.source()
    spec = stage_spec(stage, source.module(stage), source.sizes, precision)
    entry = build_graph(GraphJob(spec, tmp_path, 8 << 30, lambda line: None))
    assert entry.precision == precision
    assert words in entry.proof["method"]
    # rounding shows, and stays in bounds
    assert 1e-5 < entry.proof["max_rel_error"] <= entry.proof["tolerance"] == stages.TOLERANCES[precision]
    model = onnx.load(tmp_path / entry.graph.path)
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    wanted = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    attention = [types[name] for node in model.graph.node if node.op_type == "Attention" for name in node.input]
    assert set(attention) == {wanted}
    assert all(v.type.tensor_type.elem_type != wanted for v in (*model.graph.input, *model.graph.output))


def test_a_graph_over_tolerance_is_not_kept(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = built.source()
    spec = stage_spec("text_encoder", source.module("text_encoder"), source.sizes)
    monkeypatch.setattr(stages, "TOLERANCES", {"fp32": 1e-12})
    with pytest.raises(ExportError, match=r"text_encoder: feature of the smallest size .* differs .* allowed 1e-12"):
        build_graph(GraphJob(spec, tmp_path, 8 << 30, lambda line: None))
    assert not list((tmp_path / "graphs").iterdir())


def test_errors_are_relative_and_what_is_no_number_is_infinite() -> None:
    wanted = np.array([[1.0, -4.0]], np.float32)
    assert output_error(wanted + np.float32(0.5), wanted) == pytest.approx(0.125)
    assert output_error(wanted * np.nan, wanted) == float("inf")
    assert output_error(wanted[0], wanted) == float("inf")
    assert output_error(np.array([1, 2, 3, 5]), np.array([1, 2, 3, 4])) == 0.25


def test_sizes_beyond_the_memory_are_left_out_and_named(built: Built) -> None:
    source = built.source()
    spec = stage_spec("ref_encoder", source.module("ref_encoder"), source.sizes)
    expected = reference(spec, 500 << 20)
    assert [case.size for case in expected.cases] == ["smallest", "typical"]
    proof = prove(spec, expected, ModuleEngine(spec, spec.module), "itself")
    assert proof["max_rel_error"] == 0
    assert list(proof["left_out_for_memory"]) == ["largest"]


def test_the_reference_encoder_is_judged_by_mean_and_feature(built: Built) -> None:
    """A sum over thousands of frames would hide what happened to the last chunk's mean."""
    source = built.source()
    spec = stage_spec("ref_encoder", source.module("ref_encoder"), source.sizes)
    results = {
        "frame_sum_out": np.full((1, 4), 1000.0, np.float32),
        "frame_count_out": np.full(1, 500.0, np.float32),
        "feature": np.zeros((1, 3), np.float32),
    }
    compared = spec.compare(results)
    assert set(compared) == {"mean_frame", "feature"}
    assert (compared["mean_frame"] == 2).all()


def test_large_weights_lie_beside_the_graph_in_the_same_bytes(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_onnx, "EXTERNAL_DATA_BYTES", 1 << 16)
    source = built.source()
    digests = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        spec = stage_spec("denoiser", source.module("denoiser"), source.sizes)
        entry = build_graph(GraphJob(spec, folder, 8 << 30, lambda line: None))
        assert [Path(f.path).name for f in entry.files] == ["denoiser.onnx", "denoiser.data"]
        assert entry.external_data[0].bytes > 10 * entry.graph.bytes
        digests.append([f.sha256 for f in entry.files])
    assert digests[0] == digests[1]
    inputs = {name: tensor.numpy() for name, tensor in spec.cases()[0].inputs.items()}
    found = OnnxEngine(folder / entry.graph.path).run(**inputs)
    with torch.inference_mode():
        wanted = spec.module(**spec.cases()[0].inputs).numpy()
    assert output_error(found["logits"], wanted) < 1e-5


def test_max_seconds_limits_the_denoiser(built: Built) -> None:
    release = Release.locate(built.release.checkpoint, built.release.pretrained_root)
    short = ReleaseSource(release, max_seconds=10)
    assert short.sizes.max_frames == 251
    assert short.module("denoiser").max_positions == 253
    spec = stage_spec("denoiser", short.module("denoiser"), short.sizes)
    assert spec.profile["T"] == (1, 251, 251)
    assert short.facts("denoiser") != built.source().facts("denoiser")
    assert short.facts("flow") == built.source().facts("flow")


def test_a_backend_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="the package tensorrt is missing; install it with"):
        BuildOptions(backend="tensorrt")


def test_stage_sources_name_the_file_that_is_wrong(built: Built, tmp_path: Path) -> None:
    checkpoint, root = built.release_copy(tmp_path)
    flip_a_weight(root / AUDIOLDM)
    source = source_of(checkpoint, root)
    assert len(source.module("denoiser").state_dict()) > 0
    with pytest.raises(CheckpointError, match=r"audioldm_48k\.pth"):
        [source.module(name) for name in ("mel_decoder", "vocoder")]


def test_a_bfloat16_graph_is_refused_on_the_cpu(built: Built) -> None:
    from lada_rt.engines import load_engines

    bundle = Bundle.open(built.bundle)
    stage = replace(bundle.stages["denoiser"], precision="bf16")
    with pytest.raises(EngineError, match="bf16, which ONNX Runtime cannot run on the CPU"):
        load_engines(replace(bundle, stages={"denoiser": stage}), backend="onnxruntime", device="cpu")


def test_conversion_dtypes_cover_the_precisions() -> None:
    assert set(stage_graph.DTYPES) == set(stages.PRECISIONS)
