"""Text and reference audio to the prefix, driven through the runtime's own code on torch-backed engines."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_weights import select_weights
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lada_rt import condition
from lada_rt.condition import (
    MAX_TOKENS,
    MIN_CHUNK_SAMPLES,
    assemble_prefix,
    encode_reference,
    encode_text,
    load_tokenizer,
    position_ids,
    reference_chunks,
    round_bf16,
    tokenize,
)
from lada_rt.errors import AudioError, BundleError, GenerationCancelled, ParamError
from lada_rt_export.models import mert as mert_file
from lada_rt_export.models.clamp3 import (
    AUDIO_DEAD_KEYS,
    AUDIO_KEYS,
    TEXT_DEAD_KEYS,
    TEXT_KEYS,
    Clamp3Audio,
    Clamp3AudioConfig,
    Clamp3Text,
    Clamp3TextConfig,
)
from lada_rt_export.models.mert import Mert, MertConfig, fold_positional_conv
from lada_rt_export.models.stages_condition import RefEncoderStage, TextEncoderStage
from lada_rt_export.torch_engine import TorchEngine
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

GOLDEN_PATTERN = "clamp3_ref_audio_path*.json"
HERE = Path(__file__).resolve().parent
ATOL = 5e-5
Floats = np.ndarray


def branch_sizes(config: dict[str, Any], name: str) -> dict[str, Any]:
    c = config[name]
    return {
        "hidden_size": c["hidden_size"],
        "n_layers": c["num_hidden_layers"],
        "n_heads": c["num_attention_heads"],
        "intermediate_size": c["intermediate_size"],
        "max_positions": c["max_position_embeddings"],
        "n_token_types": c["type_vocab_size"],
        "layer_norm_eps": c["layer_norm_eps"],
        "output_size": config["clamp3_hidden_size"],
    }


def text_engine(folder: Path, sidecar: dict[str, Any]) -> TorchEngine:
    config = sidecar["config"]
    sizes = branch_sizes(config, "text_model")
    model = Clamp3Text(Clamp3TextConfig(vocab_size=config["text_model"]["vocab_size"], **sizes))
    stored = load_torch(folder / sidecar["weights"])
    model.load_state_dict(select_weights(stored, drop=TEXT_DEAD_KEYS, keep=TEXT_KEYS))
    return TorchEngine(TextEncoderStage(model), ["feature"])


class RecordingEngine:
    """The reference stage, remembering what the host fed it and what came back."""

    def __init__(self, folder: Path, sidecar: dict[str, Any], do_normalize: bool) -> None:
        config = sidecar["config"]
        audio = Clamp3Audio(Clamp3AudioConfig(**branch_sizes(config, "audio_model")))
        stored = load_torch(folder / sidecar["weights"])
        audio.load_state_dict(select_weights(stored, drop=AUDIO_DEAD_KEYS, keep=AUDIO_KEYS))
        mert = Mert(MertConfig.from_json(config["mert"]))
        stored = load_torch(folder / sidecar["mert_weights"])
        mert.load_state_dict(fold_positional_conv(select_weights(stored, drop=mert_file.DEAD_KEYS)))
        self.hidden_size = mert.config.hidden_size
        self.frames: list[Floats] = []
        mert.register_forward_hook(lambda _module, _args, out: self.frames.append(out[0].numpy()))
        self.engine = TorchEngine(
            RefEncoderStage(mert, audio, do_normalize), ["frame_sum_out", "frame_count_out", "feature"]
        )
        self.waveforms: list[Floats] = []
        self.last: dict[str, Floats] = {}

    def run(self, **inputs: Floats) -> dict[str, Floats]:
        self.waveforms.append(inputs["waveform"][0])
        self.last = self.engine.run(**inputs)
        return self.last


def check_embed(feature: Floats, embed: Floats, what: str) -> None:
    """At least 95 % of the bfloat16 values identical, the rest within one unit in the last place."""
    ours = round_bf16(feature)
    assert ours.shape == embed.shape, what
    assert (ours == embed).mean() >= 0.95, what
    assert (np.abs(ours - embed) <= 2.0**-7 * np.abs(embed)).all(), what


def hash_noise(salt: int, n: int) -> Floats:
    """The generated waveform of the goldens' README, exact in float32."""
    i = np.arange(n, dtype=np.uint64)
    h = (i + np.uint64(salt)) * np.uint64(2654435761) % np.uint64(2**32)
    h ^= h >> np.uint64(16)
    h = h * np.uint64(0x85EBCA6B) % np.uint64(2**32)
    h ^= h >> np.uint64(13)
    v = (h >> np.uint64(8)).astype(np.float64) * 2.0**-23 - 1
    return (v * 2.0 ** -((i // np.uint64(12000) % np.uint64(4)).astype(np.float64) + 1)).astype(np.float32)


def input_of(case: dict[str, Any], g: dict[str, Floats]) -> Floats:
    stored = g.get(f"{case['name']}.waveform")
    if stored is not None:
        return stored[0]
    if "generator" in case:
        assert case["generator"]["kind"] == "hash_noise"
        waveform = hash_noise(case["generator"]["salt"], case["generator"]["num_samples"])
        assert waveform[: len(case["first8"])].tolist() == case["first8"]
        assert hashlib.sha256(waveform.astype("<f4").tobytes()).hexdigest() == case["sha256_f32le"]
        return waveform
    words = re.match(r"first (\d+) samples of (\S+\.waveform)", case["input"])
    assert words, case["input"]
    return g[words[2]][0, : int(words[1])]


def test_reference_path_matches(golden_case: Path) -> None:
    sidecar = json.loads(golden_case.read_text())
    g = load_file(golden_case.with_suffix(".safetensors"))
    assert sidecar["cases"]
    for case in sidecar["cases"]:
        check_reference(golden_case.parent, sidecar, case, g)


def check_reference(folder: Path, sidecar: dict[str, Any], case: dict[str, Any], g: dict[str, Floats]) -> None:
    name = case["name"]
    engine = RecordingEngine(folder, sidecar, case["do_normalize"])
    bf16 = case["precision"].startswith("bf16")
    feature = encode_reference(
        engine, input_of(case, g), case["chunk_samples"], bf16=bf16, hidden_size=engine.hidden_size
    )
    assert [len(f) for f in engine.frames] == case["frames_per_chunk"], name
    assert engine.last["frame_count_out"].tolist() == [sum(case["frames_per_chunk"])], name
    heard = np.concatenate(engine.waveforms)
    assert len(heard) == case["num_samples"], name
    if f"{name}.waveform_rounded" in g:
        np.testing.assert_array_equal(heard, g[f"{name}.waveform_rounded"][0], err_msg=name)
    mean = engine.last["frame_sum_out"] / engine.last["frame_count_out"]
    pairs = {"mert_mean": mean[0], "mert_frames": np.concatenate(engine.frames), "feature_f32": feature}
    for key in ("mert_mean", "mert_frames", "feature_f32"):
        if key != "mert_frames" or f"{name}.{key}" in g:  # too many to store for a long input
            np.testing.assert_allclose(pairs[key], g[f"{name}.{key}"][0], rtol=0, atol=ATOL, err_msg=name)
    prefix = assemble_prefix(None, feature, bf16=bf16)
    if bf16:
        check_embed(feature, g[f"{name}.embed"][0, 0], name)
        np.testing.assert_array_equal(prefix[0, 0], round_bf16(feature))
    else:
        np.testing.assert_allclose(prefix[0, 0], g[f"{name}.embed"][0, 0], rtol=0, atol=ATOL)


def test_bf16_rounding_matches(golden: Path) -> None:
    for path in sorted(golden.glob("clamp3_*.safetensors")):
        g = load_file(path)
        if "bf16.in" in g:
            np.testing.assert_array_equal(round_bf16(g["bf16.in"]), g["bf16.out"])


class RecordedTokenizer:
    """Stands in for a tokenizer.json that is not there: the golden's own ids."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def encode(self, text: str) -> RecordedTokenizer:
        return self


def test_text_path_matches(golden: Path) -> None:
    for path in sorted(golden.glob("clamp3_text_path*.json")):
        sidecar = json.loads(path.read_text())
        g = load_file(path.with_suffix(".safetensors"))
        if not (golden / sidecar["weights"]).is_file():
            continue
        assert sidecar["max_length"] == MAX_TOKENS
        engine = text_engine(golden, sidecar)
        file = golden / sidecar["tokenizer"]
        tokenizer = load_tokenizer(file) if file.is_file() else None
        for row, text in enumerate(sidecar["texts"]):
            n = sidecar["lengths"][row]
            assert int(g["attention_mask"][row].sum()) == n
            stored = g["input_ids"][row, :n]
            used: Any = tokenizer or RecordedTokenizer(stored.tolist())
            if tokenizer is not None:
                np.testing.assert_array_equal(tokenize(tokenizer, text), stored)
            feature = encode_text(engine, used, text)
            np.testing.assert_allclose(feature, g["feature_f32"][row], rtol=0, atol=ATOL)
            check_embed(feature, g["embed"][row, 0], text)


def test_prefix_matches(golden: Path) -> None:
    for path in sorted(golden.glob("clamp3_prefix*.safetensors")):
        g = load_file(path)
        text, empty, ref = (g[k][0, 0] for k in ("text_embed", "empty_text_embed", "audio_embed"))
        np.testing.assert_array_equal(assemble_prefix(text, ref), g["both"])
        np.testing.assert_array_equal(assemble_prefix(text, None), g["text_only"])
        np.testing.assert_array_equal(assemble_prefix(empty, ref), g["audio_and_empty_text"])
        np.testing.assert_array_equal(assemble_prefix(None, ref), g["audio_only_api"])


def test_the_committed_goldens_cover_the_host_side() -> None:
    for kind in ("clamp3_text_path", "clamp3_prefix", "clamp3_small_clamp3"):
        assert (HERE / "golden" / f"{kind}.safetensors").is_file(), kind


def test_no_engine_library_is_imported() -> None:
    tree = ast.parse(Path(condition.__file__).read_text())
    imported = {n.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    imported |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & {"torch", "onnxruntime", "lada_rt_export"}


@given(hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32, allow_subnormal=True)))
def test_bf16_rounding_equals_torch(x: Floats) -> None:
    before = x.copy()
    expected = torch.from_numpy(x).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(round_bf16(x), expected)
    np.testing.assert_array_equal(x, before)


def test_every_nan_stays_nan() -> None:
    bits = np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0xFF800001, 0x7FC00000], dtype=np.uint32)
    rounded = round_bf16(bits.view(np.float32))
    assert np.isnan(rounded).all()
    assert not (rounded.view(np.uint32) & 0xFFFF).any()
    assert round_bf16(np.array([np.inf, -np.inf], np.float32)).tolist() == [np.inf, -np.inf]
    assert round_bf16(np.zeros((3, 0, 2), np.float32)).shape == (3, 0, 2)
    assert round_bf16(np.eye(4, dtype=np.float32)[:, ::2]).tolist() == np.eye(4)[:, ::2].tolist()


def test_positions_skip_a_literal_pad() -> None:
    ids = np.array([[0, 5, 1, 6, 2, 1, 1]])
    assert position_ids(ids).tolist() == [[2, 3, 1, 4, 5, 1, 1]]
    assert position_ids(ids[0]).tolist() == [2, 3, 1, 4, 5, 1, 1]


@pytest.mark.parametrize(
    ("n", "chunk", "expected"),
    [
        (720, 1000, [(0, 720)]),
        (1000, 1000, [(0, 1000)]),
        (1001, 1000, [(0, 1000)]),
        (1719, 1000, [(0, 1000)]),
        (1720, 1000, [(0, 1000), (1000, 1720)]),
        (2000, 1000, [(0, 1000), (1000, 2000)]),
        (2719, 1000, [(0, 1000), (1000, 2000)]),
        (2880, 720, [(0, 720), (720, 1440), (1440, 2160), (2160, 2880)]),
    ],
)
def test_chunks(n: int, chunk: int, expected: list[tuple[int, int]]) -> None:
    assert reference_chunks(n, chunk) == expected


@pytest.mark.parametrize("n", [0, 1, 399, 719])
def test_a_reference_shorter_than_two_frames_is_refused(n: int) -> None:
    with pytest.raises(AudioError, match=f"at least {MIN_CHUNK_SAMPLES} samples.* got {n};"):
        reference_chunks(n)


def test_a_chunk_shorter_than_two_frames_is_refused() -> None:
    with pytest.raises(ParamError, match="chunk_samples"):
        reference_chunks(10_000, 719)


class SumEngine:
    """Frames of one value, the chunk's sum, 10 samples each: enough to follow the running mean."""

    def run(self, **inputs: Floats) -> dict[str, Floats]:
        assert {k: v.dtype for k, v in inputs.items()} == dict.fromkeys(
            ("waveform", "frame_sum", "frame_count"), np.dtype(np.float32)
        )
        n = inputs["waveform"].shape[1] // 10
        frame_sum = inputs["frame_sum"] + n * inputs["waveform"].mean()
        frame_count = inputs["frame_count"] + np.float32(n)
        feature = frame_sum / frame_count
        return {"frame_sum_out": frame_sum, "frame_count_out": frame_count, "feature": feature}


def test_chunks_are_weighted_by_their_frames() -> None:
    waveform = np.concatenate((np.full(2000, 0.5), np.full(1000, 0.25), np.full(700, 9.0))).astype(np.float32)
    feature = encode_reference(SumEngine(), waveform, 1000, hidden_size=3)
    np.testing.assert_allclose(feature, np.full(3, (200 * 0.5 + 100 * 0.25) / 300), rtol=1e-6)


def test_rounding_of_the_waveform_is_an_option() -> None:
    value = np.float32(1 + 2**-10)  # exact in float32, 1 in bfloat16
    waveform = np.full(1000, value)
    rounded, exact = (encode_reference(SumEngine(), waveform, bf16=b, hidden_size=1) for b in (True, False))
    assert rounded == np.float32(1.0)
    assert exact == value


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bf16", [True, False])
def test_non_finite_audio_is_refused(bad: float, bf16: bool) -> None:
    waveform = np.zeros(5000, dtype=np.float32)
    waveform[-1] = bad
    with pytest.raises(AudioError, match="finite"):
        encode_reference(SumEngine(), waveform, bf16=bf16)


def test_a_long_reference_is_rounded_piece_by_piece_and_can_be_stopped() -> None:
    class Keeper(SumEngine):
        def run(self, **inputs: Floats) -> dict[str, Floats]:
            heard.append(inputs["waveform"][0].copy())
            return super().run(**inputs)

    heard: list[Floats] = []
    waveform = hash_noise(7, 500_300)
    encode_reference(Keeper(), waveform, 50_000, hidden_size=1)
    np.testing.assert_array_equal(np.concatenate(heard), round_bf16(waveform)[:500_000])

    tracemalloc.start()
    encode_reference(SumEngine(), waveform, 50_000, hidden_size=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < waveform.nbytes

    def stop_after_two() -> None:
        if len(heard) == 2:
            raise GenerationCancelled

    heard.clear()
    with pytest.raises(GenerationCancelled):
        encode_reference(Keeper(), waveform, 50_000, hidden_size=1, check=stop_after_two)
    assert len(heard) == 2


def test_stereo_is_refused() -> None:
    with pytest.raises(ParamError, match="mono"):
        encode_reference(SumEngine(), np.zeros((2, 5000), dtype=np.float32))


def test_prefix_order_and_rounding() -> None:
    text, ref = np.full(4, 1.001, np.float32), np.full(4, -2.0, np.float32)
    assert assemble_prefix(text, ref)[0, :, 0].tolist() == [-2.0, 1.0]
    assert assemble_prefix(text, ref, order="text,ref")[0, :, 0].tolist() == [1.0, -2.0]
    assert assemble_prefix(text, None, order="text,ref")[0, :, 0].tolist() == [1.0, 0.0]
    assert assemble_prefix(text, ref, bf16=False)[0, 1, 0] == np.float32(1.001)
    assert assemble_prefix(None, None).shape == (1, 0, 768)
    assert assemble_prefix(None, None, feature_size=24).shape == (1, 0, 24)
    assert all(assemble_prefix(t, r).dtype == np.float32 for t in (text, None) for r in (ref, None))
    with pytest.raises(ParamError, match="order"):
        assemble_prefix(text, ref, order="text")
    with pytest.raises(ParamError, match="one shape"):
        assemble_prefix(text, ref[:3])
    with pytest.raises(ParamError, match="one shape"):
        assemble_prefix(text[None], None)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer.json of the released layout, which itself asks for padding and another truncation."""
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz"] + [("▁warm", -1.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.enable_padding(length=64, pad_id=1, pad_token="<pad>")
    tokenizer.enable_truncation(16)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def test_tokenizer_settings_are_ours_not_the_file_s(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_file)
    assert tokenize(tokenizer, "warm").tolist() == [0, 31, 2]
    assert tokenize(tokenizer, "").tolist() == [0, 2]
    assert tokenize(tokenizer, "").dtype == np.int64
    assert 1 in tokenize(tokenizer, "warm <pad> warm")[1:-1]
    long = tokenize(tokenizer, "warm " * 500)
    assert (len(long), long[0], long[-1]) == (MAX_TOKENS, 0, 2)
    assert long.tolist() == tokenize(tokenizer, "warm " * 200).tolist()


@pytest.mark.parametrize("text", ["\0", "a\0b", "\u0301" * 1_000_000, "a" * 1_000_000, "warm " * 200_000, "\U0001f3b8"])
def test_hostile_text_is_encoded(tokenizer_file: Path, text: str) -> None:
    ids = tokenize(load_tokenizer(tokenizer_file), text)
    assert 2 <= len(ids) <= MAX_TOKENS
    assert (ids[0], ids[-1]) == (0, 2)


@pytest.mark.parametrize("text", ["\ud83d", "warm \udfb8", b"warm", None, 3])
def test_what_is_not_text_is_refused(tokenizer_file: Path, text: Any) -> None:
    with pytest.raises(ParamError, match="expected text"):
        tokenize(load_tokenizer(tokenizer_file), text)


@given(st.text(max_size=300))
def test_any_text_is_encoded(text: str) -> None:
    ids = tokenize(any_tokenizer(), text)
    assert 2 <= len(ids) <= MAX_TOKENS
    positions = position_ids(ids)
    assert positions.max() <= MAX_TOKENS + 1


def any_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("e", -1.0)], unk_id=0))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A </s>", special_tokens=[("<unk>", 0), ("</s>", 2)]
    )
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


@pytest.mark.parametrize("content", [None, b"", b"{", b"{}", b"\xff\xfe"])
def test_a_bad_tokenizer_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BundleError, match="expected a tokenizer"):
        load_tokenizer(file)
