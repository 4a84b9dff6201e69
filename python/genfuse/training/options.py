"""The options of a training."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from genfuse.errors import SettingsError


@dataclass(frozen=True)
class Options:
    """The options of a `Trainer`. Raises SettingsError for one out of its range."""

    epochs: int | None = None
    """Passes over the training split; left out, as many `steps` as the model usually needs."""
    steps: int | None = None
    """Updates in all; given, it takes the place of `epochs`, and the last pass may be cut short."""
    batch_size: int = 128
    """Examples per step, over all devices together."""
    lr: float | None = None
    """Learning rate of every player; left out, each player's own."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate over the steps: as it is, or falling to 0 at the last step along half a cosine."""
    grad_clip: float | None = None
    """Largest norm of a player's gradient; a larger one is scaled down to it."""
    flip: bool = False
    """Images: mirror each training example left to right, or not, by chance."""
    shift: int = 0
    """Images: move each training example by up to so many pixels along both axes, by chance; its edges are repeated."""
    smooth: float = 0.0
    """Tables of real numbers: train on rows with Gaussian noise of this many bandwidths by Scott's rule, n^(-1/(D + 4))
    standard deviations of each column, so that few rows are not learned by heart."""
    keep: Literal["auto", "last", "best"] = "auto"
    """Weights to end with: the last ones, or those of the lowest loss on the validation split after an epoch; auto: the
    best of a model with one player, if the data has a validation split, or is so small that a training of the usual
    length learns it by heart."""
    patience: int | None = None
    """Stop after so many epochs without a lower validation loss, and end with the weights of the lowest."""
    seed: int = 0
    """Decides the order of the examples and the noise of the training; for the command the first weights too."""
    device: str = "auto"
    """auto, cpu, cuda, mps, or one of several: cuda:1."""
    devices: int = 1
    """Number of devices that share each batch; under torchrun it is the number of its processes."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    """Number format: 16-mixed needs CUDA; mixed keeps weights and data in float32."""
    compile: Literal["off", "loss", "cuda-graphs"] = "off"
    """loss: torch.compile of it, which takes one to two minutes and then shortens steps of U-Nets alone; cuda-graphs:
    the whole step of each player as one launch, which was written without a GPU and is untried."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints; left out, one at the end of each epoch."""
    keep_checkpoints: int = 2
    """Checkpoints that the run folder holds: the last one and those before it, which stand in for a damaged one."""
    log_every: int = 50
    """Steps between two looks at the loss, each of which waits for the device; the end of an epoch is one too."""
    pictures: bool = True
    """Draw pictures into the run folder at the end, for which samples are kept on the way."""
    out: str | Path | None = None
    """Run folder to write; left out, nothing is written."""
    resume: bool = False
    """Continue the run in `out`: on the CPU to the same weights, bit for bit, as if it had never stopped."""
    overwrite: bool = False
    """Replace the run in `out`."""

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "patience", "batch_size", "devices", "checkpoint_every", "keep_checkpoints",
                     "log_every"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be at least 1, got {value}")
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SettingsError(f"{name} must be a positive number, got {value}")
        for name, kind in get_type_hints(Options).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise SettingsError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        for name in ("seed", "shift"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.smooth < math.inf:
            raise SettingsError(f"smooth must be a number of at least 0, got {self.smooth}")
        if self.compile == "cuda-graphs" and (self.devices > 1 or self.precision == "16-mixed"):
            raise SettingsError(
                "compile 'cuda-graphs' is of one device, and not of precision 16-mixed, which waits for it"
            )
        if self.resume and self.overwrite:
            raise SettingsError("resume and overwrite exclude each other")
        if self.resume and self.out is None:
            raise SettingsError("resume needs `out`, the run folder to continue")

    @property
    def keeps_best(self) -> bool:
        """Whether the validation loss decides with which weights the training ends."""
        return self.keep == "best" or self.patience is not None

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by in the update after ``step`` updates of ``total``."""
        return 1.0 if self.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / total))
