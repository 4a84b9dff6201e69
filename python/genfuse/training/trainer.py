"""`Trainer`: the options of a training, and what is checked before it starts."""

import atexit
import dataclasses
import math
import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from genfuse import pictures
from genfuse._files import locked
from genfuse.errors import RunError, RunWarning, SettingsError
from genfuse.models import GenerativeModel
from genfuse.training import run
from genfuse.training.loop import Loop, forked_rng

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from genfuse.data import Dataset


@dataclass(frozen=True)
class Trainer:
    """How a model is trained. `fit` does it.

    Raises SettingsError for an option out of its range.
    """

    epochs: int = 20
    """Passes over the training split."""
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
    keep: Literal["last", "best"] = "last"
    """Weights to end with: the last ones, or those of the lowest loss on the validation split after an epoch."""
    seed: int = 0
    """Decides the order of the examples and the noise of the training; for the command the first weights too."""
    device: str = "auto"
    """auto, cpu, cuda, mps, or one of several: cuda:1."""
    devices: int = 1
    """Number of devices that share each batch; under torchrun it is the number of its processes."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    """Number format: 16-mixed needs CUDA; mixed keeps weights and data in float32."""
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
        for name in ("epochs", "steps", "batch_size", "devices", "checkpoint_every", "keep_checkpoints", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} must be at least 1, got {value}")
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SettingsError(f"{name} must be a positive number, got {value}")
        for name, choices in (
            ("schedule", ("constant", "cosine")),
            ("keep", ("last", "best")),
            ("precision", ("32-true", "bf16-mixed", "16-mixed", "64-true")),
        ):
            if getattr(self, name) not in choices:
                raise SettingsError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.seed < 0:
            raise SettingsError(f"seed must be at least 0, got {self.seed}")
        if self.resume and self.overwrite:
            raise SettingsError("resume and overwrite exclude each other")
        if self.resume and self.out is None:
            raise SettingsError("resume needs `out`, the run folder to continue")

    def fit(self, model: GenerativeModel, data: "Dataset") -> run.Run | None:
        """Train ``model`` on the training split of ``data``; returns the run folder where ``out`` is given, else None.

        The model is trained in place, and left on its device in evaluation mode with the weights that ``keep`` names.
        torch's global generators are as before when it returns. The first interrupt (Ctrl-C, SIGTERM, or SIGHUP)
        finishes the step and saves a checkpoint before it takes effect; a second one takes effect at once.

        Raises SettingsError, DataError or RunError before anything is written: also where another process is writing
        to the folder; NonFiniteLossError, with the step, the term and the last checkpoint, at a loss that is NaN or
        infinite; and RunError, with the last checkpoint, where the folder cannot be written to, as on a full disk.
        """
        model.check_data(data)
        players = list(model.players())
        if not players or len({player.name for player in players}) < len(players):
            raise SettingsError(f"{type(model).__name__} needs players of different names, got {players}")
        if self.keep == "best" and len(players) > 1:
            names = ", ".join(player.name for player in players)
            raise SettingsError(
                f"keep='best' needs a model with one player, whose loss says which weights are best; "
                f"{type(model).__name__} has {len(players)} ({names}): use keep='last'"
            )
        if self.keep == "best" and "validation" not in data.splits:
            raise SettingsError(
                f"keep='best' needs a validation split, and the data set {data.name!r} has none, only "
                f"{', '.join(data.splits)}: use keep='last', or data that has one, as a folder of train.csv, "
                "validation.csv and test.csv"
            )
        fabric = self._fabric(len(players))
        out = None if self.out is None else Path(self.out)
        config = None
        if out is not None:
            config = run.describe(model, data, self._options())
            run.claim(out, self.resume, self.overwrite)
            if self.resume:
                run.check_same(out, config)
        fabric.launch()
        if fabric.world_size > 1:
            atexit.register(_leave_group)
        if self.batch_size % fabric.world_size:
            raise SettingsError(
                f"batch_size {self.batch_size} cannot be shared equally by {fabric.world_size} processes"
            )
        with ExitStack() as stack:
            if out is not None and fabric.is_global_zero:
                stack.enter_context(locked(out))
                run.claim(out, self.resume, self.overwrite)  # again: from here on nobody else writes
                if self.resume and config is not None:
                    run.check_same(out, config)
            stack.enter_context(forked_rng(fabric.device))
            Loop(self, fabric, model, players, data).run(out, config)
            if out is None:
                return None
            fabric.barrier()
            finished = run.Run(out)
            if self.pictures and fabric.is_global_zero:
                self._draw(finished, data.to(fabric.device), fabric.device)
        return finished

    @staticmethod
    def _draw(finished: run.Run, data: "Dataset", device: torch.device) -> None:
        try:
            progress = finished.progress()
        except RunError as error:  # which is no reason to go without the other pictures
            warnings.warn(f"progress.png is not drawn: {error}", RunWarning, stacklevel=2)
            progress = {}
        pictures.draw(finished.path / run.PICTURES, finished.model(device), data, finished.metrics(), progress)

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by in the update after ``step`` updates of ``total``."""
        return 1.0 if self.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / total))

    def _options(self) -> dict[str, Any]:
        options = dataclasses.asdict(self)
        return {key: value for key, value in options.items() if key not in ("out", "resume", "overwrite")}

    def _fabric(self, players: int) -> "Fabric":
        """Device, precision and processes. Raises SettingsError for what this machine does not have."""
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy

        accelerator, _, index = self.device.partition(":")
        available: dict[str, Callable[[], bool]] = {
            "auto": lambda: True,
            "cpu": lambda: True,
            "cuda": torch.cuda.is_available,
            "mps": torch.backends.mps.is_available,
        }
        if accelerator not in available or (index and not index.isdigit()):
            raise SettingsError(f"device must be auto, cpu, cuda, cuda:N or mps, got {self.device!r}")
        if not available[accelerator]():
            raise SettingsError(f"device {self.device!r}: this machine or this PyTorch has none; use auto or cpu")
        if accelerator == "cuda" and index and int(index) >= torch.cuda.device_count():
            raise SettingsError(f"device {self.device!r}: there are {torch.cuda.device_count()} CUDA devices")
        if self.precision == "16-mixed" and not (accelerator in ("auto", "cuda") and torch.cuda.is_available()):
            raise SettingsError("precision 16-mixed needs CUDA; on other devices use bf16-mixed or 32-true")
        if self.precision == "64-true" and accelerator == "mps":
            raise SettingsError("precision 64-true: mps devices have no float64")

        local, nodes = self.devices, 1
        if "TORCHELASTIC_RUN_ID" in os.environ:
            local = int(os.environ["LOCAL_WORLD_SIZE"])
            nodes = int(os.environ["WORLD_SIZE"]) // local
        several = local * nodes > 1
        return Fabric(
            accelerator=accelerator,
            devices=[int(index)] if index and accelerator == "cuda" and not several else local,
            num_nodes=nodes,
            # Only one player's parameters take part in a step.
            strategy=DDPStrategy(find_unused_parameters=players > 1) if several else "auto",
            precision=self.precision,
        )


def _leave_group() -> None:
    """Join the threads of torch.distributed before the process ends, which aborts where they are still running."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
