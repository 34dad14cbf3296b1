"""Files of `generate` that name one another, and names that are no text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from lada_rt import Pipeline, cli
from stubs import stub_pipeline, sung


@pytest.fixture
def files(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a vocal, a reference of the name that a variation gets, and a saved run."""
    pipe = stub_pipeline(tmp_path_factory.mktemp("stub"))
    monkeypatch.setattr(Pipeline, "load", classmethod(lambda cls, *args, **options: pipe))
    for name, seed in (("vocal.wav", 0), ("band.wav", 1), ("other-seed14.wav", 2)):
        soundfile.write(tmp_path / name, sung(48_000 * 2, seed=seed), 48_000)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["generate", "vocal.wav", "-o", "first.wav", "--save-codes", "run.npz"]) == 0
    (tmp_path / "link.wav").symlink_to("band.wav")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("-o band.wav --reference band.wav", "output: band.wav is an input"),
        ("-o ../{folder}/band.wav --reference band.wav", "is an input"),
        ("-o band.wav --reference link.wav", "output: band.wav is an input"),
        ("-o other.wav --reference other-seed14.wav --variations 2", "output: other-seed14.wav is an input"),
        ("-o out.wav --json band.wav --reference band.wav", "--json: band.wav is an input"),
        ("-o out.wav --save-codes band.wav --reference band.wav", "--save-codes: band.wav is an input"),
        ("-o out.wav --keep run.npz --json run.npz", "--json: run.npz is an input"),
        ("-o out.wav --json out.wav", "--json: out.wav is also output"),
        ("-o out.wav --save-codes ./out.wav", "--save-codes: out.wav is also output"),
        ("-o out.wav --json x --save-codes x", "--save-codes: x is also --json"),
    ],
)
def test_nothing_given_or_made_is_overwritten(
    files: Path, capfd: pytest.CaptureFixture[str], options: str, says: str
) -> None:
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    capfd.readouterr()
    assert cli.run(["generate", "vocal.wav", *options.format(folder=files.name).split()]) == 2
    printed, messages = capfd.readouterr()
    assert printed == ""
    assert messages.count("\n") == 1
    assert says in messages
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before


def test_codes_may_replace_the_run_they_come_from(files: Path) -> None:
    before = (files / "run.npz").read_bytes()
    options = ["--keep", "run.npz", "--redo", "0:1", "--seed", "5", "--save-codes", "run.npz"]
    assert cli.run(["generate", "vocal.wav", "-o", "second.wav", *options]) == 0
    assert (files / "run.npz").read_bytes() != before


def test_a_name_that_is_not_text_is_printed_in_its_own_bytes(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "vocal.wav", sung(4800), 48_000)
    out = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    try:
        Path(os.fsdecode(out)).touch()
    except OSError as error:
        pytest.skip(f"this file system takes UTF-8 alone: {error}")
    fast = ["--steps", "1", "--flow-steps", "1", "--guidance", "1"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lada_rt.cli", "generate", str(tmp_path / "vocal.wav"), "-o", out, *fast],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == out
    assert soundfile.info(out).frames > 0
