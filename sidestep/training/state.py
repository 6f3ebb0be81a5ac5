"""Where a run is: the one mutable thing of the engine."""

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class TrainState:
    """Position and running sums of a run. `epoch` counts whole epochs, `batch` those done of the next one.

    `processes` is how many the run was started with: a step has the passes of so many, however many make them now.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    epoch_loss_sum: float = 0.0
    epoch_steps: int = 0
    best_loss: float = float("inf")
    epochs_since_best: int = 0
    processes: int = 1

    @property
    def place(self) -> tuple[int, int]:
        """The whole epochs, and the step within the next one or 0: the order of a run's checkpoints."""
        return self.epoch, self.step if self.batch else 0

    def is_out_of_patience(self, patience: int) -> bool:
        """Say whether the last of so many epochs (0: any number) without a better held-out loss has just ended."""
        return self.batch == 0 and 0 < patience <= self.epochs_since_best

    def finish_epoch(self) -> float:
        """Move on to the next epoch and return the mean loss of the one that ended."""
        mean = self.epoch_loss_sum / max(1, self.epoch_steps)
        self.epoch += 1
        self.batch = self.epoch_steps = 0
        self.epoch_loss_sum = 0.0
        return mean

    def go_back_to(self, earlier: "TrainState") -> None:
        """Take over every number of an earlier state."""
        for name, value in earlier.as_dict().items():
            setattr(self, name, value)

    def as_dict(self) -> dict[str, int | float]:
        """Return plain numbers for the checkpoint."""
        return asdict(self)
