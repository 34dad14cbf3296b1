"""The same checkpoint run the way the public program runs it: the opponent of `lada-rt bench --baseline`.

Plain eager torch in float32, with the runtime's number of threads. As the release does it, and the runtime does not:
logits of every row in every step with an explicit attention mask and fresh rotary tables; a sampler that sorts the
whole vocabulary; remask noise made on the host; every encoder window of the release, all layers and the logit head
where the files hold them; a text padded to 128 tokens; all latents before any audio; both channels through the mel
decoder at once, each of its norms one operator; whole windows through the vocoder in overlapping chunks.

Better than the release: no cache of keys and values that nobody reads, grouped queries without copies of keys and
values, fused attention everywhere (the release's mel decoder holds a 16384 x 16384 score matrix), weight norms and the
map from codes to conditions folded, no device transfers.
Source: spec/lada_band d, spec/mucodec 2 to 7, spec/clamp3 2.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lada_rt.bench.check import Recorder
from lada_rt.bench.difference import relative_error
from lada_rt.bundle import Bundle
from lada_rt.condition import MAX_TOKENS, PAD_ID, assemble_prefix, load_tokenizer, position_ids, tokenize
from lada_rt.cpus import cpu_count
from lada_rt.decode import VOCODER_HALO_FRAMES
from lada_rt.errors import EngineError, ParamError
from lada_rt.noise import flow_noise, released_remask_noise
from lada_rt.params import GenerationParams
from lada_rt.results import Result
from lada_rt.schedule import mask_counts, selection_temperatures
from torch import Tensor

from lada_rt_export.bundle_source import BundleSource
from lada_rt_export.checkpoints import open_tensors
from lada_rt_export.demo.source import DEMO_WEIGHTS, TrainedSource
from lada_rt_export.models.mucodec_common import GroupNormF32
from lada_rt_export.models.muq import KEY_PREFIX as MUQ_PREFIX
from lada_rt_export.models.muq import MuQ, resample_to_24k
from lada_rt_export.models.stages_condition import TextEncoderStage
from lada_rt_export.models.stages_denoiser import DenoiserStage
from lada_rt_export.models.stages_mucodec import EncoderStage, FlowStage, MelDecoderStage, VocoderStage
from lada_rt_export.models.vocoder import vocode_in_chunks
from lada_rt_export.release import Release
from lada_rt_export.release_modules import ReleaseSource
from lada_rt_export.released_audio import resample_frac

__all__ = ["Baseline", "draw_tokens", "philox_exponential", "philox_gumbel", "released_windows"]

SIGMA_MIN = 1e-4
PEAK_LIMIT, WINDOW_PEAK_LIMIT = 0.8, 0.9
ENCODER_BATCH = 3
CHUNK_FRAMES, CHUNK_SHIFT = 1024, 256
#: released rows of the logit head that is computed and not used
_HEAD_KEY = "linear.weight"
#: allowed differences from the runtime on the same noise
LIMITS = {"codes": 0.01, "prefix": 0.01, "latents": 2e-3, "audio": 1e-2, "chunked audio": 0.1}
#: near ties may fall either way: two codes or draws in all, and one draw in a thousand
TIES, TIE_SHARE = 2, 1e-3

#: (step, kept probabilities [T, V]) -> Exp(1) noise [T, V], to replay a known run
ExpNoise = Callable[[int, Tensor], Tensor]


class _Clock:
    """Seconds of the stages of one run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def finish(self) -> dict[str, float]:
        return self.seconds | {"total": time.perf_counter() - self._started}


class Baseline:
    """The public program's way through one bundle's networks.

    Args:
        source: where the bundle's modules come from.
        bundle: what the runtime runs; its tokenizer and geometry are used.
    """

    name = "eager torch"

    def __init__(self, source: BundleSource, bundle: Bundle) -> None:
        torch.set_num_threads(cpu_count())
        self._bundle = bundle
        self._geometry = bundle.geometry
        self._tokenizer = load_tokenizer(bundle.file_path(bundle.files["tokenizer.json"]))
        modules = {name: source.module(name) for name in ("encoder", "text_encoder", "denoiser", "flow")}
        encoder, text, denoiser, flow = modules.values()
        mel, vocoder = source.module("mel_decoder"), source.module("vocoder")
        assert isinstance(encoder, EncoderStage)
        assert isinstance(text, TextEncoderStage)
        assert isinstance(denoiser, DenoiserStage)
        assert isinstance(flow, FlowStage)
        assert isinstance(mel, MelDecoderStage)
        assert isinstance(vocoder, VocoderStage)
        self._kernel = encoder.kernel[:, :1] * 2  # the stage's taps are halved and doubled up for two channels
        self._n_layers = encoder.muq.config.n_layers
        self._muq, self._head = _whole_muq(source, encoder.muq)
        self._encoder, self._flow = encoder, flow
        self._text, self._predictor = text.text, denoiser.mask_predictor
        self._vae, self._vocoder = mel.vae, vocoder.vocoder
        for module in self._vae.modules():
            if isinstance(module, GroupNormF32):
                module.fused = True
        self._mean = torch.from_numpy(np.array(source.latent_mean))[:, None]  # [32, 1, 32]
        self._std = torch.from_numpy(np.array(source.latent_std))[:, None]

    @classmethod
    def for_bundle(cls, bundle: Bundle, checkpoint: Path | None, pretrained_root: Path | None) -> Baseline:
        """The opponent of a bundle: of the demo as it is, of others with the files they were built from.

        Args:
            bundle: what the runtime runs.
            checkpoint: of a release, or the one file of weights of a trained demo.
            pretrained_root: of a release.

        Raises:
            ParamError: the files are not given.
            CheckpointError: they are neither.
        """
        if checkpoint is not None and pretrained_root is not None:
            # the bundle's own tokenizer, wherever it was found when the bundle was built
            tokenizer = bundle.file_path(bundle.files["tokenizer.json"])
            return cls(ReleaseSource(Release.locate(checkpoint, pretrained_root, tokenizer)), bundle)
        if checkpoint is not None:
            return cls(TrainedSource(checkpoint), bundle)
        demo = TrainedSource(DEMO_WEIGHTS)
        if bundle.name == demo.header({}).name:
            return cls(demo, bundle)
        raise ParamError(
            f"--baseline: expected the files that bundle {bundle.name} was built from: --checkpoint, and for a release "
            "--pretrained-root too"
        )

    def run(self, vocal: np.ndarray, rate_hz: int, text: str, params: GenerationParams) -> dict[str, float]:
        """One run on torch's own random numbers; seconds by stage, and `total`."""
        clock = _Clock()
        torch.manual_seed(params.seed)
        with torch.inference_mode():
            with clock.stage("encoder"):
                vocal_codes = self.encode(vocal, rate_hz)
            with clock.stage("text_encoder"):
                prefix = self.prefix(text, params)
            with clock.stage("denoiser"):
                codes = self.denoise(vocal_codes, prefix, params)
            with clock.stage("flow"):
                latents = self.solve(codes, params, lambda window: torch.randn(1, *self._latent_shape))
            audio = []
            for window in latents:
                with clock.stage("mel_decoder"):
                    mel = self.mel(window)
                with clock.stage("vocoder"):
                    audio.append(vocode_in_chunks(self._vocoder, mel, CHUNK_FRAMES, CHUNK_SHIFT))
            with clock.stage("vocoder"):
                self.join(audio, len(codes))
        return clock.finish()

    def encode(self, vocal: np.ndarray, rate_hz: int) -> Tensor:
        """[C, N] at `rate_hz` to codes [T] int64 (spec/mucodec 2)."""
        geometry = self._geometry
        samples = resample_frac(vocal, rate_hz, geometry.sample_rate_hz)
        audio = torch.from_numpy(samples).nan_to_num(0.0, 1.0, -1.0).clamp(-1, 1)
        audio = audio.expand(2, -1) if audio.shape[0] == 1 else audio[:2]
        audio = audio / max(1.0, float(audio.abs().max()) / PEAK_LIMIT)
        windows = released_windows(audio, geometry.window_samples, geometry.encode_window_samples)
        codes = [self._encode_windows(batch) for batch in windows.split(ENCODER_BATCH)]
        return torch.cat(codes).flatten()[: geometry.n_codes(samples.shape[-1])]

    def _encode_windows(self, windows: Tensor) -> Tensor:
        """[B, 2, n] -> [B, 1024] int64."""
        peak = windows.abs().amax(dim=2, keepdim=True)
        windows = torch.where(peak > WINDOW_PEAK_LIMIT, windows / (peak / WINDOW_PEAK_LIMIT), windows)
        wav = resample_to_24k(windows.mean(dim=1, keepdim=True), self._kernel).squeeze(1)
        states = self._muq.hidden_states(self._mel_front_end(wav))
        if self._head is not None:
            F.linear(states[-1], self._head)
        latents = F.linear(states[self._n_layers], self._encoder.proj_weight, self._encoder.proj_bias)
        return (latents @ self._encoder.directions).argmax(dim=2)

    def _mel_front_end(self, wav: Tensor) -> Tensor:
        """[B, N] at 24 kHz -> [B, n_mels, frames], by FFT as in the release (spec/mucodec 2.5)."""
        front = self._muq.front_end
        config = front.config
        wav = wav[:, : wav.shape[1] // (4 * config.hop_samples) * 4 * config.hop_samples]
        spectrum = torch.stft(wav, config.n_fft, config.hop_samples, window=front.window, return_complex=True)
        power = front.filterbank @ spectrum.abs().square()
        return (front.decibels(power[:, :, :-1]) - config.mel_mean) / config.mel_std

    def prefix(self, text: str, params: GenerationParams) -> Tensor:
        """Condition slots [1, 2, F]; the text padded to 128 tokens (spec/clamp3 2)."""
        ids = tokenize(self._tokenizer, text)[None]
        n_tokens = ids.shape[1]
        ids = np.pad(ids, ((0, 0), (0, MAX_TOKENS - n_tokens)), constant_values=PAD_ID)
        mask = torch.zeros(1, MAX_TOKENS)
        mask[:, :n_tokens] = 1
        feature = self._text(torch.from_numpy(ids), torch.from_numpy(position_ids(ids)), mask)[0]
        slots = assemble_prefix(feature.numpy(), None, order=params.prefix_order, feature_size=self._bundle.prefix_dim)
        return torch.from_numpy(slots)

    def logits(self, vocal_codes: Tensor, codes: Tensor, prefix: Tensor) -> Tensor:
        """[T, V] of all frames, with an explicit mask (spec/lada_band a.3)."""
        visible = torch.ones(1, len(codes), dtype=torch.bool)
        return self._predictor(vocal_codes[None], codes[None], prefix, key_mask=visible)[0, prefix.shape[1] :]

    def denoise(self, vocal_codes: Tensor, prefix: Tensor, params: GenerationParams) -> Tensor:
        """[T] -> [T] int64 (spec/lada_band d.3, low confidence)."""
        codes = torch.full_like(vocal_codes, self._bundle.mask_id)
        counts = mask_counts(len(codes), params.steps, params.schedule)
        taus = selection_temperatures(params.steps, params.mask_temperature)
        for step in range(params.steps):
            logits = self.logits(vocal_codes, codes, prefix)
            gumbel = released_remask_noise("low_confidence", params.seed, "bench", step, len(codes))
            codes = self._step(codes, logits, params, counts[step], taus[step], torch.from_numpy(gumbel), step)
        return codes

    def _step(
        self,
        codes: Tensor,
        logits: Tensor,
        params: GenerationParams,
        n_masked: int,
        tau: float,
        gumbel: Tensor,
        step: int,
        exp_noise: ExpNoise | None = None,
    ) -> Tensor:
        tokens, confidence = draw_tokens(logits, params, step, exp_noise)
        current = codes == self._bundle.mask_id
        drawn = torch.where(current, tokens, codes)
        if n_masked == 0:
            return drawn
        score = confidence.clamp(min=1e-20).log() + tau * gumbel
        score = score.masked_fill(~current, math.inf)
        stays = torch.topk(score, n_masked, largest=False).indices
        return drawn.scatter(0, stays, self._bundle.mask_id)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        return self._geometry.latent_channels, self._geometry.window_latents, self._geometry.latent_bins

    def solve(self, codes: Tensor, params: GenerationParams, noise: Callable[[int], Tensor]) -> list[Tensor]:
        """Latents of all windows, [1, 32, L, 32] each (spec/mucodec 3, 5)."""
        geometry = self._geometry
        indices = torch.arange(geometry.window_codes)
        found: list[Tensor] = []
        for window in range(geometry.n_windows(len(codes))):
            given = codes[(window * geometry.hop_codes + indices) % len(codes)]
            context = found[-1][:, :, -geometry.context_latents :] if found else torch.empty(1, 32, 0, 32)
            found.append(self._solve_window(self._flow.condition(given[None]), context, params, noise(window)))
        return found

    def _solve_window(self, mu: Tensor, context: Tensor, params: GenerationParams, noise: Tensor) -> Tensor:
        n_context = context.shape[2]
        given = torch.zeros_like(noise)
        given[:, :, :n_context] = (context - self._mean) / self._std.clamp(min=1e-12)
        x = noise.clone()
        times = torch.linspace(0, 1, params.flow_steps + 1)
        t, dt = times[0], times[1] - times[0]
        both_mu = torch.cat([torch.zeros_like(mu), mu])
        for step in range(params.flow_steps):
            x[:, :, :n_context] = (1 - (1 - SIGMA_MIN) * t) * noise[:, :, :n_context] + t * given[:, :, :n_context]
            rows = torch.cat([torch.cat([x, x]), torch.cat([given, given]), both_mu], dim=1)
            free, conditioned = self._flow.flow(rows, t.expand(2)).chunk(2)
            x = x + dt * (free + params.guidance * (conditioned - free))
            t = t + dt
            if step + 2 <= params.flow_steps:
                dt = times[step + 2] - t
        x[:, :, :n_context] = given[:, :, :n_context]
        return x * self._std + self._mean

    def mel(self, latents: Tensor) -> Tensor:
        """[1, 32, L, 32] -> [2, 256, 8 L], both channels at once (spec/mucodec 6)."""
        return self._vae(torch.cat(latents.chunk(2, dim=1))).squeeze(1).transpose(1, 2)

    def join(self, windows: list[Tensor], n_codes: int) -> Tensor:
        """[2, n] windows crossfaded to [2, N] (spec/mucodec 5.6)."""
        geometry = self._geometry
        out = windows[0][:, : geometry.window_samples]
        overlap = geometry.overlap_samples
        rising = torch.linspace(0, 1, overlap, dtype=torch.float64)
        for window in windows[1:]:
            window = window[:, : geometry.window_samples]
            faded = out[:, -overlap:] * (1 - rising) + window[:, :overlap] * rising
            out = torch.cat([out[:, :-overlap], faded.float(), window[:, overlap:]], dim=1)
        return out[:, : geometry.n_samples(n_codes)]

    def check(
        self, vocal: np.ndarray, rate_hz: int, text: str, params: GenerationParams, recorder: Recorder, result: Result
    ) -> dict[str, float]:
        """Compare a recorded run of the runtime with this program, stage by stage, on the runtime's own noise.

        Each stage gets what the runtime's stage got, so that one near tie that falls the other way stays one.

        Raises:
            EngineError: they differ by more than rounding.
        """
        first_inputs = recorder.calls["denoiser"][0][0]
        codes = torch.from_numpy(result.codes.astype(np.int64))
        with torch.inference_mode():
            errors = {
                "codes": relative_error(self.encode(vocal, rate_hz).numpy(), first_inputs["vocal_codes"][0]),
                "prefix": relative_error(self.prefix(text, params).numpy(), first_inputs["prefix"]),
                **self._check_steps(params, recorder, codes),
                **self._check_sound(params, recorder, codes, result.audio),
            }
        limits = LIMITS | {"codes": LIMITS["codes"] + TIES / len(codes)}
        for name, limit in limits.items():
            if not errors[name] <= limit:
                raise EngineError(
                    f"check: {name} of {self.name} and of lada-rt differ by {errors[name]:.2e}, allowed {limit:.0e}; "
                    "nothing is timed, make sure that the bundle was built from these files"
                )
        return {name: float(f"{error:.3e}") for name, error in errors.items()}

    def _check_steps(self, params: GenerationParams, recorder: Recorder, codes: Tensor) -> dict[str, float]:
        """Replay every step from the state the runtime was in."""
        inputs = recorder.calls["denoiser"][0][0]
        vocal_codes, prefix = torch.from_numpy(inputs["vocal_codes"][0]), torch.from_numpy(inputs["prefix"])
        states = [torch.from_numpy(state) for state in recorder.states] + [codes]
        counts = mask_counts(len(codes), params.steps, params.schedule)
        taus = selection_temperatures(params.steps, params.mask_temperature)
        positions = np.arange(len(codes))
        n_draws = n_different = 0
        for step, (state, following) in enumerate(itertools.pairwise(states)):
            gumbel = torch.from_numpy(philox_gumbel(params.seed, step, positions))
            logits = self.logits(vocal_codes, state, prefix)
            found = self._step(
                state, logits, params, counts[step], taus[step], gumbel, step, _own_noise(params.seed, positions)
            )
            n_draws += int((state == self._bundle.mask_id).sum())
            n_different += int((found != following).sum())
        if n_different > TIES + TIE_SHARE * n_draws:
            raise EngineError(
                f"check: {n_different} of {n_draws} draws of {self.name} and of lada-rt differ on the same noise; "
                "nothing is timed, make sure that the bundle was built from these files"
            )
        return {"draws": n_different / n_draws}

    def _check_sound(
        self, params: GenerationParams, recorder: Recorder, codes: Tensor, audio: np.ndarray
    ) -> dict[str, float]:
        """Latents and waveform from the runtime's codes and noise; the vocoder in one pass, then in chunks."""

        def noise(window: int) -> Tensor:
            return torch.from_numpy(flow_noise(params.seed, window, self._latent_shape))[None]

        latents = self.solve(codes, params, noise)
        left = recorder.calls["mel_decoder"][0][0]["latents"][:1]
        per_frame = self._geometry.samples_per_mel_frame
        windows = []
        for index, window in enumerate(latents):
            mel = self.mel(window)
            n_samples = min(self._geometry.window_samples, audio.shape[1] - index * self._geometry.hop_samples)
            n_frames = math.ceil(n_samples / per_frame) + VOCODER_HALO_FRAMES
            windows.append(self._vocoder(mel[:, :, :n_frames]).squeeze(1))
            if index == 0:
                two_chunks = mel[:1, :, : CHUNK_FRAMES + CHUNK_SHIFT]
                chunked = vocode_in_chunks(self._vocoder, two_chunks, CHUNK_FRAMES, CHUNK_SHIFT)
                whole = self._vocoder(two_chunks).squeeze(1)[:, : chunked.shape[1]]
        joined = self.join(windows, len(codes)).numpy()
        return {
            "latents": relative_error(left, latents[0][:, : left.shape[1]].numpy()),
            "audio": relative_error(audio, joined),
            "chunked audio": relative_error(chunked.numpy(), whole.numpy()),
        }


def _whole_muq(source: BundleSource, needed: MuQ) -> tuple[MuQ, Tensor | None]:
    """The encoder with every layer the files hold, and the logit head; the bundle's own where there are no files."""
    if not isinstance(source, ReleaseSource):
        return needed, None
    release = source.release
    config = replace(needed.config, n_layers=2 * needed.config.n_layers, final_norm=True)
    network = Release(release.files, replace(release.sizes, muq=config)).muq()
    whole = network.build(MuQ)
    whole.load_constants({name.removeprefix(MUQ_PREFIX): t.torch(widen=True) for name, t in network.constants.items()})
    file = open_tensors(release.files.muq)
    tensors = file.tensors() if file.kind == "safetensors" else file.tensors("model")
    head = tensors.get(MUQ_PREFIX + _HEAD_KEY)
    return whole, None if head is None else head.torch(widen=True)


def released_windows(audio: Tensor, window_samples: int, taken_samples: int) -> Tensor:
    """Cut [2, N] into the release's encoder windows, [K, 2, taken_samples] (spec/mucodec 2.2)."""
    while audio.shape[1] < taken_samples:
        audio = torch.cat([audio, audio], dim=1)
    n_windows = audio.shape[1] // window_samples + 1
    audio = torch.cat([audio, audio], dim=1)[:, : n_windows * taken_samples]
    return audio.unflatten(1, (n_windows, taken_samples)).transpose(0, 1)


def draw_tokens(
    logits: Tensor, params: GenerationParams, step: int, exp_noise: ExpNoise | None = None
) -> tuple[Tensor, Tensor]:
    """The released sampler: sort, nucleus, top-k, softmax, one multinomial draw (spec/lada_band d.4).

    Args:
        logits: [T, V] float32.
        params: filters and temperature.
        step: 0-based, for the noise.
        exp_noise: noise of the race; None draws with torch.multinomial.

    Returns:
        Tokens [T] int64 and their probabilities in the filtered distribution [T].
    """
    logits = logits.clone()
    if params.top_p < 1:
        ordered, ids = torch.sort(logits, descending=True)
        running = F.softmax(ordered, dim=-1).cumsum(dim=-1)
        remove = running > params.top_p
        remove[:, 1:] = remove[:, :-1].clone()
        remove[:, 0] = False
        logits = logits.masked_fill(remove.scatter(1, ids, remove), -math.inf)
    if params.top_k is not None:
        threshold = torch.topk(logits, min(params.top_k, logits.shape[1])).values[:, -1:]
        logits[logits < threshold] = -math.inf
    probs = F.softmax(logits / params.temperature, dim=-1)
    if exp_noise is None:
        tokens = torch.multinomial(probs, 1)
    else:
        tokens = (probs / exp_noise(step, probs)).argmax(dim=1, keepdim=True)
    return tokens.squeeze(1), probs.gather(1, tokens).squeeze(1)


def _own_noise(seed: int, positions: np.ndarray) -> ExpNoise:
    """The runtime's draws, at the entries that can win."""

    def noise(step: int, probs: Tensor) -> Tensor:
        rows, ids = (i.numpy() for i in torch.nonzero(probs, as_tuple=True))
        out = torch.ones_like(probs)
        out[rows, ids] = torch.from_numpy(philox_exponential(seed, step, positions[rows], ids))
        return out

    return noise


def _philox(seed: int, c0: int, c1: np.ndarray, c2: np.ndarray | int, stream: int) -> np.ndarray:
    """First output word of Philox4x32-10, uint64 in [0, 2**32) (Salmon et al., SC 2011)."""
    mask = np.uint64(0xFFFFFFFF)
    x0, x1, x2, x3 = (np.array(v, dtype=np.uint64) for v in np.broadcast_arrays(c0, c1, c2, stream))
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0 = (p1 >> np.uint64(32)) ^ x1 ^ np.uint64(k0)
        x2 = (p0 >> np.uint64(32)) ^ x3 ^ np.uint64(k1)
        x1, x3 = p1 & mask, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x0


def _exponential(words: np.ndarray) -> np.ndarray:
    uniform = np.minimum(words * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    return -np.log1p(-uniform)


def philox_exponential(seed: int, step: int, positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Exp(1) noise of the runtime's token race at (step, position, id), float32 of the arrays' shape."""
    return _exponential(_philox(seed, step, positions, ids, 0)).astype(np.float32)


def philox_gumbel(seed: int, step: int, positions: np.ndarray) -> np.ndarray:
    """Gumbel noise of the runtime's remask choice, float32 [T]."""
    return (-np.log(_exponential(_philox(seed, step, positions, 0, 1)))).astype(np.float32)
