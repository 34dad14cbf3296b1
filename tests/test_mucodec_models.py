"""MuCodec networks against goldens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_weights import mel_vae_state, select_weights
from lada_rt.errors import CheckpointError, ParamError
from lada_rt_export.models import flow, latent_norm, mel_vae, muq, vocoder, vq
from lada_rt_export.models.stages_mucodec import EncoderStage, FlowStage, MelDecoderStage, VocoderStage
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
#: goldens that a checkout holds itself: all stages of the codec, so that no stage goes untested without the full folder
COMMITTED = ("resample", "encoder_subset", "flow_subset", "normfeat", "vae", "vocoder_chunk")

# tolerances of the golden README, float32
DEFAULT = {"rtol": 1e-4, "atol": 1e-5}
RESAMPLE = NORMFEAT = {"rtol": 1e-5, "atol": 1e-6}
DIT = VOCODER = {"rtol": 1e-4, "atol": 2e-5}
INFER = VAE = {"rtol": 1e-4, "atol": 5e-5}


def for_goldens(pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the test once for every sidecar that matches."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        vars(test)["golden_pattern"] = pattern
        return test

    return mark


def load(case: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads(case.read_text()), load_file(case.with_suffix(".safetensors"))


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return select_weights(tensors, "w.")


def close(got: Tensor, want: Tensor, *, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def record(module: nn.Module, into: dict[str, Any], name: str) -> None:
    def hook(_module: nn.Module, _args: object, output: Any) -> None:
        into[name] = output

    module.register_forward_hook(hook)


# ---- encoder -----------------------------------------------------------------------------------------------


@for_goldens("mucodec_resample*.json")
def test_resample_golden(golden_case: Path) -> None:
    _, t = load(golden_case)
    close(muq.resample_kernel(), t["kernel"], rtol=0, atol=1e-7)
    close(muq.resample_to_24k(t["x"].unsqueeze(1), t["kernel"]).squeeze(1), t["y"], **RESAMPLE)


@for_goldens("mucodec_melfront*.json")
def test_mel_front_end_golden(golden_case: Path) -> None:
    meta, t = load(golden_case)
    p = meta["params"]
    front = muq.MelFrontEnd(
        muq.MuQConfig(
            sample_rate=p["sr"],
            n_fft=p["n_fft"],
            hop_samples=p["hop"],
            n_mels=p["n_mels"],
            mel_mean=p["mean"],
            mel_std=p["std"],
        )
    )
    close(front.filterbank.t(), t["fb"], rtol=0, atol=1e-6)
    close(front.window, t["window"], rtol=0, atol=1e-6)
    front.load_constants(t["window"], t["fb"])

    power = front.mel_power(t["wav"], keep_last=True)
    close(power, t["mel_power"], rtol=1e-4, atol=1e-4)
    decibels = front.decibels(power)
    loud = t["mel_power"] > 1e-6
    close(decibels[loud], t["mel_db"][loud], rtol=0, atol=2e-3)
    close(decibels, t["mel_db"], rtol=0, atol=0.05)
    close(front(t["wav"]), t["mel_norm"], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("n_fft", "hop"), [(2048, 240), (64, 16), (60, 25), (64, 64)])
def test_mel_power_equals_that_of_an_fft(n_fft: int, hop: int) -> None:
    front = muq.MelFrontEnd(muq.MuQConfig(n_fft=n_fft, hop_samples=hop, n_mels=8))
    torch.manual_seed(3)
    wav = torch.randn(2, 48 * hop)
    spectrum = torch.stft(wav, n_fft, hop, window=front.window, return_complex=True)
    expected = front.filterbank @ spectrum.abs().square()
    close(front.mel_power(wav, keep_last=True), expected, rtol=1e-4, atol=1e-5)
    close(front.mel_power(wav), expected[:, :, :-1], rtol=1e-4, atol=1e-5)


def muq_config(c: dict[str, Any], **changes: Any) -> muq.MuQConfig:
    optional = {
        "n_mels": "n_mels",
        "hop": "hop_samples",
        "rotary_base": "rotary_base",
        "conv_depthwise_kernel_size": "depthwise_kernel",
    }
    given = {field: c[name] for name, field in optional.items() if name in c}
    return muq.MuQConfig(
        **{
            "conv_dim": c["conv_dim"],
            "dim": c["encoder_dim"],
            "n_layers": c["encoder_depth"],
            "n_heads": c["num_attention_heads"],
            "ffn_dim": c["intermediate_size"],
            **given,
            **changes,
        }
    )


def build_muq(config: muq.MuQConfig, tensors: dict[str, Tensor], prefix: str = muq.KEY_PREFIX) -> muq.MuQ:
    model = muq.MuQ(config)
    model.load_state_dict(select_weights(tensors, prefix, muq.dead_keys(config)), strict=True)
    taken = model.load_constants(select_weights(tensors, prefix))
    assert taken == [name for name in muq.CONSTANT_KEYS.values() if prefix + name in tensors]
    return model


@for_goldens("mucodec_conformer*.json")
def test_conformer_golden(golden_case: Path) -> None:
    meta, t = load(golden_case)
    model = build_muq(muq_config(meta["config"], final_norm=True), weights(t))
    seen: dict[str, Tensor] = {}
    layer = model.conformer.layers[0]
    for name, part in {"ffn1": "ffn1", "attn": "self_attn", "conv": "conv_module", "ffn2": "ffn2"}.items():
        record(layer.get_submodule(part), seen, f"l0.{name}_out")

    states = model.hidden_states(t["mel_norm"])
    assert len(states) == meta["config"]["encoder_depth"] + 1
    for i, state in enumerate(states):
        close(state, t[f"hidden_{i}"], **DEFAULT)
    for name in (n for n in t if n.startswith("l0.")):
        close(seen[name], t[name], **DEFAULT)

    close(model.front_end(t["wav"]), t["mel_norm"], rtol=0, atol=1e-3)
    close(model(t["wav"]), states[-1], rtol=0, atol=5e-4)


@for_goldens("mucodec_conformer*.json")
def test_fewer_layers_give_the_same_hidden_states(golden_case: Path) -> None:
    meta, t = load(golden_case)
    for n_layers in range(meta["config"]["encoder_depth"]):
        model = build_muq(muq_config(meta["config"], n_layers=n_layers), weights(t))
        close(model.hidden_states(t["mel_norm"])[-1], t[f"hidden_{n_layers}"], **DEFAULT)


def test_encoder_constants_of_a_wrong_shape_are_refused() -> None:
    model = muq.MuQ(muq.MuQConfig(conv_dim=4, dim=8, n_heads=2, n_layers=0, n_fft=64, hop_samples=16, n_mels=8))
    for name in muq.CONSTANT_KEYS.values():
        with pytest.raises(CheckpointError, match=re.escape(name)):
            model.load_constants({name: torch.zeros(3)})


def build_vq(config: vq.VQConfig, tensors: dict[str, Tensor], prefix: str = vq.KEY_PREFIX) -> vq.VQ:
    model = vq.VQ(config)
    model.load_state_dict(select_weights(tensors, prefix, vq.DEAD_KEYS), strict=True)
    return model


def vq_config(c: dict[str, Any], **changes: int) -> vq.VQConfig:
    return vq.VQConfig(dim=c["input_dim"], codebook_size=c["codebook_size"], codebook_dim=c["codebook_dim"], **changes)


@for_goldens("mucodec_vq*.json")
def test_vq_golden(golden_case: Path) -> None:
    _, t = load(golden_case)
    size, codebook_dim = t["w.quantizers.0.codebook.weight"].shape
    config = vq.VQConfig(dim=t["z"].shape[1], codebook_size=size, codebook_dim=codebook_dim)
    model = build_vq(config, weights(t), "quantizers.0.")
    close(model.latents(t["z"]), t["latents"], **DEFAULT)
    want, clear = t["codes"][:, 0], t["cos_gap"].reshape(t["codes"][:, 0].shape) > 1e-5
    assert clear.any()
    assert torch.equal(model.encode(t["z"])[clear], want[clear])
    close(model.decode(want), t["from_codes"], **DEFAULT)
    close(model.decode(want), t["z_q"], rtol=1e-4, atol=2e-5)


def test_equal_codebook_rows_give_the_lowest_index() -> None:
    model = vq.VQ(vq.VQConfig(dim=6, codebook_size=8, codebook_dim=4))
    model.codebook.weight[3] = model.codebook.weight[6] = model.codebook.weight[7]
    # the third row's own direction, led back through the pseudo-inverse of the projection
    z = torch.linalg.pinv(model.in_proj.folded_weight()) @ model.codebook.weight[3]
    assert model.encode(z.reshape(1, 6, 1)).item() == 3


@for_goldens("mucodec_sound2code.json")
def test_encoder_stage_golden(golden_case: Path) -> None:
    check_encoder_stage(golden_case)


@for_goldens("mucodec_encoder_subset*.json")
def test_encoder_stage_subset(golden_case: Path) -> None:
    check_encoder_stage(golden_case)


def check_encoder_stage(golden_case: Path) -> None:
    meta, t = load(golden_case)
    tensors, c = weights(t), meta["config"]
    encoder = build_muq(muq_config(c, n_layers=c["layer_index"]), tensors, "muencoder." + muq.KEY_PREFIX)
    stage = EncoderStage(encoder, build_vq(vq_config(c["rvq"]), tensors), tensors[muq.RESAMPLE_KERNEL_KEY])
    audio = t["audio"].clamp(-1, 1)
    audio = audio / max(1.0, audio.abs().max().item() / 0.8)
    want = t["codes_all_windows"][:, 0]
    window = 1966560
    n_windows = want.shape[0]
    looped = audio.repeat(1, -(-n_windows * window // audio.shape[1]))[:, : n_windows * window]
    got = torch.cat([stage(looped[None, :, i * window : (i + 1) * window]) for i in range(n_windows)])
    clear = t["cos_gap"] > 1e-3
    assert torch.equal(got[clear], want[clear])
    assert (got == want).float().mean() > 0.99


# ---- flow --------------------------------------------------------------------------------------------------


def flow_config(c: dict[str, Any], latent_frames: int) -> flow.FlowConfig:
    return flow.FlowConfig(
        n_layers=c["num_layers"],
        n_heads=c["num_attention_heads"],
        head_dim=c["attention_head_dim"],
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        patch=c["patch_size"],
        latent_frames=latent_frames,
    )


def build_flow(config: flow.FlowConfig, tensors: dict[str, Tensor], prefix: str = flow.KEY_PREFIX) -> flow.Flow:
    model = flow.Flow(config)
    model.load_state_dict(select_weights(tensors, prefix, flow.DEAD_KEYS), strict=True)
    return model


@for_goldens("mucodec_dit*.json")
def test_flow_golden(golden_case: Path) -> None:
    meta, t = load(golden_case)
    model = build_flow(flow_config(meta["config"], t["x"].shape[2]), weights(t), "")
    seen: dict[str, Any] = {}
    record(model.pos_embed, seen, "after_pos_embed")
    record(model.adaln_single, seen, "ada")
    for i, block in enumerate(model.transformer_blocks):
        record(block, seen, f"block_{i}_out")
        record(block.get_submodule("attn1"), seen, f"block_{i}_attn_out")

    close(model(t["x"], t["t"]), t["out"], **DIT)
    seen["ada6"], seen["embedded_timestep"] = seen.pop("ada")
    seen["timestep_sincos"] = flow.timestep_features(t["t"], model.adaln_single.frequencies)
    close(model.pos_embed.table, t["pe_added"], rtol=0, atol=1e-6)
    for name in t.keys() & seen.keys():
        close(seen[name], t[name], **DIT)
    assert {
        "after_pos_embed",
        "ada6",
        "embedded_timestep",
        "timestep_sincos",
        "block_0_out",
    } <= t.keys() & seen.keys()
    for name in t:
        if grid := re.fullmatch(r"pe_grid_d(\d+)_(\d+)x(\d+)", name):
            dim, rows, cols = map(int, grid.groups())
            close(flow.position_table(rows, cols, dim), t[name], rtol=0, atol=1e-6)


def build_flow_stage(meta: dict[str, Any], tensors: dict[str, Tensor], latent_frames: int) -> FlowStage:
    c = meta["config"]
    dit = build_flow(flow_config(c["dit"], latent_frames), tensors)
    condition_dim = tensors[vq.CONDITION_KEY_PREFIX + "weight"].shape[0]
    config = vq_config(c["rvq"], condition_dim=condition_dim)
    linear = vq.condition_linear(config)
    linear.load_state_dict(select_weights(tensors, vq.CONDITION_KEY_PREFIX), strict=True)
    return FlowStage(dit, build_vq(config, tensors), linear)


@for_goldens("mucodec_infer*_w[0-9]*.json")
def test_flow_stage_golden(golden_case: Path) -> None:
    check_flow_stage(golden_case)


@for_goldens("mucodec_flow_subset*.json")
def test_flow_stage_subset(golden_case: Path) -> None:
    check_flow_stage(golden_case)


def check_flow_stage(golden_case: Path) -> None:
    """Solve the flow with Euler steps and guidance; compare what the case recorded on the way."""
    meta, t = load(golden_case)
    weights_case = golden_case.parent / meta["weights_file"]
    tensors = weights(load_file(weights_case))
    length, head = meta["latent_length"], meta["incontext_length"]
    stage = build_flow_stage(json.loads(weights_case.with_suffix(".json").read_text()), tensors, length)
    codes = t["codes"][:, 0]
    if "cond" in t:
        close(stage.condition(codes), t["cond"], **INFER)

    context = torch.zeros_like(t["noise"])
    norm = latent_norm.LatentNorm()
    norm.load_state_dict(select_weights(tensors, latent_norm.KEY_PREFIX, latent_norm.DEAD_KEYS), strict=True)
    if head:
        context[:, :, :head] = norm.normalise(t["true_latents_head"][:, :, :head])
    x, times = t["noise"], torch.linspace(0, 1, meta["num_steps"] + 1)
    time, step = times[0], times[1] - times[0]
    for i in range(meta["num_steps"]):
        # sigma 1e-4: mucodec spec 3.4
        mixed = (1 - (1 - 1e-4) * time) * t["noise"] + time * context
        x = torch.cat([mixed[:, :, :head], x[:, :, head:]], dim=2)
        pair = (x.expand(2, -1, -1, -1), context.expand(2, -1, -1, -1), codes.expand(2, -1))
        velocity = stage(*pair, torch.tensor([0.0, 1.0]), time.expand(2))
        if f"step{i}_v" in t:
            close(velocity, t[f"step{i}_v"], **INFER)
        free, led = velocity.split(1)
        x = x + step * (free + meta["guidance_scale"] * (led - free))
        time = time + step
        step = times[min(i + 2, meta["num_steps"])] - time
    x = torch.cat([context[:, :, :head], x[:, :, head:]], dim=2)
    close(norm.denormalise(x), t["latents_out"], **INFER)


def test_flow_refuses_another_grid() -> None:
    model = flow.Flow(flow.FlowConfig(n_layers=1, n_heads=1, head_dim=4, latent_frames=4))
    with pytest.raises(ParamError, match="built for a 4 x 32 grid, got 6 x 32"):
        model(torch.zeros(1, 96, 6, 32), torch.zeros(1))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-2), (torch.bfloat16, 4e-2)])
def test_half_weights_stay_near_float32(dtype: torch.dtype, limit: float) -> None:
    """Relative L2 error; a time vector or a norm in half precision would miss these by far."""
    torch.manual_seed(5)
    config = vq.VQConfig(dim=16, codebook_size=10, codebook_dim=4)
    dit = flow.Flow(flow.FlowConfig(n_layers=2, n_heads=2, head_dim=8, latent_frames=4))
    stages: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
        (
            FlowStage(dit, vq.VQ(config), vq.condition_linear(config)),
            (
                *torch.randn(2, 2, 32, 4, 32),
                torch.randint(10, (2, 8)),
                torch.ones(2),
                torch.tensor([0.0, 0.95]),
            ),
        ),
        (MelDecoderStage(small_vae()), (torch.randn(1, 16, 4, 32),)),
        (VocoderStage(small_vocoder()), (torch.randn(1, 256, 6),)),
    ]
    for stage, inputs in stages:
        want = stage(*inputs)
        got = stage.to(dtype)(*inputs)
        assert got.dtype == torch.float32
        assert (got - want).norm() < limit * want.norm()


# ---- latent statistics -------------------------------------------------------------------------------------


@for_goldens("mucodec_normfeat*.json")
def test_latent_norm_golden(golden_case: Path) -> None:
    _, t = load(golden_case)
    norm = latent_norm.LatentNorm(*t["before.sum_x"].shape)
    before = select_weights(t, "before.", latent_norm.DEAD_KEYS)
    norm.load_state_dict(before, strict=True)
    projected = norm.normalise(t["x"])
    close(projected, t["projected"], **NORMFEAT)
    close(norm.denormalise(projected), t["returned"], **NORMFEAT)
    for name, value in norm.state_dict().items():
        close(value, t["after." + name], **NORMFEAT)
    if norm.counts.item() < latent_norm.MIN_COUNTS:
        with pytest.raises(CheckpointError, match=r"normfeat\.counts should be at least 100000"):
            norm.frozen_stats()


def test_final_statistics_are_constant_and_exact() -> None:
    rng = np.random.default_rng(6)
    mean, std = rng.normal(size=(4, 3)), rng.uniform(0.5, 2, size=(4, 3))
    norm = latent_norm.LatentNorm(4, 3)
    norm.counts.fill_(latent_norm.MIN_COUNTS)
    norm.sum_x.copy_(torch.from_numpy(mean * latent_norm.MIN_COUNTS))
    norm.sum_x2.copy_(torch.from_numpy((std**2 + mean**2) * latent_norm.MIN_COUNTS))
    got_mean, got_std = norm.frozen_stats()
    np.testing.assert_allclose(got_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_std, std, rtol=1e-4)
    z = torch.from_numpy(rng.normal(size=(2, 4, 5, 3)).astype(np.float32))
    before = norm.counts.clone()
    got = norm.normalise(z).numpy()
    np.testing.assert_allclose(got, (z.numpy() - mean[:, None]) / std[:, None], rtol=1e-3, atol=1e-5)
    assert torch.equal(norm.counts, before)


# ---- mel decoder -------------------------------------------------------------------------------------------


def vae_config(c: dict[str, Any], **changes: int) -> mel_vae.MelVAEConfig:
    return mel_vae.MelVAEConfig(
        channels=c["ch"],
        multiples=tuple(c["ch_mult"]),
        n_res_blocks=c["num_res_blocks"],
        latent_channels=c["z_channels"],
        embed_channels=c["embed_dim"],
        out_channels=c["out_ch"],
        **changes,
    )


def small_vae(**changes: Any) -> mel_vae.MelVAE:
    return mel_vae.MelVAE(
        mel_vae.MelVAEConfig(**{"channels": 8, "multiples": (1, 2), "n_res_blocks": 1, "norm_groups": 4, **changes})
    )


@for_goldens("mucodec_vae*.json")
@pytest.mark.parametrize("attention_block", [1024, 50])
def test_mel_vae_golden(golden_case: Path, attention_block: int) -> None:
    meta, t = load(golden_case)
    model = mel_vae.MelVAE(vae_config(meta["config"], attention_block=attention_block))
    state = {"scale_factor": t["scale_factor"]}
    state |= {mel_vae.KEY_PREFIX + name: tensor for name, tensor in weights(t).items()}
    model.load_state_dict(mel_vae_state(state), strict=True)
    seen: dict[str, Tensor] = {}
    record(model.decoder.mid.attn_1, seen, "mid_attn_out")
    close(model(t["latent"]), t["mel"], **VAE)
    close(seen["mid_attn_out"], t["mid_attn_out"], **VAE)
    close(MelDecoderStage(model)(t["latent"]), t["mel"][:, 0].transpose(1, 2), **VAE)


# ---- vocoder -----------------------------------------------------------------------------------------------


def vocoder_config(c: dict[str, Any]) -> vocoder.VocoderConfig:
    return vocoder.VocoderConfig(
        n_mels=c["num_mels"],
        initial_channels=c["upsample_initial_channel"],
        rates=tuple(c["upsample_rates"]),
        kernels=tuple(c["upsample_kernel_sizes"]),
        resblock_kernels=tuple(c["resblock_kernel_sizes"]),
        dilations=tuple(tuple(d) for d in c["resblock_dilation_sizes"]),
    )


def small_vocoder() -> vocoder.Vocoder:
    return vocoder.Vocoder(
        vocoder.VocoderConfig(initial_channels=32, resblock_kernels=(3, 7), dilations=((1, 3), (1, 3)))
    )


@for_goldens("mucodec_vocoder*.json")
def test_vocoder_golden(golden_case: Path) -> None:
    meta, t = load(golden_case)
    model = vocoder.Vocoder(vocoder_config(meta["config"]))
    model.load_state_dict(select_weights(weights(t), "", vocoder.DEAD_KEYS), strict=True)
    whole = model(t["mel"])
    assert whole.shape[2] == model.config.n_samples(t["mel"].shape[2])
    close(whole, t["wav"] if "wav" in t else t["wav_full"].unsqueeze(1), **VOCODER)
    for name in (n for n in t if n.startswith("wav_chunked")):
        first = re.fullmatch(r"wav_chunked_first(\d+)", name)
        mel = t["mel"][:, :, : int(first[1])] if first else t["mel"]
        close(
            vocoder.vocode_in_chunks(model, mel, meta["chunk_frames"], meta["shift_frames"]),
            t[name],
            **VOCODER,
        )


def test_released_vocoder_adds_sixteen_samples() -> None:
    config = vocoder.VocoderConfig()
    assert [config.n_samples(n) for n in (1, 1024, 4096)] == [496, 491536, 1966096]


def test_chunk_shift_is_checked() -> None:
    with pytest.raises(ParamError, match="between 0 and chunk_frames = 8, got 8"):
        vocoder.vocode_in_chunks(small_vocoder(), torch.zeros(1, 256, 9), 8, 8)


@pytest.mark.parametrize("kind", COMMITTED)
def test_committed_goldens_cover_every_stage(kind: str) -> None:
    folder = ROOT / "tests" / "golden"
    found = [case for case in folder.glob(f"mucodec_{kind}*.json") if case.with_suffix(".safetensors").is_file()]
    assert found, f"{folder} should hold at least one mucodec_{kind}*.json with its tensors"
