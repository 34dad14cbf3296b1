"""The example scripts run on the embedded demo bundle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lada_rt.geometry import CodecGeometry
from stubs import sung

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
N_SAMPLES = CodecGeometry().n_samples(CodecGeometry().n_codes(24_000))


def example(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(EXAMPLES / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def vocal(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "vocal.wav", sung(24_000), 48_000)
    return tmp_path / "vocal.wav"


def test_embed(tmp_path: Path, vocal: Path) -> None:
    done = example("embed.py", vocal, tmp_path / "out.wav")
    assert done.returncode == 0, done.stderr
    assert "RTF" in done.stdout
    samples, rate_hz = soundfile.read(tmp_path / "out.wav")
    assert (samples.shape, rate_hz) == ((N_SAMPLES, 2), 48_000)
    assert np.abs(samples).max() > 0
    missing = example("embed.py", tmp_path / "none.wav", tmp_path / "out.wav")
    assert missing.returncode == 1
    assert missing.stderr.startswith("AudioError: ")
    assert missing.stderr.count("\n") == 1


def test_batch_goes_on_where_it_was(tmp_path: Path, vocal: Path) -> None:
    folder, out = tmp_path / "vocals", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    vocal.rename(folder / "a.wav")
    (folder / "b.wav").write_bytes((folder / "a.wav").read_bytes())
    for name in ("c.wav", "c.flac"):  # two vocals, not one
        soundfile.write(folder / name, sung(24_000), 48_000)
    (folder / "broken.wav").write_text("not audio")
    (folder / "notes.txt").write_text("ignored")
    (out / "b.wav").write_bytes(b"made before")
    done = example("batch.py", folder, out, "--steps", 2, "--flow-steps", 1)
    assert done.returncode == 1
    assert "5 vocals, 1 done before" in done.stdout
    assert "broken.wav" in done.stderr
    assert "Traceback" not in done.stderr
    assert soundfile.info(out / "a.wav").frames == N_SAMPLES
    assert (out / "b.wav").read_bytes() == b"made before"
    assert sorted(p.name for p in out.iterdir()) == ["a.wav", "b.wav", "c.flac.wav", "c.wav.wav"]


def test_cancel(vocal: Path) -> None:
    done = example("cancel.py", vocal, 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["   encode 0/1", "out of time; the pipeline is ready for the next run"]
