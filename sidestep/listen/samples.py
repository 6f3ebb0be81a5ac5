"""Samples while training: the same prompts and seeds every few epochs, beside the model without its adapter.

Rendering leaves no trace in training: the decoder's mode and torch's random state are put back.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sidestep.config.train import TrainConfig
from sidestep.events import Emit, Notice, SampleRendered
from sidestep.exports.base import BaseWeights
from sidestep.files import write_whole
from sidestep.listen.conditions import Wording, encode_prompts
from sidestep.listen.prompts import evenly_spaced, prompt_of_song, read_prompts
from sidestep.listen.render import NoSoundError, Renderer, Sampling, usual_sampling
from sidestep.listen.sound import file_stem, write_flac
from sidestep.listen.story import is_rendering
from sidestep.model.checkpoint import Checkpoint
from sidestep.model.device import choose_device, choose_dtype, free_memory, full_memory_alike, same_random_state
from sidestep.preprocess.tensors import read_header, sample_paths
from sidestep.training.adapters.lycoris import HadamardChange, KroneckerChange
from sidestep.training.assemble import Run
from sidestep.training.passes import Model
from sidestep.training.state import TrainState

FOLDER = "samples"
INDEX = "samples.json"
_SONGS = 2
_FORMAT = 1


def prepare_wordings(config: TrainConfig, checkpoint: Checkpoint, dataset_dir: Path) -> list[Wording]:
    """Encode the prompts of a run: those of --sample-prompts, else those of two of its songs."""
    device = torch.device("cpu") if config.offload_encoder else choose_device(config.device)
    dtype = choose_dtype(config.precision, device)
    if config.sample_prompts is not None:
        prompts = read_prompts(config.sample_prompts)
    else:
        paths = sample_paths(dataset_dir)
        prompts = [prompt_of_song(read_header(paths[at]).metadata) for at in evenly_spaced(len(paths), _SONGS)]
    return encode_prompts(
        checkpoint, prompts, seconds=config.sample_duration, seed=config.seed, device=device, dtype=dtype
    )


class TrainingSamples:
    """Renders the prompts of a run when it is time, into `{output_dir}/samples/`, and keeps samples.json there."""

    def __init__(self, run: Run, wordings: Sequence[Wording], *, emit: Emit) -> None:
        """Get ready; nothing is rendered. What was rendered beyond this run's first step is forgotten.

        Without prompts nothing ever is.
        """
        self._model: Model = run.stepper.model
        self._checkpoint = run.checkpoint
        self._every = run.config.sample_every_n_epochs
        self._starts_trained = run.config.init_from is not None
        self._folder = run.output_dir / FOLDER
        self._wordings = wordings
        self._sampling = usual_sampling(run.checkpoint)
        self._emit = emit
        self._renderer: Renderer | None = None
        self._is_fresh = True
        self._tried_at: int | None = None
        self._parameters = run.adapter.parameters
        self._index = Index(self._folder, wordings, self._sampling, first_step=run.first_step)

    def __call__(self, state: TrainState, *, is_last: bool) -> None:
        """Render what is due at this place of the run. Where there is no room for it, say so and go on."""
        epoch = self._epoch_due(state, is_last=is_last)
        due = self._index.missing(None) if self._is_fresh or epoch is not None else []
        due += self._index.missing(epoch) if epoch is not None else []
        self._is_fresh = False
        if not due:
            return
        self._tried_at = state.step
        try:
            with full_memory_alike(), _no_trace(self._model):
                for rendered_epoch, place in due:
                    self._render(state, rendered_epoch, place)
        except (torch.OutOfMemoryError, NoSoundError) as error:
            reason = (
                "there is no room" if isinstance(error, torch.OutOfMemoryError) else "the sound is silent or broken"
            )
            text = f"No samples at epoch {state.epoch}: {reason}. Training goes on."
            self._emit(Notice(text=text, level="warning"))
        finally:
            free_memory(self._model.device)

    def _epoch_due(self, state: TrainState, *, is_last: bool) -> int | None:
        """Return the epoch whose samples are due, if any; one that is not whole counts as the next."""
        if not self._wordings or state.step == self._tried_at:
            return None
        if state.step == 0:
            return 0 if self._starts_trained else None
        if is_last:
            return state.epoch + (state.batch > 0)
        is_time = not self._is_fresh and state.batch == 0 and state.epoch % self._every == 0
        return state.epoch if is_time else None

    def _render(self, state: TrainState, epoch: int | None, place: int) -> None:
        started = monotonic()
        wording = self._wordings[place]
        label = "base" if epoch is None else f"epoch_{epoch:04d}"
        path = self._folder / label / f"{place + 1}_{file_stem(wording.prompt.caption)}.flac"
        biases = self._plain_biases() if epoch is None else []
        with without_adapter(self._model.decoder, biases, active=epoch is None):
            write_flac(path, self._ready().render(wording, self._sampling))
        self._index.add(epoch, state.step, place, path)
        self._emit(
            SampleRendered(
                step=state.step,
                epoch=epoch,
                prompt=place + 1,
                caption=wording.prompt.caption,
                path=path,
                seconds=monotonic() - started,
            )
        )

    def _plain_biases(self) -> list[tuple[Tensor, Tensor]]:
        """Return each bias of the model that is trained, and what it was before."""
        base = BaseWeights(self._checkpoint)
        trained = ((name, value) for name, value in self._parameters.items() if name.endswith(".bias"))
        return [(value, base.tensor(name).to(value)) for name, value in trained]

    def _ready(self) -> Renderer:
        if self._renderer is None:
            longest = max(wording.seconds for wording in self._wordings)
            self._renderer = Renderer(
                self._checkpoint,
                self._model.decoder,
                seconds=longest,
                device=self._model.device,
                dtype=self._model.dtype,
            )
        return self._renderer


class Index:
    """samples.json: which prompts were rendered when, and where the files are."""

    def __init__(self, folder: Path, wordings: Sequence[Wording], sampling: Sampling, *, first_step: int) -> None:
        self._folder = folder
        self._head: dict[str, Any] = {
            "format_version": _FORMAT,
            "sampling": asdict(sampling),
            "prompts": [{**w.prompt.as_dict(), "duration": w.seconds, "seed": w.seed} for w in wordings],
        }
        self._renderings = self._kept(first_step)

    def missing(self, epoch: int | None) -> list[tuple[int | None, int]]:
        """Return (epoch, place of the prompt) of what is not rendered yet; epoch None is the model alone."""
        there = {(entry["epoch"], entry["prompt"]) for entry in self._renderings}
        return [(epoch, at) for at in range(len(self._head["prompts"])) if (epoch, at + 1) not in there]

    def add(self, epoch: int | None, step: int, place: int, path: Path) -> None:
        """Note a file that was written."""
        file = path.relative_to(self._folder).as_posix()
        self._renderings.append({"epoch": epoch, "step": step, "prompt": place + 1, "file": file})
        text = json.dumps({**self._head, "renderings": self._renderings}, indent=1, ensure_ascii=False)
        write_whole(self._folder / INDEX, text + "\n")

    def _kept(self, first_step: int) -> list[dict[str, Any]]:
        """Return what an earlier session rendered with the same prompts, up to the step that is gone on from.

        Entries that were changed by hand to what is none are made again.
        """
        path = self._folder / INDEX
        if not first_step or not path.is_file():
            return []
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return []  # Torn when a machine went down; the samples are made again.
        if not isinstance(content, dict) or any(content.get(key) != value for key, value in self._head.items()):
            return []
        renderings = content.get("renderings")
        return [
            entry
            for entry in (renderings if isinstance(renderings, list) else [])
            if is_rendering(entry) and entry["step"] <= first_step and (self._folder / entry["file"]).is_file()
        ]


@contextmanager
def without_adapter(
    decoder: nn.Module, biases: Sequence[tuple[Tensor, Tensor]] = (), *, active: bool = True
) -> Iterator[None]:
    """Let a decoder compute as if it had no adapter, unless `active` is false.

    `biases` are those of the model that are trained, and what each was before.
    """
    kept = [(trained, trained.detach().clone()) for trained, _ in biases]
    layers = [module for module in decoder.modules() if isinstance(module, BaseTunerLayer)] if active else []
    changes = [m for m in decoder.modules() if isinstance(m, KroneckerChange | HadamardChange)] if active else []
    _put(biases)
    for layer in layers:
        layer.enable_adapters(False)
    handles = [change.register_forward_hook(_nothing) for change in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.enable_adapters(True)
        _put(kept)


def _put(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for place, value in values:
            place.copy_(value)


def _nothing(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


@contextmanager
def _no_trace(model: Model) -> Iterator[None]:
    """Compute as at inference, and put back what training depends on."""
    was_training = model.decoder.training
    with same_random_state(model.device), torch.no_grad():
        model.decoder.eval()
        model.cross_attention.set_rows(None)
        try:
            yield
        finally:
            model.decoder.train(was_training)
