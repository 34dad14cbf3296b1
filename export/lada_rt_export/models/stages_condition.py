"""The conditioning stages as graphs: text and reference encoder. The host loops, tokenises and rounds."""

from __future__ import annotations

from lada_rt.errors import ParamError
from torch import Tensor, nn

from lada_rt_export.models.clamp3 import Clamp3Audio, Clamp3Text
from lada_rt_export.models.mert import Mert, normalize_waveform

__all__ = ["RefEncoderStage", "TextEncoderStage"]


class TextEncoderStage(nn.Module):
    """Token ids without padding to the text feature.

    Masked keys have weight zero, so the true length gives what padding to 128 gives, at a fraction of the
    cost (spec/clamp3.md, section 2).
    """

    def __init__(self, text: Clamp3Text) -> None:
        super().__init__()
        self.text = text

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids, positions: [B, S] int64, S = 2..128, all attended -> [B, output_size] float32."""
        return self.text(ids, positions).float()


class RefEncoderStage(nn.Module):
    """One chunk of reference audio, added to a running mean over frames, to the audio feature so far.

    The mean weighs frames, not chunks; carrying the sum lets one graph serve any number of chunks, and the
    feature that the last one returns is the result (spec/clamp3.md 3.3, steps 3 to 7).
    """

    def __init__(self, mert: Mert, clamp3_audio: Clamp3Audio, do_normalize: bool) -> None:
        """`do_normalize` is what the MERT folder's preprocessor_config.json says; absent there means true."""
        super().__init__()
        if mert.config.hidden_size != clamp3_audio.config.hidden_size:
            raise ParamError(
                f"MERT and the audio encoder must have one hidden_size, got {mert.config.hidden_size} and "
                f"{clamp3_audio.config.hidden_size}; use the folders of one release"
            )
        self.mert = mert
        self.clamp3_audio = clamp3_audio
        self.do_normalize = do_normalize

    def forward(self, waveform: Tensor, frame_sum: Tensor, frame_count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add one chunk.

        Args:
            waveform: [1, n] float32, 48 kHz mono, already rounded to bfloat16 by the host; n >= 720.
            frame_sum: [1, H] float32, zeros before the first chunk.
            frame_count: [1] float32, zero before the first chunk. Exact: a day of audio has fewer than 2**24.

        Returns:
            frame_sum_out [1, H], frame_count_out [1], feature [1, output_size], float32.
        """
        if self.do_normalize:
            waveform = normalize_waveform(waveform)
        frames = self.mert(waveform).float()  # [1, T, H]
        frame_sum = frame_sum + frames.sum(dim=1)
        frame_count = frame_count + frames.shape[1]
        mean = frame_sum / frame_count  # [1, H]
        dtype = self.clamp3_audio.audio_proj.weight.dtype
        return frame_sum, frame_count, self.clamp3_audio.forward_single(mean.to(dtype)).float()
