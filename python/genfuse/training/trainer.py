"""`Trainer`: what is checked before a training starts, and whether a run may go on."""

import atexit
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genfuse._files import locked, warn
from genfuse.data import Dataset, load_data
from genfuse.errors import DataWarning, RunError, RunWarning, SettingsError, TrainingWarning
from genfuse.models import GenerativeModel
from genfuse.training import gallery, run
from genfuse.training.loop import Callback, Loop
from genfuse.training.options import Options
from genfuse.training.process import fitting_threads, forked_rng

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Passes over the training split beyond which a training of the usual length keeps the best weights, and examples from
# which on a tenth of them says which these are.
MANY, FEW = 30, 50


@dataclass(frozen=True)
class Trainer(Options):
    """How a model is trained. `fit` does it.

    Raises SettingsError for an option out of its range.
    """

    @classmethod
    def resuming(cls, finished: run.Run, **changes: Any) -> "Trainer":
        """The trainer that continues a run, with some options changed: ``Trainer.resuming(run, epochs=40)``."""
        return cls(**{**finished.config["training"], "out": finished.path, "resume": True, **changes})

    def fit(self, model: GenerativeModel, data: Any, callbacks: Sequence[Callback] = ()) -> run.History:
        """Train ``model`` on the training split of ``data``; returns its losses, as the run where ``out`` is given.

        A progress bar is shown on a terminal and in notebooks, where what is returned shows itself.

        ``data`` is a Dataset, or what `load_data` makes one of: a name, a DataFrame, an array, a torch Dataset. If the
        best weights are kept and it has no validation split, `Dataset.with_validation` makes one, as a warning says.

        Each of ``callbacks`` is called, in the first process, with each line of metrics.jsonl when it is made: a dict
        with ``step``, ``epoch``, ``split`` and, by split, ``player``, ``loss``, its terms and others. If it returns
        True the training saves a checkpoint and ends; what it raises ends `fit`.

        The model is trained in place, and left on its device in evaluation mode with the weights that ``keep`` names.
        torch's global generators are as before when it returns. The first interrupt (Ctrl-C, SIGTERM, or SIGHUP)
        finishes the step and saves a checkpoint before it takes effect; a second one takes effect at once.

        Raises SettingsError, DataError or RunError before anything is written: also where another process is writing
        to the folder; NonFiniteLossError, with the step, the term and the last checkpoint, at a loss that is NaN or
        infinite; and RunError, with the last checkpoint, if the folder cannot be written to, as on a full disk.
        """
        data = load_data(data)
        model.check_data(data)
        players = list(model.players())
        if not players or len({player.name for player in players}) < len(players):
            raise SettingsError(f"{type(model).__name__} needs players of different names, got {players}")
        out = None if self.out is None else Path(self.out)
        was = run.read_config(out) if out is not None and self.resume and (out / run.CONFIG).is_file() else {}
        if self.keep == "auto":
            usual = self.epochs is None and self.steps is None and data.examples >= FEW and not data.streamed
            by_heart = usual and model.usual_steps * self.batch_size > MANY * data.examples
            held_out = "validation" in data.splits or by_heart
            keep: Any = "best" if len(players) == 1 and held_out else "last"
            if was:
                keep = was["training"].get("keep", "last")
            return replace(self, keep=keep).fit(model, data, callbacks)
        for doubt in model.doubts(data):
            warn(doubt, TrainingWarning)
        if self.keeps_best and len(players) > 1:
            names = ", ".join(player.name for player in players)
            option = "keep='best'" if self.patience is None else "patience"
            raise SettingsError(
                f"{option} needs a model with one player, whose loss says which weights are best; "
                f"{type(model).__name__} has {len(players)} ({names}): use keep='last'"
                + ("" if self.patience is None else " and leave patience out")
            )
        if self.keeps_best and "validation" not in data.splits:
            data = data.with_validation()
            warn(
                f"the data set {data.name!r} has no validation split: {len(data.splits['validation']):,} of its "
                f"training examples, by chance, are one now, by which the best weights are chosen, and "
                f"{len(data.splits['train']):,} are trained on; --data.validation says how many (in Python "
                "load_data(..., validation=0.1)), and --keep last trains on all",
                DataWarning,
            )
        if (self.flip or self.shift) and data.given and not data.task:
            raise SettingsError(
                "flip and shift would move images, but not those that are given with them: leave them out"
            )
        if (self.flip or self.shift) and not ((data.is_image or data.is_clip) and self.shift < min(data.shape[-2:])):
            raise SettingsError(
                "flip and shift are of images and clips, by less than a side; "
                f"the shape of {data.name!r} is {data.shape}"
            )
        if self.smooth and (len(data.shape) != 1 or data.levels or data.schema):
            raise SettingsError(f"smooth is of tables of real numbers; {data.name!r} is none: leave it out")
        with ExitStack() as stack:
            stack.enter_context(fitting_threads(model, self.batch_size, was.get("threads")))
            fabric = self._fabric(len(players))
            if self.compile == "cuda-graphs" and fabric.device.type != "cuda":
                raise SettingsError(f"compile 'cuda-graphs' needs a CUDA device; the training is on {fabric.device}")
            config = None
            if out is not None:
                options = {key: value for key, value in asdict(self).items() if key not in run.WHERE}
                config = run.describe(model, data, options)
                run.claim(out, self.resume, self.overwrite, config)
            fabric.launch()
            if fabric.world_size > 1:  # whose threads abort the process if they are still running when it ends
                group = torch.distributed
                atexit.register(lambda: group.is_initialized() and group.destroy_process_group())
            if self.batch_size % fabric.world_size:
                raise SettingsError(
                    f"batch_size {self.batch_size} cannot be shared equally by {fabric.world_size} processes"
                )
            if out is not None and config is not None and fabric.is_global_zero:
                stack.enter_context(locked(out))
                run.claim(out, self.resume, self.overwrite, config)  # again: from here on nobody else writes
            stack.enter_context(forked_rng(fabric.device))
            loop = Loop(self, fabric, model, players, data, callbacks)
            loop.run(out, config)
            if out is None:
                return run.History(loop.logged)
            fabric.barrier()
            finished = run.Run(out)
            if self.pictures and fabric.is_global_zero:
                self._draw(finished, data.to(fabric.device), fabric.device)
        return finished

    @staticmethod
    def _draw(finished: run.Run, data: Dataset, device: torch.device) -> None:
        try:
            progress = finished.progress()
        except RunError as error:  # which is no reason to go without the other pictures
            warn(f"progress.png is not drawn: {error}", RunWarning)
            progress = {}
        drawn = gallery.draw(finished.path / run.PICTURES, finished.model(device), data, finished.metrics(), progress)
        from PIL import Image
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(finished.path / run.TENSORBOARD)) as board:
            for picture in drawn:
                with Image.open(picture) as opened:
                    pixels = np.asarray(opened.convert("RGB"))
                board.add_image(f"pictures/{picture.stem}", pixels, finished.step, dataformats="HWC")

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
