"""Rates and window sizes of the codec: the one place they are written down.

Source: spec/mucodec 1, 2.2, 5. A bundle's manifest carries these values, so that a codec with other windows needs no
change of code.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from lada_rt.errors import BundleError

__all__ = ["CodecGeometry"]


@dataclass(frozen=True, slots=True)
class CodecGeometry:
    """Integer rates of one codec. Every other length in the runtime is derived from these."""

    sample_rate_hz: int = 48_000
    code_rate_hz: int = 25
    #: samples of one encoder window; 480 more than 1024 codes are worth, which the released program skips
    encode_window_samples: int = 1_966_560
    encode_window_codes: int = 1024
    #: codes of one decoder window, and the distance between window starts
    window_codes: int = 1024
    hop_codes: int = 768
    codes_per_latent: int = 2
    latent_channels: int = 32
    latent_bins: int = 32
    mel_frames_per_latent: int = 8
    mel_bins: int = 256
    samples_per_mel_frame: int = 480

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
                raise BundleError(
                    f"geometry.{field.name}: expected a positive integer, got {value!r}; rebuild the bundle"
                )
        per_code = self.mel_frames_per_latent * self.samples_per_mel_frame
        if (
            self.hop_codes >= self.window_codes
            or self.window_codes % self.codes_per_latent
            or self.overlap_codes % self.codes_per_latent
            or self.overlap_codes > self.hop_codes
            or per_code * self.code_rate_hz != self.sample_rate_hz * self.codes_per_latent
            or self.latent_channels % 2
        ):
            raise BundleError(
                f"geometry: the window sizes and rates contradict each other ({asdict(self)}); rebuild the bundle"
            )

    @property
    def overlap_codes(self) -> int:
        return self.window_codes - self.hop_codes

    @property
    def samples_per_code(self) -> int:
        return self.sample_rate_hz // self.code_rate_hz

    @property
    def window_latents(self) -> int:
        return self.window_codes // self.codes_per_latent

    @property
    def context_latents(self) -> int:
        """Latent frames of window i-1 that window i continues from."""
        return self.overlap_codes // self.codes_per_latent

    @property
    def window_samples(self) -> int:
        return self.window_codes * self.samples_per_code

    @property
    def hop_samples(self) -> int:
        return self.hop_codes * self.samples_per_code

    @property
    def overlap_samples(self) -> int:
        return self.overlap_codes * self.samples_per_code

    def n_codes(self, n_samples: int) -> int:
        """Codes that stand for `n_samples` of audio.

        The expression is evaluated in float64 exactly as the released program does (spec/mucodec 2.9): for some lengths
        rounding makes it one less than the integer formula.
        """
        return int(n_samples / float(self.sample_rate_hz) * self.code_rate_hz) + 1

    def n_samples(self, n_codes: int) -> int:
        """Audio samples decoded from `n_codes` (spec/mucodec 5.1; for some lengths one short of the product)."""
        return int(n_codes / (4 * self.code_rate_hz) * 4 * self.sample_rate_hz)

    def n_windows(self, n_codes: int) -> int:
        """Decoder windows for `n_codes`.

        The released program tests the remainder against the wrong constant and fails for some lengths; the padding
        formula applied unconditionally is right for those and the same for all others (spec/mucodec 5.3).
        """
        return max(1, math.ceil((n_codes - self.overlap_codes) / self.hop_codes))

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> CodecGeometry:
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise BundleError(f"geometry: expected exactly the entries {sorted(names)}; rebuild the bundle")
        return cls(**data)
