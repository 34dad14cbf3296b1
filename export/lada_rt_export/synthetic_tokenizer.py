"""A small tokenizer.json with the layout of XLM-RoBERTa's: Unigram pieces, its special ids, its post-processor."""

from __future__ import annotations

import string
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

__all__ = ["synthetic_tokenizer_json"]

_TEXT: Final = """
warm soul with brushed drums and upright bass
bright city pop, female vocal mood, slap bass, punchy kick and electric piano
slow acoustic ballad with guitar, strings and soft piano
heavy rock, distorted guitars, loud drums, fast tempo
lo-fi hip hop beat with dusty samples and mellow keys
dreamy synth pads, deep house groove, 120 bpm
jazz trio: piano, double bass, drums; relaxed and late at night
epic film score with brass, choir and timpani
"""
_LETTERS: Final = string.ascii_letters + string.digits + string.punctuation + "äéñöü你好音乐歌"


def synthetic_tokenizer_json() -> bytes:
    """Special ids 0 to 3, then words, word pieces and single characters, then `<mask>` last.

    The pieces are listed, not trained, so every machine writes the same file.

    Returns:
        UTF-8 JSON of fewer than 512 ids.
    """
    words = sorted(set(_TEXT.replace(",", "").replace(":", "").replace(";", "").split()))
    stems = sorted({w[:3] for w in words if len(w) > 5} | {w[3:] for w in words if len(w) > 5})
    pieces: dict[str, float] = dict.fromkeys(("<s>", "<pad>", "</s>", "<unk>"), 0.0)
    # the more a piece covers, the higher its log-probability has to be for it to be preferred
    for piece, score in (
        *((f"▁{word}", -6.0) for word in words),
        ("▁", -4.0),
        *((stem, -8.0) for stem in stems),
        *((letter, -11.0) for letter in _LETTERS),
    ):
        pieces.setdefault(piece, score)
    pieces["<mask>"] = 0.0
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)])
    return tokenizer.to_str(pretty=True).encode("utf-8")
