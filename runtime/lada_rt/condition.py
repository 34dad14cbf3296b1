"""Text and reference audio to the prefix of the denoiser.

Needs numpy alone; `load_tokenizer` imports the tokenizers library.
Source: spec/clamp3.md, sections 2, 3 and 6; spec/lada_band.md, section c.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lada_rt.errors import AudioError, BundleError, ParamError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from lada_rt.engines.base import Engine

__all__ = [
    "CHUNK_SAMPLES",
    "MAX_TOKENS",
    "MIN_CHUNK_SAMPLES",
    "PREFIX_ORDERS",
    "assemble_prefix",
    "checked_text",
    "encode_reference",
    "encode_text",
    "load_tokenizer",
    "position_ids",
    "reference_chunks",
    "round_bf16",
    "tokenize",
]

#: the two specials included
MAX_TOKENS = 128
#: `<pad>`; typed by a user it is attended to, but gets no position of its own
PAD_ID = 1
#: one minute at the 24 kHz the network was made for; the 48 kHz it is fed make it half a minute
CHUNK_SAMPLES = 1_440_000
#: two frames; the release fails on a shorter chunk
MIN_CHUNK_SAMPLES = 720
#: the released program's order, and that of its training code, which disagree
PREFIX_ORDERS = ("ref,text", "text,ref")
#: characters that any text can need for 126 tokens, by a wide margin; bounds the tokenizer's work
MAX_TEXT_CHARS = 100_000


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.json, cut at 128 tokens and without padding.

    Normaliser, pre-tokeniser and post-processor are the file's own; truncation is set here, since the
    released file carries none (spec/clamp3.md 2.1).

    Raises:
        BundleError: the file is missing or not a tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever its parser meets
        reason = "no such file" if not Path(path).is_file() else str(error).splitlines()[0][:200]
        raise BundleError(
            f"expected a tokenizer at {path}, could not read it ({reason}); build the bundle again"
        ) from error
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    return tokenizer


def tokenize(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    """Token ids of a text, the specials included.

    Args:
        tokenizer: from `load_tokenizer`.
        text: any string, the empty one included; cut after MAX_TEXT_CHARS characters, then after 128 tokens.

    Returns:
        [S] int64, S = 2..128.

    Raises:
        ParamError: not a string, or one with lone surrogates.
    """
    return np.array(tokenizer.encode(checked_text(text)).ids, dtype=np.int64)


def checked_text(text: str) -> str:
    """What the tokenizer gets of a text; see `tokenize`.

    Raises:
        ParamError: not a string, or one with lone surrogates.
    """
    if not isinstance(text, str):
        raise ParamError(f"expected text as a string, got {type(text).__name__}; pass a str")
    text = text[:MAX_TEXT_CHARS]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ParamError(
            f"expected text that UTF-8 can encode, got a lone surrogate at character {error.start}; "
            "decode it with errors='replace'"
        ) from error
    return text


def position_ids(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of token ids: 2, 3, ... over everything but `<pad>`, which has position 1.

    From the ids, never from a mask (spec/clamp3.md 2.2).

    Args:
        ids: [..., S] int64.

    Returns:
        [..., S] int64.
    """
    real = (ids != PAD_ID).astype(np.int64)
    return np.cumsum(real, axis=-1, dtype=np.int64) * real + 1


def round_bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to bfloat16, ties to even, and widen back. NaN stays NaN; past the largest bfloat16 is infinite.

    Args:
        x: float32, any shape.

    Returns:
        float32, the same shape; a new array.
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    # The carry would turn some NaNs into infinity or zero.
    quiet = (bits | np.uint32(0x00400000)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), quiet, rounded).view(np.float32)


def reference_chunks(n_samples: int, chunk_samples: int = CHUNK_SAMPLES) -> list[tuple[int, int]]:
    """Where the chunks of a reference start and stop. A tail too short to encode is dropped.

    The boundaries are part of the result: norm statistics and attention span one chunk. The release fails on
    a tail of 1 to 719 samples; that it is dropped is our policy (spec/clamp3.md 3.4).

    Args:
        n_samples: samples of the reference at 48 kHz.
        chunk_samples: length of all chunks but the last.

    Returns:
        (start, stop) pairs, consecutive from 0, each of MIN_CHUNK_SAMPLES to chunk_samples samples.

    Raises:
        AudioError: fewer than MIN_CHUNK_SAMPLES samples.
        ParamError: chunk_samples is below MIN_CHUNK_SAMPLES.
    """
    if chunk_samples < MIN_CHUNK_SAMPLES:
        raise ParamError(f"chunk_samples must be {MIN_CHUNK_SAMPLES} or more, got {chunk_samples}; use {CHUNK_SAMPLES}")
    if n_samples < MIN_CHUNK_SAMPLES:
        raise AudioError(
            f"expected at least {MIN_CHUNK_SAMPLES} samples (15 ms at 48 kHz) of reference audio, got "
            f"{n_samples}; use a longer reference or an earlier start"
        )
    starts = range(0, n_samples, chunk_samples)
    chunks = [(start, min(start + chunk_samples, n_samples)) for start in starts]
    return [(start, stop) for start, stop in chunks if stop - start >= MIN_CHUNK_SAMPLES]


def encode_text(engine: Engine, tokenizer: Tokenizer, text: str) -> NDArray[np.float32]:
    """Text feature of one string. An empty string is encoded like any other, as the release does.

    Args:
        engine: the text encoder: ids, positions [1, S] int64 -> feature [1, F] float32.
        tokenizer: from `load_tokenizer`.
        text: see `tokenize`.

    Returns:
        [F] float32, not yet rounded to bfloat16.

    Raises:
        ParamError: the text is not a string that can be encoded.
    """
    ids = tokenize(tokenizer, text)[None]  # [1, S]
    return engine.run(ids=ids, positions=position_ids(ids))["feature"][0]


def encode_reference(
    engine: Engine,
    waveform_48k_mono: NDArray[np.float32],
    chunk_samples: int = CHUNK_SAMPLES,
    bf16: bool = True,
    hidden_size: int = 768,
    check: Callable[[], None] = lambda: None,
) -> NDArray[np.float32]:
    """Audio feature of a reference.

    Args:
        engine: the reference encoder: waveform [1, n], frame_sum [1, hidden_size], frame_count [1] ->
            frame_sum_out, frame_count_out, feature [1, F], all float32.
        waveform_48k_mono: [N] float32 at 48 kHz. It is not resampled to the 24 kHz of the network: the
            release does not either, in training or inference.
        chunk_samples: samples per engine call.
        bf16: round the samples to bfloat16, as the released precision setting does.
        hidden_size: width of the engine's frames.
        check: called between chunks; raises to stop.

    Returns:
        [F] float32, not yet rounded to bfloat16.

    Raises:
        AudioError: too short, or not finite.
        ParamError: not one-dimensional, or chunk_samples is too small.
    """
    waveform = np.asarray(waveform_48k_mono, dtype=np.float32)
    if waveform.ndim != 1:
        raise ParamError(f"expected mono reference audio of shape [N], got {waveform.shape}; average the channels")
    chunks = reference_chunks(len(waveform), chunk_samples)
    frame_sum = np.zeros((1, hidden_size), dtype=np.float32)
    frame_count = np.zeros(1, dtype=np.float32)
    for start, stop in chunks:
        if start:
            check()
        # chunk by chunk: of a long reference no second copy exists
        chunk = round_bf16(waveform[start:stop]) if bf16 else waveform[start:stop]
        if not np.isfinite(chunk).all():  # after rounding, which overflows at the very end of float32
            raise AudioError(
                "expected finite reference audio, got NaN or infinite samples; repair or re-export the file"
            )
        out = engine.run(waveform=chunk[None], frame_sum=frame_sum, frame_count=frame_count)
        frame_sum, frame_count = out["frame_sum_out"], out["frame_count_out"]
    return out["feature"][0]


def assemble_prefix(
    text_feature: NDArray[np.float32] | None,
    ref_feature: NDArray[np.float32] | None,
    order: str = "ref,text",
    bf16: bool = True,
    feature_size: int = 768,
) -> NDArray[np.float32]:
    """Put the features into the slots of the prefix.

    Args:
        text_feature: [F] float32, or None for a slot of zeros.
        ref_feature: the same for the reference audio.
        order: "ref,text" is what the released program does; its training code does "text,ref".
        bf16: round the features to bfloat16, as the released precision setting does.
        feature_size: F when both features are None.

    Returns:
        [1, 2, F] float32, or [1, 0, F] when both are None.

    Raises:
        ParamError: an unknown order, or features of other or differing shapes.
    """
    if order not in PREFIX_ORDERS:
        raise ParamError(
            f"prefix order must be one of {', '.join(map(repr, PREFIX_ORDERS))}, got {order!r}; use 'ref,text'"
        )
    given = [np.asarray(f, dtype=np.float32) for f in (text_feature, ref_feature) if f is not None]
    if not given:
        return np.zeros((1, 0, feature_size), dtype=np.float32)
    if any(f.ndim != 1 or f.shape != given[0].shape for f in given):
        raise ParamError(
            f"expected features of one shape [F], got {', '.join(str(f.shape) for f in given)}; "
            "pass what encode_text and encode_reference return"
        )
    by_name = {"text": text_feature, "ref": ref_feature}
    slots = [by_name[name] for name in order.split(",")]
    prefix = np.stack([np.zeros_like(given[0]) if s is None else np.asarray(s, np.float32) for s in slots])[None]
    return round_bf16(prefix) if bf16 else prefix
