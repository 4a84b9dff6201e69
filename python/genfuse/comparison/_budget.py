"""How long each model trains, and the training itself."""

import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from genfuse.comparison._columns import peak_memory, training_seconds
from genfuse.comparison._store import Entry
from genfuse.data import Dataset
from genfuse.errors import SettingsError
from genfuse.models import create
from genfuse.training import Run, Trainer

UNITS = {"s": 1, "m": 60, "h": 3600}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Budget:
    """How long each model trains: so many seconds of updates, or so many examples, counted as often as seen."""

    seconds: float | None = None
    examples: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read "90s", "5m", "1h" or "200000examples". Raises SettingsError for anything else, and for nothing."""
        found = re.fullmatch(r"\s*([\d_.]+)\s*(s|m|h|examples)\s*", text)
        try:
            amount, unit = float(found.group(1)), found.group(2)  # type: ignore[union-attr]
        except (AttributeError, ValueError):
            amount, unit = 0.0, ""
        if not 0 < amount < math.inf or (unit == "examples" and amount != int(amount)):
            raise SettingsError(
                f"a budget is a time above 0, as 90s, 5m or 1h, or a number of examples, as 200000examples; "
                f"got {text!r}"
            )
        return cls(examples=int(amount)) if unit == "examples" else cls(seconds=amount * UNITS[unit])


def steps_of(budget: Budget, entry: Entry, data: Dataset, trainer: Trainer, say: Say) -> int:
    """Updates that the budget buys. Of a time: at the speed of the last part of a trial, past all warming up.

    There is a trial of an update where examples are counted, too: what is loaded in it is no part of a run's memory.
    """
    test = data.splits["test"]
    few = replace(test, x=test.x[:100], y=None if test.y is None else test.y[:100])
    data = replace(data, splits={**data.splits, "test": few})  # its loss is of no interest here
    say(f"{entry.label}: a trial")
    with tempfile.TemporaryDirectory() as folder:
        done, steps = 0, 16 if budget.seconds else 1
        model = create(entry.model, data, **entry.settings)
        trainer = replace(
            trainer, steps=steps, schedule="constant", keep="last", checkpoint_every=10**9, out=Path(folder) / "trial"
        )
        while True:
            run = trainer.fit(model, data)
            assert isinstance(run, Run)
            if budget.examples:
                return math.ceil(budget.examples / trainer.batch_size)
            assert budget.seconds
            seconds = training_seconds(run, data, since=done)
            if seconds >= min(budget.seconds / 20, 10):
                return max(1, round(budget.seconds * (steps - done) / seconds))
            done, steps = steps, 2 * steps
            trainer = Trainer.resuming(run, steps=steps)


def trained(trainer: Trainer, entry: Entry, data: Dataset, run: dict[str, Any], say: Say) -> Run:
    """The run of ``trainer``, from its last checkpoint on if it has one; finished ones are left as they are."""
    path = Path(trainer.out or "")
    if (path / "config.json").is_file():
        there = Run(path)
        if there.step == trainer.steps:
            return there
        trainer = Trainer.resuming(there, device=trainer.device)
    say(f"{entry.label}, seed {trainer.seed}: {'resuming' if trainer.resume else 'training'}, {trainer.steps:,} steps")
    with peak_memory(trainer.device) as peak:
        torch.manual_seed(trainer.seed)
        trained = trainer.fit(create(entry.model, data, **entry.settings), data)
        run["peak_memory"] = peak()
    assert isinstance(trained, Run)
    return trained
