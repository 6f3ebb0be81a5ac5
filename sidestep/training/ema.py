"""A moving average of the adapter's weights, beside the raw ones."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter


@dataclass(slots=True)
class Ema:
    """The average of `parameters`; early steps count more, so that it does not hang on to the start."""

    parameters: Mapping[str, Parameter]
    decay: float
    average: dict[str, Tensor]

    @classmethod
    def of(cls, parameters: Mapping[str, Parameter], *, decay: float, average: Mapping[str, Tensor] | None) -> "Ema":
        """Start from the parameters as they are, or go on from a saved average."""
        start = average or parameters
        values = {name: start[name].detach().to(parameter).clone() for name, parameter in parameters.items()}
        return cls(parameters, decay, values)

    def update(self, step: int, *, unless: Tensor | None = None) -> None:
        """Take in the weights after optimizer step `step` (from 1), with decay min(decay, (1 + step) / (10 + step)).

        `unless`: a flag on the device, 0 or 1; while it is raised the average stays as it is, without a wait for it.
        """
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        weight = share if unless is None else (1 - unless) * share
        for name, value in self.average.items():
            value.lerp_(self.parameters[name].detach(), weight)

    def values(self) -> dict[str, Tensor]:
        """Return copies of the average on the CPU."""
        return {name: value.cpu().clone() for name, value in self.average.items()}
