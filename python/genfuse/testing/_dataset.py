"""The contract of a data set, clause by clause."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from genfuse import plugins
from genfuse.data import Dataset, Source, load_data
from genfuse.errors import DataError, GenfuseError
from genfuse.models import create
from genfuse.testing._clauses import BrokenError, Clauses, clause
from genfuse.testing._model import shortened
from genfuse.training import Trainer

DATASET: Clauses = {}


@dataclass(frozen=True)
class DataCase:
    """A data set plugin, as a user would ask for it."""

    make: Callable[[Source], Dataset]
    argument: str | None
    root: Path | None

    @property
    def name(self) -> str:
        for plugin in plugins.discover("datasets"):
            with contextlib.suppress(GenfuseError):
                if plugin.load() is self.make:
                    return plugins.typed(plugin)
        raise BrokenError(
            f"{self.make.__module__}:{self.make.__qualname__} is not installed as an entry point of the group "
            '"genfuse.datasets"'
        )

    def load(self, seed: int = 0) -> Dataset:
        name = self.name if self.argument is None else f"{self.name}:{self.argument}"
        return load_data(name, root=self.root, seed=seed)


@clause(
    DATASET, "whole", 'it is installed under "genfuse.datasets", and returns a whole Dataset, which is read by its name'
)
def _whole(case: DataCase) -> None:
    case.load()


@clause(DATASET, "seed", "the same seed gives the same data, in every split")
def _seed(case: DataCase) -> None:
    first, again = case.load(), case.load()
    for part, split in first.splits.items():
        if not torch.equal(split.x, again.splits[part].x):
            raise BrokenError(f"the {part} split differs from one time to the other: draw with the source's seed")


@clause(DATASET, "global-generator", "loading leaves torch's global generator alone")
def _global_generator(case: DataCase) -> None:
    before = torch.random.get_rng_state()
    case.load()
    if not torch.equal(before, torch.random.get_rng_state()):
        raise BrokenError("it drew from it: use torch.Generator().manual_seed(source.seed)")


@clause(DATASET, "held-out", "what is held out is held out: most test examples are not in the training split")
def _held_out(case: DataCase) -> None:
    data = case.load()
    train, test = ({row.numpy().tobytes() for row in data.splits[part].x.cpu()} for part in ("train", "test"))
    if len(test & train) > 0.5 * len(test):
        raise BrokenError(f"{len(test & train)} of {len(test)} different test examples are training examples too")


@clause(DATASET, "argument", "an argument that it does not understand is a DataError")
def _argument(case: DataCase) -> None:
    odd = "no such thing, surely"
    try:
        load_data(f"{case.name}:{odd}", root=case.root)
    except DataError:
        return
    raise BrokenError(f"{case.name}:{odd!s} was loaded: call source.no_argument() where there is nothing to give")


@clause(DATASET, "factors", "factors, if there are any, vary among the training examples")
def _factors(case: DataCase) -> None:
    data = case.load()
    seen = data.splits["train"].factors
    if still := [name for i, name in enumerate(data.factors or ()) if len(seen[:, i].unique()) < 2]:  # type: ignore[index]
        raise BrokenError(f"{', '.join(still)} has one value in all training examples, so that no code can tell of it")


@clause(DATASET, "trains", "a model trains on it: two steps of a VAE have finite losses")
def _trains(case: DataCase) -> None:
    data = case.load()
    model = create("vae", data, decoder="gaussian" if data.levels is None else "bernoulli", hidden=(16,), latent_dim=2)
    Trainer(steps=2, batch_size=16, device="cpu").fit(model, shortened(data))
