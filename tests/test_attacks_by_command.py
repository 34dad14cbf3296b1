"""Every hostile file in the place of every kind of release file, through the command: exit code 4 and one line."""

from __future__ import annotations

import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from lada_rt import cli
from lada_rt_export.release_files import CLAMP3_FILE
from lada_rt_export.synthetic_release import SyntheticRelease, write_synthetic_release
from test_checkpoint_attacks import bombs, inert_payloads, live_payloads, write_zip

#: below the release's folder; the first stands for the checkpoint itself
PLACES = (
    "",
    "pretrained/mucodec/mucodec.pt",
    "pretrained/mucodec/muq.pt",
    "pretrained/mucodec/audioldm_48k.pth",
    f"pretrained/clamp3/{CLAMP3_FILE}",
    "pretrained/MERT-v1-95M/pytorch_model.bin",
)


def zip_bomb(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N." + bytes(64 << 20))


def nested_zip(path: Path, canary: Path) -> None:
    """A pickle that has torch load a second, malicious file out of its own bytes."""
    inner = write_zip(path, live_payloads(canary)["system"]).read_bytes()
    load = b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(inner)) + inner + b"\x85R."
    write_zip(path, b"\x80\x02" + load)


def legacy_laughs(path: Path, canary: Path) -> None:
    """The older format, its version a hundred lists that each hold the next one twice."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    path.write_bytes(magic + bombs()["laughs"] + pickle.dumps({"little_endian": True}, 2) * 3)


def cut(path: Path, canary: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_structure(path: Path, canary: Path) -> None:
    """One bit of the pickle that says which tensors there are."""
    data = bytearray(path.read_bytes())
    data[data.index(b"_rebuild_tensor_v2") + 3] ^= 4
    path.write_bytes(data)


def pickled(name: str) -> Callable[[Path, Path], None]:
    return lambda path, canary: (write_zip(path, (live_payloads(canary) | inert_payloads() | bombs())[name]), None)[1]


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    "zip bomb": zip_bomb,
    "nested zip": nested_zip,
    "legacy laughs": legacy_laughs,
    "cut short": cut,
    "flipped bit": flip_structure,
    **{name: pickled(name) for name in (*live_payloads(Path("x")), *inert_payloads(), *bombs())},
}
#: what is the same reader for every file runs at one place each, in turn; the others at all
EVERYWHERE = ("zip bomb", "nested zip", "cut short", "flipped bit", "system")
CASES = [
    (name, place)
    for index, name in enumerate(ATTACKS)
    for place in (PLACES if name in EVERYWHERE else (PLACES[index % len(PLACES)],))
]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRelease:
    return write_synthetic_release(tmp_path_factory.mktemp("release"), "tiny", 3)


@pytest.mark.parametrize(("name", "place"), CASES, ids=[f"{name}-{Path(place).stem}" for name, place in CASES])
def test_exit_code_4_and_one_line(
    release: SyntheticRelease, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, place: str
) -> None:
    shutil.copytree(release.checkpoint.parent, tmp_path / "r", symlinks=True)
    checkpoint, canary = tmp_path / "r" / release.checkpoint.name, tmp_path / "canary"
    ATTACKS[name](tmp_path / "r" / place if place else checkpoint, canary)
    out = tmp_path / "song.bundle"
    files = ["--checkpoint", str(checkpoint), "--pretrained-root", str(tmp_path / "r" / "pretrained")]
    assert cli.run(["build-engine", *files, "--out", str(out)]) == 4
    printed, messages = capfd.readouterr()
    assert printed == ""
    assert messages.startswith("lada-rt: CheckpointError: ")
    assert messages.count("\n") == 1
    assert (Path(place).name or checkpoint.name) in messages
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r"]


def test_the_release_is_otherwise_good(
    release: SyntheticRelease, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = ["--checkpoint", str(release.checkpoint), "--pretrained-root", str(release.pretrained_root)]
    out = ["--out", str(tmp_path / "song.bundle"), "--stages", "text_encoder"]
    assert cli.run(["build-engine", *files, *out]) == 0
    assert "text_encoder: " in capfd.readouterr().err
