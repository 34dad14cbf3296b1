"""bench/gpu_check.py runs whole on the CPU: every section, the JSON, the ways it ends early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu_check.py"
SECTIONS = {
    "ceilings",
    "kernels",
    "attention",
    "engines",
    "sound",
    "stage_times",
    "songs",
    "baseline",
    "quiet_loop",
    "flow_package",
    "denoiser_package",
    "mel_decoder_package",
    "vocoder_package",
}


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


def test_every_section_runs_and_is_right(tmp_path: Path) -> None:
    done = run("--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["right"]
    assert found["failed"] == found["skipped"] == {}
    assert set(found["seconds"]) == SECTIONS
    assert found["machine"]["torch"]
    for song in found["songs"]["runs"]:
        assert len(song["denoise_step_s"]) == song["steps"]
        assert len(song["flow_step_s"]) == song["windows"] * song["flow_steps"]
        assert 0 < song["first_audio_s"] <= song["total_s"]
        assert song["rtf"] == pytest.approx(song["total_s"] / song["audio_s"], rel=1e-4)
    baseline = found["baseline"]
    assert baseline["extrapolated_s"] == pytest.approx(sum(baseline["parts_s"].values()), rel=1e-4)
    assert not baseline["extrapolated"]
    assert baseline["total_s"] == baseline["whole_s"]
    target = max((r for r in found["songs"]["runs"] if r["audio_s"] < 1.3), key=lambda r: (r["audio_s"], r["steps"]))
    assert baseline["speedup"] == pytest.approx(baseline["total_s"] / target["total_s"], rel=1e-4)
    assert (baseline["steps"], baseline["audio_s"]) == (target["steps"], target["audio_s"])
    assert found["sound"]["vocoder"]["chosen"] in found["sound"]["vocoder"]
    packages = {name: found[name] for name in SECTIONS if name.endswith("_package")}
    assert {name: p["precision"] for name, p in packages.items()} == {
        "flow_package": "bf16",
        "denoiser_package": "bf16",
        "mel_decoder_package": "fp32",
        "vocoder_package": "fp32",
    }
    assert all(0 < p["proof"]["max_rel_error"] < p["proof"]["tolerance"] for p in packages.values())
    assert "RTF" in done.stdout


def test_a_failing_section_is_reported_and_the_rest_runs(tmp_path: Path) -> None:
    # without engines there are no songs
    done = run("--only", "ceilings,songs", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode == 1
    assert set(found["failed"]) == {"songs"}
    assert found["ceilings"]["copy_gb_s"] > 0
    assert not found["right"]


def test_sections_that_do_not_fit_the_time_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--budget-s", "1", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(path.read_text())["skipped"]) == SECTIONS


SLOW = """
import sys, time
sys.path.insert(0, {bench!r})
import gpu_check
from gpu_songs import Section

def slow(state):
    for n in range(1000):
        state.partial({{"n": n}})
        try:
            time.sleep(0.05)
        except Exception:
            pass  # as a section may

def left(state):
    return {{"left_s": state.time_left()}}

gpu_check.SECTIONS = [
    Section("slow", 1, slow),
    Section("extra", 1, left, essential=False),
    Section("needed", 2, left),
    Section("last", 1, left, essential=False),
]
sys.exit(gpu_check.main(["--device", "cpu", "--budget-s", "5", "--json", {path!r}]))
"""


def test_a_slow_section_leaves_the_essential_ones_their_time(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    script = SLOW.format(bench=str(SCRIPT.parent), path=str(path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    found = json.loads(path.read_text())
    assert found["failed"] == {"slow": "TookTooLong: stopped after 3 s, its limit"}
    assert found["slow"]["n"] > 10  # what it had found
    assert 2.9 < found["seconds"]["slow"] < 3.9
    assert 1.5 < found["needed"]["left_s"] <= 2
    assert set(found["skipped"]) == {"extra"}
    assert "last" in found
    assert not found["right"]


def test_no_gpu_is_said_in_one_line() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 5
    assert "no GPU" in done.stderr
    assert done.stderr.count("\n") == 1


def test_torch_and_triton_are_enough(tmp_path: Path) -> None:
    """A fresh GPU machine has neither the extension nor what reads audio or graphs."""
    missing = ["lada_rt._C", "soundfile", "soxr", "tokenizers", "click", "rich", "onnx", "onnxruntime", "safetensors"]
    hide = f"import sys; sys.modules.update(dict.fromkeys({missing})); sys.argv = ['gpu_check.py', *sys.argv[1:]]; "
    # what the sections of packages import, which take too long to be run here
    once = f"import runpy; runpy.run_path({str(SCRIPT)!r}); import lada_rt_export.stages, lada_rt_export.to_aoti; "
    start = f"{hide}{once}runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    # the sections that call no kernel, which on a CPU are the extension's
    options = ["--device", "cpu", "--tiny", "--only", "ceilings,attention,engines,sound,baseline", "--no-compile"]
    command = [sys.executable, "-c", start, *options, "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
