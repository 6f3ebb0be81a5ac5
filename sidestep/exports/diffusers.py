"""For diffusers' `load_lora_weights`: its own names, and a header that says the scale."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor

from sidestep.exports.base import BaseWeights, without_numbers
from sidestep.exports.changes import LowRank
from sidestep.exports.find import DIFFUSERS_FILE
from sidestep.exports.source import DIFFUSERS_HEADER, DIFFUSERS_PREFIX
from sidestep.exports.target import Content, layer_change, loaded_layers
from sidestep.model import architecture
from sidestep.model.names import to_diffusers, to_original

_ADAPTER = "export"


class Diffusers:
    """The one file `pytorch_lora_weights.safetensors`."""

    forms: ClassVar[tuple[type, ...]] = (LowRank,)
    reads_biases: ClassVar[bool] = False

    def write(self, folder: Path, content: Content, base: BaseWeights) -> None:
        """Write the file, the settings PEFT needs in its header."""
        tensors = {}
        for module, change in content.low_rank():
            stem = DIFFUSERS_PREFIX + to_diffusers(module)
            tensors[f"{stem}.lora_A.weight"] = change.down
            tensors[f"{stem}.lora_B.weight"] = change.up
            if change.magnitude is not None:
                tensors[f"{stem}.lora_magnitude_vector"] = change.magnitude
        settings = {
            "r": content.rank,
            "lora_alpha": content.rank,
            "target_modules": [to_diffusers(module) for module in content.changes],
            "use_dora": content.is_dora,
        }
        stated = {DIFFUSERS_PREFIX + key: value for key, value in settings.items()}
        header = {"format": "pt", DIFFUSERS_HEADER: json.dumps(stated, indent=2, sort_keys=True), **content.header}
        save_file(tensors, folder / DIFFUSERS_FILE, metadata=header)

    def read(self, folder: Path, base: BaseWeights) -> Iterator[tuple[str, Tensor]]:
        """Load the folder with `load_lora_weights` into a pipeline whose decoder has the right sizes."""
        with torch.device("meta"):
            decoder = AceStepTransformer1DModel(**architecture.decoder_arguments(base.config))
        without_numbers(decoder)
        pipeline = AceStepPipeline(
            vae=None,  # pyright: ignore[reportArgumentType]  Only the decoder takes part.
            text_encoder=None,  # pyright: ignore[reportArgumentType]
            tokenizer=None,  # pyright: ignore[reportArgumentType]
            transformer=decoder,
            condition_encoder=None,  # pyright: ignore[reportArgumentType]
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
        pipeline.load_lora_weights(str(folder), adapter_name=_ADAPTER)
        for name, layer in loaded_layers(decoder, _ADAPTER):
            module = to_original(name)
            yield (module, layer_change(layer, _ADAPTER, module, base))
