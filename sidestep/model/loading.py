"""Reads one part of a checkpoint at a time into diffusers' ACE-Step classes, straight into the wanted dtype and device.

Every part is built without memory for its weights, compared with the stored tensors name by name, and then filled from
memory-mapped files. Parts come back frozen and in evaluation mode. Every function raises ModelError when the checkpoint
does not fit.
"""

import pickle
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder, AceStepTimbreEncoder
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from sidestep.errors import ModelError
from sidestep.model import architecture, names
from sidestep.model.checkpoint import (
    SILENCE_FILE,
    Checkpoint,
    condition_encoder_tensors,
    decoder_tensors,
    encoder_fingerprint,
    existing_folder,
    name_on_disk,
    null_condition_tensor,
)
from sidestep.model.device import wide_dtype
from sidestep.model.weights import DOWNLOAD_AGAIN, StoredTensor, check_tensors, in_portions, read_json, read_weights

__all__ = [
    "TimbreEncoder",
    "encoder_fingerprint",
    "load_condition_encoder",
    "load_decoder",
    "load_null_condition",
    "load_silence_latent",
    "load_text_encoder",
    "load_vae",
    "silence_of",
]

Model = TypeVar("Model", bound=nn.Module)

SILENCE_FRAMES = 15_000
"""Length of the stored latent of silence: 600 s at 25 frames/s."""

_NOT_OF_TIMBRE = ("text_hidden_dim", "num_lyric_encoder_hidden_layers", "layer_types")


class TimbreEncoder(AceStepTimbreEncoder):
    """The timbre encoder of XL: reads the sequence [special token, frames] and gives what becomes of the special token.

    The original's XL code prepends the token (turbo, base and sft do not, and neither does diffusers), so that the
    pooled first position is the token's, and the frames' rotary positions count from 1.
    """

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.embed_tokens.register_forward_hook(self._prepend_special_token)

    def _prepend_special_token(self, _module: nn.Module, _inputs: tuple[Tensor, ...], frames: Tensor) -> Tensor:
        return torch.cat([self.special_token.expand(frames.shape[0], -1, -1), frames], dim=1)


def load_decoder(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> AceStepTransformer1DModel:
    """Load the diffusion transformer: the only part that training needs, besides the null condition."""
    with torch.device("meta"):
        decoder = AceStepTransformer1DModel(**architecture.decoder_arguments(checkpoint.config))
    on_disk = partial(name_on_disk, checkpoint, names.DECODER_PREFIX)
    return _fill(decoder, decoder_tensors(checkpoint), "decoder", name_on_disk=on_disk, device=device, dtype=dtype)


def widen_stream(decoder: AceStepTransformer1DModel, *, dtype: torch.dtype) -> None:
    """Let the sum that runs through the decoder's blocks be kept in `wide_dtype`; the blocks compute in `dtype`."""
    wide = wide_dtype(dtype)
    if wide != dtype:
        # Every block adds to what it is given, in the dtype of what it is given.
        decoder.proj_in_conv.register_forward_hook(lambda module, inputs, stream: stream.to(wide))


def load_null_condition(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Load the row [1, 1, D] that stands for "no condition" in classifier-free guidance."""
    stored = null_condition_tensor(checkpoint)
    wanted = {names.NULL_CONDITION: (1, 1, checkpoint.encoder_width)}
    check_tensors("null condition", wanted, stored, name_on_disk=str)
    return _read(stored, device=device, dtype=dtype)[names.NULL_CONDITION]


def load_condition_encoder(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype
) -> AceStepConditionEncoder:
    """Load the encoder of text, lyrics and timbre, with the latent of silence [1, 15000, 64] as its buffer."""
    config = checkpoint.config
    if checkpoint.layout == "diffusers":
        config = read_json(checkpoint.folder / "condition_encoder" / "config.json")
    arguments = architecture.condition_encoder_arguments(config)
    with torch.device("meta"):
        encoder = AceStepConditionEncoder(**arguments)
        if checkpoint.is_xl:
            encoder.timbre_encoder = TimbreEncoder(
                **{key: size for key, size in arguments.items() if key not in _NOT_OF_TIMBRE}
            )
    stored = condition_encoder_tensors(checkpoint)
    silence: dict[str, Tensor] = {}
    if checkpoint.layout == "original":
        silence = {names.SILENCE_LATENT: load_silence_latent(checkpoint).to(device, dtype)}
    on_disk = partial(name_on_disk, checkpoint, names.CONDITION_ENCODER_PREFIX)
    return _fill(
        encoder, stored, "condition encoder", name_on_disk=on_disk, device=device, dtype=dtype, already=silence
    )


def load_silence_latent(checkpoint: Checkpoint, *, frames: int | None = None) -> Tensor:
    """Load the first `frames` (all 15000 without it) of the latent of silence: float32 [1, frames, 64].

    Beyond 15000 frames it starts again from its beginning, as the official preprocessing does.
    """
    channels = int(architecture.setting(checkpoint.config, "timbre_hidden_dim"))
    if checkpoint.layout == "diffusers":
        tensors = condition_encoder_tensors(checkpoint)
        stored = {name: tensor for name, tensor in tensors.items() if name == names.SILENCE_LATENT}
        wanted = {names.SILENCE_LATENT: (1, SILENCE_FRAMES, channels)}
        check_tensors("latent of silence", wanted, stored, name_on_disk=str)
        silence = _read(stored, device=torch.device("cpu"), dtype=torch.float32)[names.SILENCE_LATENT]
    else:
        silence = _read_silence_file(checkpoint, channels)
    return silence if frames is None else silence_of(silence, frames)


def silence_of(silence: Tensor, frames: int) -> Tensor:
    """So many frames [1, frames, 64] of the latent of silence [1, 15000, 64], which begins again where it ends."""
    repeats = -(-frames // SILENCE_FRAMES)
    return silence.repeat(1, repeats, 1)[:, :frames].contiguous()


def load_vae(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> AutoencoderOobleck:
    """Load the audio autoencoder: stereo 48 kHz to latents of 64 channels at 25 frames/s and back."""
    config = read_json(existing_folder(checkpoint.vae, "VAE") / "config.json")
    sizes = ("encoder_hidden_size", "downsampling_ratios", "channel_multiples", "decoder_channels")
    keys = (*sizes, "decoder_input_channels", "audio_channels", "sampling_rate")
    missing = [key for key in keys if key not in config]
    if missing:
        raise ModelError(
            f"{checkpoint.vae / 'config.json'} lacks {', '.join(missing)}.",
            hint="The folder must hold diffusers' AutoencoderOobleck; download vae/ of ACE-Step/Ace-Step1.5 again.",
        )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # Diffusers builds it with the old weight_norm, because that is how its weights are named.
            warnings.simplefilter("ignore", FutureWarning)
            vae = AutoencoderOobleck(**{key: config[key] for key in keys})
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ModelError(
            f"{checkpoint.vae / 'config.json'} describes no AutoencoderOobleck.", hint=DOWNLOAD_AGAIN
        ) from error
    stored = read_weights(checkpoint.vae, "diffusion_pytorch_model")
    return _fill(vae, stored, "VAE", name_on_disk=str, device=device, dtype=dtype)


def load_text_encoder(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedTokenizerFast, Qwen3Model]:
    """Load the tokenizer and the text encoder, Qwen3-Embedding-0.6B."""
    folder = existing_folder(checkpoint.text_encoder, "text encoder")
    content = read_json(folder / "config.json")
    if content.get("model_type") != "qwen3":
        raise ModelError(
            f"{folder} holds a model of type {content.get('model_type')!r}, not qwen3.",
            hint="The folder must hold Qwen3-Embedding-0.6B, as ACE-Step/Ace-Step1.5 does.",
        )
    try:
        config = Qwen3Config.from_dict(content)
        with torch.device("meta"):
            encoder = Qwen3Model(config)
    except (StrictDataclassError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise ModelError(f"{folder / 'config.json'} describes no Qwen3 model.", hint=DOWNLOAD_AGAIN) from error
    # Frequencies are computed, not stored, and stay in float32 whatever the dtype.
    encoder.rotary_emb = Qwen3RotaryEmbedding(config).to(device)
    # A causal model's file prefixes "model." and may hold the output layer, which an encoder does not have.
    stored = {
        name.removeprefix("model."): tensor
        for name, tensor in read_weights(folder, "model").items()
        if name != "lm_head.weight"
    }
    _fill(encoder, stored, "text encoder", name_on_disk=str, device=device, dtype=dtype)
    return _load_tokenizer(checkpoint), encoder


def _load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    file = checkpoint.tokenizer / "tokenizer.json"
    read_json(file)
    try:
        # The general class takes tokenizer.json as it is, with the <|endoftext|> that its post-processor appends.
        return PreTrainedTokenizerFast.from_pretrained(checkpoint.tokenizer, local_files_only=True)
    except Exception as error:  # The tokenizers library raises bare Exceptions for what it cannot read.
        raise ModelError(f"{file}, or a file beside it, describes no tokenizer.", hint=DOWNLOAD_AGAIN) from error


def _read_silence_file(checkpoint: Checkpoint, channels: int) -> Tensor:
    """Read silence_latent.pt, stored as [1, 64, 15000], as float32 [1, 15000, 64]."""
    path = checkpoint.folder / SILENCE_FILE
    hint = f"Copy {SILENCE_FILE} from the model it descends from into this folder; every official one holds it."
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing: the latent of silence.", hint=hint) from error
    # A file that is no pickle at all fails as its first bytes would have it.
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read.", hint=hint) from error
    if not isinstance(stored, Tensor) or tuple(stored.shape) != (1, channels, SILENCE_FRAMES):
        shape = list(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
        raise ModelError(f"{path} holds {shape}, not a tensor [1, {channels}, {SILENCE_FRAMES}].", hint=hint)
    return stored.to(torch.float32).transpose(1, 2).contiguous()


def _fill(
    model: Model,
    stored: Mapping[str, StoredTensor],
    what: str,
    *,
    name_on_disk: Callable[[str], str],
    device: torch.device,
    dtype: torch.dtype,
    already: Mapping[str, Tensor] | None = None,
) -> Model:
    """Give a model built on the meta device its weights, frozen; `already` are tensors that come from elsewhere."""
    already = dict(already or {})
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in already}
    check_tensors(what, wanted, stored, name_on_disk=name_on_disk)
    model.load_state_dict(_read(stored, device=device, dtype=dtype) | already, assign=True)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"{what}: {left} have no values after loading")
    return model.eval().requires_grad_(False)


def _read(stored: Mapping[str, StoredTensor], *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read just these tensors from their memory-mapped files, each straight into `dtype` on `device`.

    A mapped file counts as the process's memory as far as it was read. It is mapped anew for every portion, so that
    what was copied to a device no longer counts.
    """
    names_of = {tensor: name for name, tensor in stored.items()}
    tensors = {}
    for portion in in_portions(names_of):
        file = portion[0].file
        try:
            with safe_open(file, framework="pt", device="cpu") as content:
                for tensor in portion:
                    tensors[names_of[tensor]] = content.get_tensor(tensor.name).to(device, dtype)
        except SafetensorError as error:
            raise ModelError(f"{file} cannot be read: {error}.", hint=DOWNLOAD_AGAIN) from error
    return tensors
