"""The released files of LaDA-Band: where they lie, and each network's configuration and tensors.

Layout and key groups: spec/lada_band.md b, spec/mucodec.md 8, spec/clamp3.md 7. Tensors stay in their files
until a module is loaded (`Network.build`), which maps them instead of copying where they are float32 already.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch
from lada_rt.errors import CheckpointError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lada_rt_export.checkpoints import LazyTensor, TensorFile, open_tensors, plain_name, select
from lada_rt_export.models import clamp3, flow, latent_norm, mask_predictor, mel_vae, mert, muq, vocoder, vq
from lada_rt_export.models.clamp3 import Clamp3AudioConfig, Clamp3TextConfig
from lada_rt_export.models.flow import FlowConfig
from lada_rt_export.models.mask_predictor import MaskPredictorConfig
from lada_rt_export.models.mel_vae import MelVAEConfig
from lada_rt_export.models.mert import MertConfig
from lada_rt_export.models.muq import MuQConfig
from lada_rt_export.models.vocoder import VocoderConfig
from lada_rt_export.models.vq import VQConfig
from lada_rt_export.release_files import ReleaseFiles, find_release_files
from lada_rt_export.release_sizes import SIZES_FILE, ReleaseSizes, read_json
from lada_rt_export.safe_pickle import plain

__all__ = ["Network", "Release", "shapes_of"]

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)

_FLOATS: Final = ("bfloat16", "float16", "float32", "float64")
_POS_CONV: Final = "encoder.pos_conv_embed.conv."


@dataclass(frozen=True, slots=True)
class Network(Generic[C]):
    """One network of a release: its configuration, and its tensors under the names its torch module uses.

    `constants` holds stored tables that are preferred to the formulas where the file has them. `source` names
    the file for messages.
    """

    config: C
    tensors: Mapping[str, LazyTensor]
    source: str
    constants: Mapping[str, LazyTensor] = field(default_factory=dict)
    #: turns the stored tensors into the module's, where the two differ
    finish: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict

    def state_dict(self) -> dict[str, Tensor]:
        """float32 tensors ready for a strict `load_state_dict`: views of the file, or widened copies.

        Raises:
            CheckpointError: a tensor's data is damaged.
        """
        return self.finish({name: tensor.torch(widen=True) for name, tensor in self.tensors.items()})

    def build(self, make: Callable[[C], M]) -> M:
        """The loaded module in eval mode, without gradients and without a second copy of the weights.

        Args:
            make: the module class.

        Raises:
            CheckpointError: a tensor's data is damaged, or a weight is no floating-point number.
        """
        with _NoInit():
            module = make(self.config)
        whole = {name for name, tensor in module.state_dict().items() if not tensor.is_floating_point()}
        wrong = [
            f"{name} {tensor.dtype}"
            for name, tensor in self.tensors.items()
            if (tensor.dtype not in _FLOATS) != (name in whole)
        ]
        if wrong:
            raise CheckpointError(
                f"{self.source}: expected weights as floating-point numbers, got {', '.join(wrong)}; "
                "check that this is the released file"
            )
        tensors = {name: t.float() if t.dtype == torch.float64 else t for name, t in self.state_dict().items()}
        module.load_state_dict(tensors, strict=True, assign=True)
        return module.eval().requires_grad_(False)


class _NoInit(TorchFunctionMode):
    """Leaves new parameters unwritten: their pages are never touched, and loading replaces them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("uniform_", "normal_", "kaiming_uniform_") and args:
            return args[0]
        return func(*args, **(kwargs or {}))


def shapes_of(make: Callable[[C], nn.Module], config: C) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a module's state dict, without allocating it."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make(config).state_dict().items()}


@dataclass(frozen=True, slots=True)
class Release:
    """Located files and the sizes that go with them; one method per network, which checks keys and shapes."""

    files: ReleaseFiles
    sizes: ReleaseSizes

    @classmethod
    def locate(
        cls, checkpoint: str | Path, pretrained_root: str | Path, tokenizer: str | Path | None = None
    ) -> Release:
        """Find every file of a release.

        Args:
            checkpoint: the LaDA-Band checkpoint.
            pretrained_root: the folder that holds mucodec/, clamp3/, MERT-v1-95M/ and hub/.
            tokenizer: the XLM-R tokenizer.json, or its folder, where it is not in the hub layout.

        Raises:
            CheckpointError: files are missing (all of them are listed), or `lada_rt_sizes.json` is wrong.
        """
        files = find_release_files(Path(checkpoint), Path(pretrained_root), Path(tokenizer) if tokenizer else None)
        sizes_path = files.checkpoint.parent / SIZES_FILE
        sizes = (
            ReleaseSizes.from_json(read_json(sizes_path), sizes_path.name) if sizes_path.is_file() else ReleaseSizes()
        )
        return cls(files, sizes)

    def mask_predictor(self) -> Network[MaskPredictorConfig]:
        """LaDA-Band's language model, without the replaced-token head.

        Raises:
            CheckpointError: wrong keys or shapes, or a file trained with adapters, which are not implemented.
        """
        file = open_tensors(self.files.checkpoint)
        prefix = mask_predictor.KEY_PREFIX
        tensors = _state(file, "state_dict")
        own = {plain_name(name): tensor for name, tensor in tensors.items()}
        adapter = re.compile(re.escape(prefix) + f"({'|'.join(mask_predictor.FOREIGN_KEYS)})")
        adapters = [name for name in own if adapter.match(name)]
        if adapters:
            raise CheckpointError(
                f"{file.source}: expected plain linear layers, got {len(adapters)} tensors of a mixture of "
                f"adapters such as {ascii(adapters[0])[:100]}; merge them into the weights, "
                "or use the released file"
            )
        config = self.sizes.mask_predictor or _released_size(own.get(f"{prefix}voc_embed.weight"))
        chosen = select(
            tensors,
            shapes_of(mask_predictor.MaskPredictor, config),
            source=file.source,
            prefix=prefix,
            dead=(*mask_predictor.DEAD_KEYS, *(() if config.rtd_head else mask_predictor.RTD_KEYS)),
        )
        return Network(config, chosen, file.source)

    def clamp3_text(self) -> Network[Clamp3TextConfig]:
        """CLaMP 3's text branch.

        Raises:
            CheckpointError: wrong keys or shapes.
        """
        others = (*clamp3.AUDIO_KEYS, *clamp3.TEXT_DEAD_KEYS, r"symbolic_(model|proj)\.")
        return self._clamp3(clamp3.Clamp3Text, self.sizes.clamp3_text, others)

    def clamp3_audio(self) -> Network[Clamp3AudioConfig]:
        """CLaMP 3's audio branch.

        Raises:
            CheckpointError: wrong keys or shapes.
        """
        others = (*clamp3.TEXT_KEYS, *clamp3.AUDIO_DEAD_KEYS, r"symbolic_(model|proj)\.")
        return self._clamp3(clamp3.Clamp3Audio, self.sizes.clamp3_audio, others)

    def _clamp3(self, make: Callable[[C], nn.Module], config: C, dead: tuple[str, ...]) -> Network[C]:
        file = open_tensors(self.files.clamp3)
        tensors = _state(file, "model")
        return Network(config, select(tensors, shapes_of(make, config), source=file.source, dead=dead), file.source)

    def mert(self) -> Network[MertConfig]:
        """MERT; sizes from its config.json. `state_dict` folds the positional convolution's weight norm.

        Raises:
            CheckpointError: wrong keys or shapes, or a configuration that is not implemented.
        """
        stated = read_json(self.files.mert_config)
        if not isinstance(stated, dict):
            raise CheckpointError(f"{self.files.mert_config}: expected a dictionary; use the MERT-v1-95M folder")
        config = MertConfig.from_json(stated)
        file = open_tensors(self.files.mert_weights)
        tensors = _state(file)
        expected = shapes_of(mert.Mert, config)
        if _POS_CONV + "weight" not in tensors:
            weight = expected.pop(_POS_CONV + "weight")
            expected[_POS_CONV + "weight_g"] = (1, 1, weight[-1])
            expected[_POS_CONV + "weight_v"] = weight
        chosen = select(tensors, expected, source=file.source, dead=mert.DEAD_KEYS)
        return Network(config, chosen, file.source, finish=mert.fold_positional_conv)

    def mert_normalizes(self) -> bool:
        """`do_normalize` of MERT's preprocessor_config.json; an absent key means true, as in the library.

        Raises:
            CheckpointError: the file is no JSON dictionary, or the value no boolean.
        """
        stated = read_json(self.files.mert_preprocessor)
        value = stated.get("do_normalize", True) if isinstance(stated, dict) else stated
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self.files.mert_preprocessor}: expected do_normalize true or false, "
                f"got {ascii(value)[:40]}; download the file again"
            )
        return value

    def muq(self) -> Network[MuQConfig]:
        """The MuQ encoder; `constants` are the stored mel window, filterbank and rotary frequencies, if any.

        A copy inside mucodec.pt (`muencoder.model.*`) wins over muq.pt, tensor by tensor, as in the release.

        Raises:
            CheckpointError: wrong keys or shapes, or a configuration that is not implemented.
        """
        file = open_tensors(self.files.muq)
        config = _stated_muq(file, self.sizes.muq)
        codec = open_tensors(self.files.mucodec)
        outer = "muencoder."
        inner = {
            name[len(outer) :]: tensor
            for name, tensor in _state(codec).items()
            if name.startswith(outer + muq.KEY_PREFIX)
        }
        tensors = _state(file, "model") | inner
        source = f"{file.source} with {outer}* of {codec.source}" if inner else file.source
        chosen = select(
            tensors,
            shapes_of(muq.MuQ, config),
            source=source,
            prefix=muq.KEY_PREFIX,
            dead=muq.dead_keys(config),
        )
        constants = {
            name: tensors[muq.KEY_PREFIX + name]
            for name in muq.CONSTANT_KEYS.values()
            if muq.KEY_PREFIX + name in tensors
        }
        return Network(config, chosen, source, constants)

    def resample_kernel(self) -> LazyTensor | None:
        """The stored 48 kHz to 24 kHz kernel [1, 1, 28], preferred to the formula; None if there is none.

        Raises:
            CheckpointError: it has another shape.
        """
        file = open_tensors(self.files.mucodec)
        name = muq.RESAMPLE_KERNEL_KEY
        found = select(_state(file), {name: (1, 1, 28)}, source=file.source, dead=(".*",), optional=(".*",))
        return found.get(name)

    def vq(self) -> Network[VQConfig]:
        """The vector quantiser.

        Raises:
            CheckpointError: wrong keys or shapes.
        """
        return self._codec(vq.VQ, self.sizes.vq, vq.KEY_PREFIX, vq.DEAD_KEYS)

    def condition(self) -> Network[VQConfig]:
        """The linear layer from quantised vectors to condition vectors; build it with `vq.condition_linear`.

        Raises:
            CheckpointError: wrong keys or shapes.
        """
        return self._codec(vq.condition_linear, self.sizes.vq, vq.CONDITION_KEY_PREFIX)

    def flow(self) -> Network[FlowConfig]:
        """The flow estimator.

        Raises:
            CheckpointError: wrong keys or shapes.
        """
        return self._codec(flow.Flow, self.sizes.flow, flow.KEY_PREFIX, flow.DEAD_KEYS)

    def _codec(
        self,
        make: Callable[[C], nn.Module],
        config: C,
        prefix: str,
        dead: Iterable[str | re.Pattern[str]] = (),
    ) -> Network[C]:
        file = open_tensors(self.files.mucodec)
        chosen = select(_state(file), shapes_of(make, config), source=file.source, prefix=prefix, dead=dead)
        return Network(config, chosen, file.source)

    def latent_norm(self) -> Network[tuple[int, int]]:
        """The latent statistics; the configuration is (channels, frequencies).

        Raises:
            CheckpointError: wrong keys or shapes, or statistics that are not final or not finite.
        """
        file = open_tensors(self.files.mucodec)
        grid = (self.sizes.flow.out_channels, self.sizes.flow.frequencies)
        expected = shapes_of(lambda size: latent_norm.LatentNorm(*size), grid)
        prefix = latent_norm.KEY_PREFIX
        found = select(_state(file), expected, source=file.source, prefix=prefix, dead=latent_norm.DEAD_KEYS)
        values = {name: tensor.numpy(widen=True).astype(np.float64) for name, tensor in found.items()}
        counts = float(values["counts"][0])
        if not latent_norm.MIN_COUNTS <= counts < math.inf:
            raise CheckpointError(
                f"{file.source}: expected {prefix}counts of at least {latent_norm.MIN_COUNTS}, "
                f"got {counts:g}; the latent statistics are unfinished, use the released mucodec.pt"
            )
        if not all(np.isfinite(v).all() for v in values.values()):
            raise CheckpointError(
                f"{file.source}: expected finite latent statistics under {prefix!a}, got others; "
                "use the released mucodec.pt"
            )
        return Network(grid, found, file.source)

    def mel_vae(self) -> Network[MelVAEConfig]:
        """The mel decoder and its latent scale.

        Raises:
            CheckpointError: wrong keys or shapes, or a scale factor that is not a positive number.
        """
        file = open_tensors(self.files.audioldm)
        prefix, scale = mel_vae.KEY_PREFIX, mel_vae.SCALE_FACTOR_KEY
        tensors = _state(file, "state_dict")
        if scale in tensors:
            tensors[prefix + scale] = tensors[scale]
        expected = shapes_of(mel_vae.MelVAE, self.sizes.mel_vae)
        found = select(tensors, expected, source=file.source, prefix=prefix, dead=mel_vae.DEAD_KEYS)
        value = float(found[scale].numpy(widen=True))
        if not 0 < value < math.inf:
            raise CheckpointError(
                f"{file.source}: expected a positive {scale}, got {value:g}; use the released audioldm_48k.pth"
            )
        return Network(self.sizes.mel_vae, found, file.source)

    def vocoder(self) -> Network[VocoderConfig]:
        """The vocoder.

        Raises:
            CheckpointError: wrong keys or shapes.
        """
        file = open_tensors(self.files.audioldm)
        expected = shapes_of(vocoder.Vocoder, self.sizes.vocoder)
        prefix, dead = vocoder.KEY_PREFIX, vocoder.DEAD_KEYS
        tensors = select(_state(file, "state_dict"), expected, source=file.source, prefix=prefix, dead=dead)
        return Network(self.sizes.vocoder, tensors, file.source)

    def tokenizer_json(self) -> bytes:
        """The text tokenizer's file, checked to load and to fit the text encoder's vocabulary.

        Raises:
            CheckpointError: it is no tokenizer, or has ids the text encoder lacks.
        """
        path = self.files.tokenizer
        read_json(path)
        data = path.read_bytes()
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            reason = ascii(str(error))[1:-1][:200]
            raise CheckpointError(
                f"{path}: expected an XLM-RoBERTa tokenizer.json, got: {reason}; download the file again"
            ) from error
        wanted = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
        found = {token: tokenizer.token_to_id(token) for token in wanted}
        n_ids = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if found != wanted or n_ids > self.sizes.clamp3_text.vocab_size:
            raise CheckpointError(
                f"{path}: expected special tokens {wanted} and at most "
                f"{self.sizes.clamp3_text.vocab_size} ids, got {found} and {n_ids}; "
                "use the tokenizer of xlm-roberta-base"
            )
        return data


def _state(file: TensorFile, *keys: str) -> dict[str, LazyTensor]:
    """The state dict of a file; .safetensors is flat, whatever the torch file nests it in."""
    return file.tensors() if file.kind == "safetensors" else file.tensors(*keys)


def _released_size(vocal_embedding: LazyTensor | None) -> MaskPredictorConfig:
    large = MaskPredictorConfig.lm_3b()
    if vocal_embedding is not None and vocal_embedding.shape[-1:] == (large.hidden_size // 2,):
        return large
    return MaskPredictorConfig.lm_1b()


def _stated_muq(file: TensorFile, config: MuQConfig) -> MuQConfig:
    """Compare the training configuration in muq.pt, where there is one, with what is implemented here."""
    stated = plain(file.root.get("cfg")) if isinstance(file.root, dict) else None
    model = stated.get("model") if isinstance(stated, dict) else None
    if not isinstance(model, dict):
        return config
    required = {
        "is_flash": False,  # that variant drops attention at random, at inference too
        "label_rate": config.sample_rate // config.hop_samples // 4,
        "n_mels": config.n_mels,
        "hop_length": config.hop_samples,
        "conv_dim": config.conv_dim,
        "encoder_dim": config.dim,
    }
    wrong = [
        f"{key} {ascii(model[key])[:40]} instead of {value}"
        for key, value in required.items()
        if key in model and model[key] != value
    ]
    if wrong:
        raise CheckpointError(
            f"{file.source}: expected cfg.model of the released MuQ, got {', '.join(wrong)}; use its muq.pt"
        )
    statistics = model.get("stat")
    if isinstance(statistics, dict):
        mean = _finite(statistics.get("melspec_2048_mean"), config.mel_mean)
        std = _finite(statistics.get("melspec_2048_std"), config.mel_std)
        config = replace(config, mel_mean=mean, mel_std=std if std > 0 else config.mel_std)
    return config


def _finite(value: Any, default: float) -> float:
    return value if isinstance(value, float) and math.isfinite(value) else default
