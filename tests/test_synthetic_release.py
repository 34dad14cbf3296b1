"""The synthetic release: laid out as the released one, the same for one seed, and fit to run."""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lada_rt.errors import ExportError, ParamError
from lada_rt_export import synthetic_release
from lada_rt_export.checkpoints import open_tensors
from lada_rt_export.models import clamp3, flow, mask_predictor, mel_vae, mert, muq, vocoder, vq
from lada_rt_export.release import Release
from lada_rt_export.release_files import CLAMP3_FILE
from lada_rt_export.synthetic_release import SyntheticRelease, write_synthetic_release
from lada_rt_export.synthetic_tables import (
    SCALES,
    Table,
    audioldm_table,
    clamp3_table,
    mask_predictor_table,
    mert_table,
    mucodec_table,
    muq_table,
)
from lada_rt_export.synthetic_values import tensor_values

MUCODEC, MUQ, AUDIOLDM = "mucodec/mucodec.pt", "mucodec/muq.pt", "mucodec/audioldm_48k.pth"
CLAMP3, MERT = f"clamp3/{CLAMP3_FILE}", "MERT-v1-95M/pytorch_model.bin"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRelease:
    return write_synthetic_release(tmp_path_factory.mktemp("release"), "tiny", 7)


# -- the synthetic release is laid out as the released one


def digest(table: Table) -> str:
    text = "".join(f"{name} {list(shape)}\n" for name, shape in sorted(table.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_full_size_tables_are_the_published_ones() -> None:
    """Tensors, elements, and a digest over "name [shape]" lines, all taken from spec/*_state_dict.json."""
    full = SCALES["full"]
    tables = {
        "lada_band 1B": mask_predictor_table(full.denoiser),
        "lada_band 3B": mask_predictor_table(mask_predictor.MaskPredictorConfig.lm_3b()),
        "mucodec.pt": mucodec_table(full.sizes),
        "muq.pt": muq_table(full.sizes.muq),
        "audioldm_48k.pth": audioldm_table(full.sizes),
        "clamp3": clamp3_table(full.sizes.clamp3_text, full.sizes.clamp3_audio),
        "mert": mert_table(full.mert),
    }
    found = {name: (len(table), sum(map(math.prod, table.values())), digest(table)) for name, table in tables.items()}
    assert found == {
        "lada_band 1B": (153, 1041837057, "423a7730c0274178"),
        "lada_band 3B": (261, 2921783809, "2758683c00f16c29"),
        "mucodec.pt": (341, 743518642, "5e0c730ee061754b"),
        "muq.pt": (465, 329170226, "e6e2e0295ed0219f"),
        "audioldm_48k.pth": (507, 413817459, "78f1f931a187bb0c"),
        "clamp3": (605, 457896960, "93ac7e3c33b73dd9"),
        "mert": (211, 94371712, "b41490f6704bc2dc"),
    }


def test_scales_keep_the_real_rates_and_grids() -> None:
    full = SCALES["full"].sizes
    for name, scale in SCALES.items():
        sizes = scale.sizes
        assert scale.denoiser.n_codes == sizes.vq.codebook_size == 16384, name
        assert (sizes.flow.latent_frames, sizes.flow.frequencies, sizes.flow.out_channels) == (512, 32, 32)
        assert (sizes.muq.n_mels, sizes.muq.n_fft, sizes.muq.hop_samples) == (128, 2048, 240)
        assert sizes.vocoder.n_mels == sizes.flow.frequencies * 2 ** (len(sizes.mel_vae.multiples) - 1) == 256
        assert math.prod(sizes.vocoder.rates) == 480
        assert sizes.vocoder.n_samples(4096) == full.vocoder.n_samples(4096)
        assert sizes.vq.dim == sizes.muq.dim
        assert sizes.clamp3_audio.hidden_size == scale.mert.hidden_size
    mid = sum(map(math.prod, mask_predictor_table(SCALES["mid"].denoiser).values()))
    assert 90e6 < mid < 110e6


def stored_tables(scale: str) -> dict[str, tuple[tuple[str, ...], Table]]:
    """File below the pretrained root ("" is the checkpoint) -> where its tensors are, and their shapes."""
    s = SCALES[scale]
    return {
        "": (("state_dict",), mask_predictor_table(s.denoiser)),
        MUCODEC: ((), mucodec_table(s.sizes)),
        MUQ: (("model",), muq_table(s.sizes.muq)),
        AUDIOLDM: (("state_dict",), audioldm_table(s.sizes)),
        CLAMP3: (("model",), clamp3_table(s.sizes.clamp3_text, s.sizes.clamp3_audio)),
        MERT: ((), mert_table(s.mert)),
    }


@pytest.mark.parametrize("name", list(stored_tables("tiny")))
def test_every_written_tensor_reads_back_equal(tiny: SyntheticRelease, name: str) -> None:
    keys, table = stored_tables("tiny")[name]
    path = tiny.checkpoint if name == "" else tiny.pretrained_root / name
    with open_tensors(path) as file:
        read = file.tensors(*keys)
        assert table.keys() <= read.keys()
        for key, shape in table.items():
            want = np.concatenate(list(tensor_values(key, shape, 7))).reshape(shape)
            got = read[key].numpy()
            assert got.dtype == want.dtype
            assert np.array_equal(got, want)
            assert np.isfinite(got).all()


@pytest.mark.parametrize("name", ["", MUCODEC, AUDIOLDM, CLAMP3, MERT])
def test_torch_reads_the_written_files_alike(tiny: SyntheticRelease, name: str) -> None:
    keys, _ = stored_tables("tiny")[name]
    path = tiny.checkpoint if name == "" else tiny.pretrained_root / name
    for mmap in (False, True):
        want = torch.load(path, weights_only=True, mmap=mmap)
        for key in keys:
            want = want[key]
        with open_tensors(path) as file:
            read = file.tensors(*keys)
            assert read.keys() == want.keys()
            assert all(torch.equal(read[key].torch(), want[key]) for key in want)


def test_the_codec_encoder_file_needs_a_reader_without_imports(tiny: SyntheticRelease) -> None:
    path = tiny.pretrained_root / MUQ
    with pytest.raises(Exception, match="TrainingConfig"):
        torch.load(path, weights_only=True)
    with pytest.raises(ModuleNotFoundError):
        torch.load(path, weights_only=False)
    with open_tensors(path) as file:
        assert file.data("cfg", "model")["is_flash"] is False
        assert file.data("optimizer_history")[0]["optimizer_name"] == "FairseqAdam"


def test_one_seed_gives_one_release(tiny: SyntheticRelease, tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        return {
            str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }

    again = write_synthetic_release(tmp_path / "again", "tiny", 7)
    other = write_synthetic_release(tmp_path / "other", "tiny", 8)
    first = digests(tiny.checkpoint.parent)
    assert digests(again.checkpoint.parent) == first
    changed = {name for name, value in digests(other.checkpoint.parent).items() if first[name] != value}
    assert changed == {name for name in first if name.endswith((".ckpt", ".pt", ".pth", ".bin"))}


def test_disk_space_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(synthetic_release.shutil, "disk_usage", lambda path: usage._replace(free=5 << 30))
    with pytest.raises(ExportError, match=r"expected 12\.\d+ GB of free space, got 5\.37 GB"):
        write_synthetic_release(tmp_path / "full", "full", 0)
    assert list((tmp_path / "full").iterdir()) == []
    with pytest.raises(ParamError, match="tiny, mid, full"):
        write_synthetic_release(tmp_path / "x", "huge", 0)


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "lada_rt_export.synthetic_release", str(tmp_path / "r"), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    words = done.stdout.split()
    Release.locate(words[1], words[3]).vq()
    assert "GB free" in done.stderr


# -- every network reads, and its outputs are usable


def test_outputs_are_finite_and_not_saturated(tiny: SyntheticRelease) -> None:
    release = Release.locate(tiny.checkpoint, tiny.pretrained_root)
    rng = torch.Generator().manual_seed(0)

    def deviation(x: torch.Tensor) -> float:
        assert torch.isfinite(x).all()
        return float(x.std())

    with torch.no_grad():
        denoiser = release.mask_predictor().build(mask_predictor.MaskPredictor)
        mask = torch.full((1, 20), denoiser.config.mask_id)
        codes = torch.randint(0, 16384, (1, 20), generator=rng)
        assert 0.5 < deviation(denoiser(codes, mask, torch.randn(1, 2, 768, generator=rng))) < 10
        text = release.clamp3_text().build(clamp3.Clamp3Text)
        assert 0.1 < deviation(text(torch.arange(4, 12)[None], torch.arange(2, 10)[None])) < 10
        frames = release.mert().build(mert.Mert)(0.1 * torch.randn(1, 4000, generator=rng))
        assert 0.1 < deviation(frames) < 10
        audio = release.clamp3_audio().build(clamp3.Clamp3Audio)
        assert 0.1 < deviation(audio(frames.mean(1, keepdim=True))) < 10
        hidden = release.muq().build(muq.MuQ)(0.1 * torch.randn(1, 96000, generator=rng))
        assert 0.1 < deviation(hidden) < 10
        assert len(release.vq().build(vq.VQ).encode(hidden.transpose(1, 2)).unique()) > 20  # of 100 frames
        estimator = release.flow().build(flow.Flow)
        assert 0.1 < deviation(estimator(torch.randn(1, 96, 512, 32, generator=rng), torch.full((1,), 0.5))) < 10
        mel = release.mel_vae().build(mel_vae.MelVAE)(torch.randn(1, 16, 8, 32, generator=rng))
        assert mel.shape == (1, 1, 64, 256)
        assert -7 < float(mel.mean()) < -4
        wave = release.vocoder().build(vocoder.Vocoder)(mel[:, 0].transpose(1, 2))
        assert wave.shape == (1, 1, 480 * 64 + 16)
        assert 0.02 < deviation(wave) < 0.6
        assert float((wave.abs() > 0.99).float().mean()) < 0.01


def test_the_tokenizer_marks_text_as_xlm_roberta_does(tiny: SyntheticRelease) -> None:
    from tokenizers import Tokenizer

    data = Release.locate(tiny.checkpoint, tiny.pretrained_root).tokenizer_json()
    tokenizer = Tokenizer.from_buffer(data)
    ids = tokenizer.encode("warm soul, brushed drums").ids
    assert (ids[0], ids[-1]) == (0, 2)
    assert 3 not in ids
    assert tokenizer.encode("").ids == [0, 2]
    assert tokenizer.encode("a <pad> b").ids.count(1) == 1  # typed special tokens are parsed, as in the release
    assert 3 in tokenizer.encode("☃").ids
    assert tokenizer.token_to_id("<mask>") == tokenizer.get_vocab_size() - 1
    assert tokenizer.decode(ids) == "warm soul, brushed drums"
