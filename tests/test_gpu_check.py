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
    "package",
}


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


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
    assert found["baseline"]["extrapolated"]
    assert found["baseline"]["total_s"] == pytest.approx(sum(found["baseline"]["parts_s"].values()), rel=1e-4)
    assert found["sound"]["vocoder"]["chosen"] in found["sound"]["vocoder"]
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


def test_no_gpu_is_said_in_one_line() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 5
    assert "no GPU" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_extension_is_not_needed_to_start(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['lada_rt._C'] = None; sys.argv = ['gpu_check.py', *sys.argv[1:]]; "
    start = f"{hide}import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    options = ["--device", "cpu", "--tiny", "--only", "ceilings,attention,engines", "--no-compile"]
    command = [sys.executable, "-c", start, *options, "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
