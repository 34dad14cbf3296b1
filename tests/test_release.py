"""The released layout: finding files, reading each network, and the synthetic release that stands in for it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lada_rt.errors import CheckpointError, ExportError, ParamError
from lada_rt_export import synthetic_release
from lada_rt_export.checkpoints import open_tensors
from lada_rt_export.models import clamp3, flow, latent_norm, mask_predictor, mel_vae, mert, muq, vocoder, vq
from lada_rt_export.release import Network, Release
from lada_rt_export.release_files import CLAMP3_FILE, HUB_FOLDERS
from lada_rt_export.release_sizes import SIZES_FILE, ReleaseSizes
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
from safetensors.torch import save_file

NETWORKS: dict[str, Callable[[Any], torch.nn.Module]] = {
    "mask_predictor": mask_predictor.MaskPredictor,
    "clamp3_text": clamp3.Clamp3Text,
    "clamp3_audio": clamp3.Clamp3Audio,
    "mert": mert.Mert,
    "muq": muq.MuQ,
    "vq": vq.VQ,
    "condition": vq.condition_linear,
    "flow": flow.Flow,
    "latent_norm": lambda grid: latent_norm.LatentNorm(*grid),
    "mel_vae": mel_vae.MelVAE,
    "vocoder": vocoder.Vocoder,
}
MUCODEC, MUQ, AUDIOLDM = "mucodec/mucodec.pt", "mucodec/muq.pt", "mucodec/audioldm_48k.pth"
CLAMP3, MERT = f"clamp3/{CLAMP3_FILE}", "MERT-v1-95M/pytorch_model.bin"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRelease:
    return write_synthetic_release(tmp_path_factory.mktemp("release"), "tiny", 7)


class Copy:
    """A release that a test may spoil."""

    def __init__(self, made: SyntheticRelease, folder: Path) -> None:
        shutil.copytree(made.checkpoint.parent, folder, symlinks=True)
        self.checkpoint = folder / made.checkpoint.name
        self.root = folder / made.pretrained_root.name
        self.hub = self.root / "hub" / HUB_FOLDERS[0]

    def path(self, name: str) -> Path:
        return self.checkpoint if name == "" else self.root / name

    def locate(self, tokenizer: Path | None = None) -> Release:
        return Release.locate(self.checkpoint, self.root, tokenizer)

    def edit(self, name: str, change: Callable[[dict[str, Any]], Any], *keys: str) -> None:
        """Save one file again with its tensors (at a path of keys) changed."""
        with open_tensors(self.path(name)) as file:
            tensors = {key: t.torch().clone() for key, t in file.tensors(*keys).items()}
        change(tensors)
        value: Any = tensors
        for key in reversed(keys):
            value = {key: value}
        save(value, self.path(name))


def save(value: Any, path: Path) -> None:
    """Replace a file whole: views of the old one stay what they were."""
    torch.save(value, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.fixture
def copy(tiny: SyntheticRelease, tmp_path: Path) -> Copy:
    return Copy(tiny, tmp_path / "copy")


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


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_loads_its_own_tensors(tiny: SyntheticRelease, name: str) -> None:
    release = Release.locate(tiny.checkpoint, tiny.pretrained_root)
    network: Network[Any] = getattr(release, name)()
    module = network.build(NETWORKS[name])
    plain = NETWORKS[name](network.config)
    plain.load_state_dict(network.state_dict(), strict=True)
    loaded = module.state_dict()
    assert loaded.keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(loaded[key], value)
        assert value.dtype == torch.float32
    # buffers outside the state dict are real, not left over from a skipped initialisation
    for key, value in plain.named_buffers():
        assert torch.equal(module.get_buffer(key), value)
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


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
        assert len(release.vq().build(vq.VQ).encode(hidden.transpose(1, 2)).unique()) > 2
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


# -- finding files


def test_missing_files_are_all_listed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Release.locate(tmp_path / "lada.ckpt", tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "9 missing" in message
    for name in ("lada.ckpt", MUCODEC, MUQ, AUDIOLDM, CLAMP3, "MERT-v1-95M/config.json", MERT, *HUB_FOLDERS):
        assert name in message
    assert "preprocessor_config.json" in message


def test_published_variants_are_found(copy: Copy) -> None:
    assert copy.locate().files.mucodec == copy.root / MUCODEC
    (copy.root / CLAMP3).rename(copy.root / "clamp3/other_name.pth")
    copy.hub.rename(copy.hub.with_name(HUB_FOLDERS[1]))
    (copy.root / AUDIOLDM).rename(copy.root / "audioldm_48k.pth")
    found = copy.locate().files
    assert found.clamp3.name == "other_name.pth"
    assert HUB_FOLDERS[1] in str(found.tokenizer)
    assert found.audioldm == copy.root / "audioldm_48k.pth"
    assert len(found.all()) == len(set(found.all())) == 9
    shutil.copy(found.clamp3, copy.root / "clamp3/third.pth")
    with pytest.raises(CheckpointError, match="weights_clamp3"):  # which of the two is not for us to say
        copy.locate()


def test_the_tokenizer_is_found_through_its_revision(copy: Copy, tmp_path: Path) -> None:
    main = copy.hub / "refs" / "main"
    revision = main.read_text()
    other = copy.hub / "snapshots" / "0000"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    assert revision in str(copy.locate().files.tokenizer)
    for wrong in ("../../../../etc", "0/0", "\xff", ""):
        main.write_text(wrong, encoding="latin-1")
        with pytest.raises(CheckpointError, match="1 missing"):
            copy.locate()
    shutil.rmtree(other)
    assert revision in str(copy.locate().files.tokenizer)  # the only snapshot
    shutil.rmtree(copy.hub)
    plain = tmp_path / "tokenizer.json"
    plain.write_text("{}")
    assert copy.locate(tmp_path).files.tokenizer == plain
    release = copy.locate(plain)
    with pytest.raises(CheckpointError, match=r"expected an XLM-RoBERTa tokenizer\.json"):
        release.tokenizer_json()


def test_a_tokenizer_with_other_special_ids_is_refused(copy: Copy) -> None:
    path = copy.locate().files.tokenizer
    data = json.loads(path.read_text())
    data["model"]["vocab"][:2] = data["model"]["vocab"][1::-1]
    for token in data["added_tokens"][:2]:
        token["id"] = 1 - token["id"]
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="special tokens"):
        copy.locate().tokenizer_json()


# -- sizes


def test_sizes_survive_json() -> None:
    for scale in SCALES.values():
        data = json.loads(json.dumps(scale.sizes.to_json()))
        assert ReleaseSizes.from_json(data, "x") == scale.sizes
    assert ReleaseSizes.from_json({}, "x") == ReleaseSizes()


@pytest.mark.parametrize(
    "bad",
    [
        [], {"unknown": {}}, {"flow": {"unknown": 1}}, {"flow": {"n_layers": "3"}}, {"flow": {"n_layers": True}},
        {"flow": {"n_layers": -1}}, {"flow": {"n_layers": 2**40}}, {"flow": {"n_layers": 1.5}}, {"flow": 3},
        {"mask_predictor": {"n_heads": 3}}, {"mask_predictor": {"rope_theta": "x"}}, {"vocoder": {"rates": []}},
        {"vocoder": {"dilations": [[1, 3], "x"]}}, {"mask_predictor": {"rtd_head": 1}},
        {"mask_predictor": {"rope_theta": float("inf")}},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_sizes_are_refused(copy: Copy, bad: Any) -> None:
    (copy.checkpoint.parent / SIZES_FILE).write_text(json.dumps(bad))
    with pytest.raises(CheckpointError) as caught:
        copy.locate()
    assert "\n" not in str(caught.value)


def test_sizes_that_do_not_fit_the_tensors_are_refused(copy: Copy) -> None:
    (copy.checkpoint.parent / SIZES_FILE).unlink()
    release = copy.locate()  # now the released sizes are expected
    for name in NETWORKS:
        if name not in ("mert", "latent_norm"):  # MERT states its own sizes; the latent grid is the real one
            with pytest.raises(CheckpointError, match="instead of"):
                getattr(release, name)()


def test_a_3b_checkpoint_is_told_by_its_width() -> None:
    from lada_rt_export.release import _released_size

    class Stored:
        def __init__(self, *shape: int) -> None:
            self.shape = shape

    assert _released_size(Stored(16385, 1536)).n_layers == 28  # type: ignore[arg-type]  # only the shape is read
    assert _released_size(Stored(16385, 1024)).n_layers == 16  # type: ignore[arg-type]  # only the shape is read
    assert _released_size(None).n_layers == 16


# -- what each file may and may not hold


def test_checkpoint_names(copy: Copy) -> None:
    clean = copy.locate().mask_predictor().state_dict()

    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            if name.startswith("model.rtd_head"):
                del tensors[name]  # trained without the head
            elif name.startswith("model.lm."):
                tensors[f"model._orig_mod.{name.removeprefix('model.')}"] = tensors.pop(name)
        tensors["codec_model.model.voc_embed.weight"] = torch.zeros(1)
        tensors["clamp3.model.extra"] = torch.zeros(1)

    copy.edit("", rename, "state_dict")
    again = copy.locate().mask_predictor().state_dict()
    assert again.keys() == clean.keys()
    assert all(torch.equal(again[name], clean[name]) for name in clean)


def test_half_precision_checkpoints_are_widened(copy: Copy) -> None:
    clean = copy.locate().mask_predictor().state_dict()
    original = copy.checkpoint.read_bytes()
    for dtype in (torch.bfloat16, torch.float16):
        copy.checkpoint.unlink()
        copy.checkpoint.write_bytes(original)

        def narrow(tensors: dict[str, Any], dtype: torch.dtype = dtype) -> None:
            tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

        copy.edit("", narrow, "state_dict")
        again = copy.locate().mask_predictor().state_dict()
        assert all(again[name].dtype == torch.float32 for name in clean)
        assert all(torch.equal(again[name], clean[name].to(dtype).float()) for name in clean)


@pytest.mark.parametrize(
    ("name", "keys", "network", "change", "says"),
    [
        ("", ("state_dict",), "mask_predictor", lambda t: t.pop("model.lm.norm.weight"),
         "1 missing: lm.norm.weight [32]"),
        ("", ("state_dict",), "mask_predictor", lambda t: t.update({"model.x": torch.zeros(1)}), "1 unexpected: x"),
        ("", ("state_dict",), "mask_predictor",
         lambda t: t.update({"model.lm.layers.0.mlp.up_proj.lora_A": torch.zeros(1)}), "mixture of adapters"),
        ("", ("weights",), "mask_predictor", lambda t: None, "expected an entry 'state_dict'"),
        (MUCODEC, (), "flow", lambda t: t.pop("cfm_wrapper.estimator.proj_out.bias"), "1 missing: proj_out.bias"),
        (MUCODEC, (), "latent_norm", lambda t: t["normfeat.counts"].fill_(99_999), "at least 100000, got 99999"),
        (MUCODEC, (), "latent_norm", lambda t: t["normfeat.counts"].fill_(math.nan), "at least 100000, got nan"),
        (MUCODEC, (), "latent_norm", lambda t: t["normfeat.sum_x"].fill_(math.inf), "finite latent statistics"),
        (MUCODEC, (), "resample_kernel",
         lambda t: t.update({"rsq48tomuencoder.kernel": torch.zeros(1, 1, 41)}), "[1, 1, 41] instead of [1, 1, 28]"),
        (MUQ, ("model",), "muq", lambda t: t.pop("model.conv.linear.bias"), "1 missing: conv.linear.bias"),
        (AUDIOLDM, ("state_dict",), "mel_vae", lambda t: t.pop("scale_factor"), "1 missing: scale_factor []"),
        (AUDIOLDM, ("state_dict",), "mel_vae", lambda t: t["scale_factor"].zero_(), "positive scale_factor, got 0"),
        (AUDIOLDM, ("state_dict",), "vocoder",
         lambda t: t.update({"first_stage_model.vocoder.ups.0.weight_g": torch.zeros(1)}),
         "1 unexpected: ups.0.weight_g"),
        (CLAMP3, ("model",), "clamp3_text", lambda t: t.pop("text_proj.bias"), "1 missing: text_proj.bias"),
        (CLAMP3, ("model",), "clamp3_audio", lambda t: t.update({"audio_x": torch.zeros(1)}), "1 unexpected: audio_x"),
        (MERT, (), "mert", lambda t: t.pop("encoder.pos_conv_embed.conv.weight_g"), "weight_g [1, 1, 128]"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)  # fmt: skip
def test_wrong_files_are_refused(
    copy: Copy, name: str, keys: tuple[str, ...], network: str, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    real = ("state_dict",) if keys == ("weights",) else keys
    copy.edit(name, change, *real)
    if real != keys:
        save({"weights": {}}, copy.path(name))
    with pytest.raises(CheckpointError) as caught:
        getattr(copy.locate(), network)()
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert copy.path(name).name in message


def test_an_encoder_inside_mucodec_wins(copy: Copy) -> None:
    name = "conv.linear.bias"
    window = muq.CONSTANT_KEYS["window"]
    inner = {name: torch.full((32,), 7.0), window: torch.ones(2048)}
    copy.edit(MUCODEC, lambda t: t.update({f"muencoder.model.{key}": value for key, value in inner.items()}))
    network = copy.locate().muq()
    assert torch.equal(network.state_dict()[name], torch.full((32,), 7.0))
    assert torch.equal(network.constants[window].torch(), torch.ones(2048))
    assert set(network.constants) == set(muq.CONSTANT_KEYS.values())
    assert "mucodec.pt" in network.source


def test_stored_constants_are_optional(copy: Copy) -> None:
    kernel = copy.locate().resample_kernel()
    assert kernel is not None
    assert torch.equal(kernel.torch(), muq.resample_kernel())
    copy.edit(MUCODEC, lambda t: t.pop("rsq48tomuencoder.kernel"))
    copy.edit(MUQ, lambda t: [t.pop("model." + name) for name in muq.CONSTANT_KEYS.values()], "model")
    assert copy.locate().resample_kernel() is None
    assert copy.locate().muq().constants == {}


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"is_flash": True}, "is_flash True instead of False"),
        ({"label_rate": 50}, "label_rate 50 instead of 25"),
        ({"encoder_dim": 512, "n_mels": 80}, "n_mels 80 instead of 128"),
        ({}, ""),
        (None, ""),
    ],
)
def test_the_training_configuration_is_compared(copy: Copy, stated: Any, says: str) -> None:
    path = copy.root / MUQ
    with open_tensors(path) as file:
        tensors = {key: t.torch().clone() for key, t in file.tensors("model").items()}
    save({"model": tensors, "cfg": {"model": stated}}, path)
    if says:
        with pytest.raises(CheckpointError, match=says):
            copy.locate().muq()
    else:
        assert copy.locate().muq().config == copy.locate().sizes.muq


def test_stated_mel_statistics_are_used(copy: Copy) -> None:
    path = copy.root / MUQ
    with open_tensors(path) as file:
        tensors = {key: t.torch().clone() for key, t in file.tensors("model").items()}
    statistics = {"melspec_2048_mean": 5.5, "melspec_2048_std": 20.0, "mfcc_mean": 1.0}
    save({"model": tensors, "cfg": {"model": {"stat": statistics}}}, path)
    release = copy.locate()
    assert release.muq().config == replace(release.sizes.muq, mel_mean=5.5, mel_std=20.0)


def test_codec_as_safetensors(copy: Copy) -> None:
    want = copy.locate().flow().state_dict()
    path = copy.root / MUCODEC
    with open_tensors(path) as file:
        save_file({key: t.torch().clone() for key, t in file.tensors().items()}, path.with_suffix(".safetensors"))
    path.unlink()
    got = copy.locate().flow().state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_both_spellings_of_merts_weight_norm(copy: Copy) -> None:
    want = copy.locate().mert().state_dict()

    def respell(tensors: dict[str, Any]) -> None:
        conv = "encoder.pos_conv_embed.conv."
        tensors[conv + "parametrizations.weight.original0"] = tensors.pop(conv + "weight_g")
        tensors[conv + "parametrizations.weight.original1"] = tensors.pop(conv + "weight_v")

    copy.edit(MERT, respell)
    got = copy.locate().mert().state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("content", "value"),
    [('{"do_normalize": true}', True), ('{"do_normalize": false}', False), ("{}", True),
     ('{"do_normalize": "no"}', None), ('{"do_normalize": 0}', None), ("[]", None), ("{", None), ("[" * 100_000, None)],
    ids=lambda value: str(value)[:25],
)  # fmt: skip
def test_normalisation_is_what_the_folder_says(copy: Copy, content: str, value: bool | None) -> None:
    (copy.root / "MERT-v1-95M/preprocessor_config.json").write_text(content)
    release = copy.locate()
    if value is None:
        with pytest.raises(CheckpointError):
            release.mert_normalizes()
    else:
        assert release.mert_normalizes() is value
