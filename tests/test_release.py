"""The released layout: finding files, reading each network, and refusing what does not fit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lada_rt.errors import CheckpointError
from lada_rt_export.checkpoints import open_tensors
from lada_rt_export.models import clamp3, flow, latent_norm, mask_predictor, mel_vae, mert, muq, vocoder, vq
from lada_rt_export.release import Network, Release
from lada_rt_export.release_files import CLAMP3_FILE, HUB_FOLDERS
from lada_rt_export.release_sizes import SIZES_FILE, ReleaseSizes
from lada_rt_export.synthetic_release import SyntheticRelease, write_synthetic_release
from lada_rt_export.synthetic_tables import (
    SCALES,
)
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


# -- every network reads


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
        {"mask_predictor": {"n_heads": 0}}, {"mask_predictor": {"n_kv_heads": 0}}, {"clamp3_text": {"n_heads": 0}},
        {"mask_predictor": {"n_heads": 3}}, {"mask_predictor": {"rope_theta": "x"}}, {"vocoder": {"rates": []}},
        {"vocoder": {"dilations": [[1, 3], "x"]}}, {"mask_predictor": {"rtd_head": 1}},
        {"mask_predictor": {"rope_theta": float("inf")}},
        {"flow": {"n_layers": 257}}, {"clamp3_text": {"n_layers": 1 << 20}}, {"mel_vae": {"n_res_blocks": 1 << 20}},
        {"muq": {"mel_std": 0}}, {"vocoder": {"rates": [0, 5, 4, 2, 2]}}, {"vocoder": {"kernels": [5, 10, 8, 4, 4]}},
        {"vocoder": {"dilations": [[0, 3, 5]] * 4}}, {"vocoder": {"resblock_kernels": [4, 7, 11, 15]}},
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


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_weights_that_are_no_floats_are_refused(copy: Copy, dtype: torch.dtype) -> None:
    name = "model.lm.norm.weight"
    copy.edit("", lambda t: t.update({name: t[name].to(dtype)}), "state_dict")
    with pytest.raises(CheckpointError, match=r"lm\.norm\.weight \w+") as caught:
        copy.locate().mask_predictor().build(mask_predictor.MaskPredictor)
    assert "\n" not in str(caught.value)


def test_double_precision_is_narrowed(copy: Copy) -> None:
    name = "model.lm.norm.weight"
    clean = copy.locate().mask_predictor().build(mask_predictor.MaskPredictor).state_dict()
    copy.edit("", lambda t: t.update({name: t[name].double()}), "state_dict")
    found = copy.locate().mask_predictor().build(mask_predictor.MaskPredictor).state_dict()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in clean.items())


@pytest.mark.parametrize(
    "bad",
    [
        {"hidden_size": 7_680_000_000_000_000}, {"num_hidden_layers": 1_000_000_000}, {"conv_dim": [1] * 1000},
        {"num_attention_heads": 0}, {"hidden_size": "768"},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_sizes_of_mert_are_refused(copy: Copy, bad: dict[str, Any]) -> None:
    path = copy.path(MERT).with_name("config.json")
    stated = json.loads(path.read_text()) | bad
    path.unlink()
    path.write_text(json.dumps(stated))
    with pytest.raises(CheckpointError) as caught:
        copy.locate().mert()
    assert "\n" not in str(caught.value)


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
