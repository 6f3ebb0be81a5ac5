"""Everything `sample` needs in memory: a model, an adapter beside it, encoded prompts."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from sidestep.errors import RunError
from sidestep.exports.base import BaseWeights
from sidestep.exports.source import read_adapter
from sidestep.listen.attach import Attached
from sidestep.listen.conditions import Wording, encode_prompts
from sidestep.listen.prompts import SamplePrompt
from sidestep.listen.render import Renderer, Sampling
from sidestep.listen.sound import file_stem, free_path, write_flac
from sidestep.model.checkpoint import Checkpoint
from sidestep.model.device import full_memory_alike
from sidestep.model.loading import load_decoder, widen_stream


class Studio:
    """Renders prompts with a model and, where there is one, an adapter at any strength."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompts: Sequence[SamplePrompt],
        *,
        adapter: Path | None,
        seconds: float,
        seed: int,
        sampling: Sampling,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Load it all; `seconds` and `seed` are for prompts that state none.

        ModelError for an adapter that does not fit.
        """
        base = BaseWeights(checkpoint)
        source = read_adapter(adapter, base) if adapter else None
        self.sampling = sampling
        self.wordings = encode_prompts(checkpoint, prompts, seconds=seconds, seed=seed, device=device, dtype=dtype)
        decoder = load_decoder(checkpoint, device=device, dtype=dtype)
        widen_stream(decoder, dtype=dtype)
        self.attached = Attached(decoder, source, base) if source else None
        longest = max(wording.seconds for wording in self.wordings)
        self.renderer = Renderer(checkpoint, decoder, seconds=longest, device=device, dtype=dtype)

    def render_all(self, strengths: Sequence[float], *, folder: Path) -> Iterator[Path]:
        """Write each prompt at each strength as a FLAC file of its own and yield its path; nothing is overwritten."""
        for wording in self.wordings:
            for strength in strengths:
                if self.attached:
                    self.attached.strength = strength
                name = f"{file_stem(wording.prompt.caption)}_seed{wording.seed}_x{strength:g}.flac"
                path = free_path(folder / name)
                write_flac(path, self._render(wording))
                yield path

    def _render(self, wording: Wording) -> np.ndarray:
        try:
            with full_memory_alike():
                return self.renderer.render(wording, self.sampling)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"There is no room on the {self.renderer.device.type} device for {wording.seconds:g} s of music.",
                hint="Give a smaller --duration, or --device cpu.",
            ) from error
