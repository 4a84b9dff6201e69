"""The contract of plugins as a test suite for their authors.

import pytest
from genfuse.testing import model_clauses
from my_package import MyModel

@pytest.mark.parametrize("clause", model_clauses(MyModel))
def test_the_contract(clause):
    clause()
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genfuse.data import Dataset, Source, load_data
from genfuse.errors import SettingsError
from genfuse.models import GenerativeModel, configure
from genfuse.testing import _clauses
from genfuse.testing._clauses import DATASET, MODEL, PLUGIN, Clauses, DataCase, ModelCase
from genfuse.training.run import plugin_of

__all__ = ["ContractError", "check_dataset", "check_model", "dataset_clauses", "model_clauses"]

_DATA = ("digits", "toy:moons")  # images of 17 levels, and real-valued points: what a model is tried on
_REFUSES = "what a model cannot take, a shape, data or settings, it refuses with a SettingsError when it is made"


_Trial = tuple[str, Clauses, Any]  # the name of the data, what is asked for, and of what


class ContractError(AssertionError):
    """A plugin breaks clauses of the contract. The message names each, and what was seen."""


def check_model(
    cls: type[GenerativeModel], *data: Dataset, exceptions: Mapping[str, str] | None = None, **settings: Any
) -> list[str]:
    """Hold a model class against the contract of `GenerativeModel`; returns what the clauses say that were checked.

    It is tried with ``settings`` on each of ``data``, by default on those of digits and toy:moons whose examples it
    takes. The class has to be installed as a plugin. It is trained for a few steps only, on the CPU, which takes
    seconds; torch's global generator is left as it was. ``exceptions`` names clauses that the model is known not to
    keep, and why: {name: reason}. `model_clauses` is the same as one test a clause.

    Raises ContractError, which names every clause that is broken and what was seen, and SettingsError if the model
    takes none of the data, or ``exceptions`` names no clause.

    >>> check_model(MyModel, latent_dim=4)
    """
    return _check(cls, _tried(cls, data, settings), exceptions, PLUGIN, MODEL)


def check_dataset(
    make: Callable[[Source], Dataset], argument: str | None = None, *, root: str | Path | None = None
) -> list[str]:
    """Hold a data set plugin against its contract; returns what the clauses say that were checked.

    ``argument`` is what a user would type after the ':', ``root`` what --data-root would be. The function has to be
    installed as a plugin. Raises ContractError, which names every clause that is broken and what was seen.

    >>> check_dataset(my_package.cats)
    """
    return _check(make, [("", DATASET, DataCase(make, argument, root))], None, DATASET)


def model_clauses(
    cls: type[GenerativeModel], *data: Dataset, exceptions: Mapping[str, str] | None = None, **settings: Any
) -> list[Any]:
    """The clauses of `check_model` as parameters of a pytest test, each a function without arguments.

    A clause that ``exceptions`` names, {name: reason}, is expected to fail (strictly: one that is kept is a failure).
    """
    _names(exceptions, PLUGIN, MODEL)
    return _parameters(cls, _tried(cls, data, settings), exceptions or {})


def dataset_clauses(
    make: Callable[[Source], Dataset],
    argument: str | None = None,
    *,
    root: str | Path | None = None,
    exceptions: Mapping[str, str] | None = None,
) -> list[Any]:
    """The clauses of `check_dataset` as parameters of a pytest test, as `model_clauses` are."""
    _names(exceptions, DATASET)
    return _parameters(make, [("", DATASET, DataCase(make, argument, root))], exceptions or {})


def _tried(cls: type[GenerativeModel], data: tuple[Dataset, ...], settings: dict[str, Any]) -> Iterator[_Trial]:
    """What a model class is tried on. Raises ContractError if it refuses otherwise than it should."""
    yield "", PLUGIN, cls
    refused, found = [], 0
    for each in data or map(load_data, _DATA):
        few = _clauses.shortened(each)
        try:
            config = configure(cls, settings, few)
            cls.from_config(config).check_data(few)
        except SettingsError as error:
            refused.append(f"{each.name}: {error}")
            continue
        except Exception as error:
            seen = {_REFUSES: f"{type(error).__name__}: {error}"}
            raise ContractError(_clauses.told(cls, each.name, seen, len(MODEL))) from error
        found += 1
        yield each.name, MODEL, ModelCase(cls, plugin_of(cls), config, few)
    if not found or (data and refused):
        raise SettingsError(f"{cls.__name__} takes no data that it could be tried on: {'; '.join(refused)}")


def _check(what: Any, trials: Iterable[_Trial], exceptions: Mapping[str, str] | None, *clauses: Clauses) -> list[str]:
    """What the clauses say that were checked. Raises ContractError if one is broken; those of a class come first."""
    left_out, told = _names(exceptions, *clauses), []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for where, tried, case in trials:
            seen = {text: _clauses.seen(check, case) for name, (text, check) in tried.items() if name not in left_out}
            if broken := {text: found for text, found in seen.items() if found is not None}:
                told.append(_clauses.told(what, where, broken, len(tried)))
                if tried is PLUGIN:
                    break
    if told:
        raise ContractError("\n".join(told))
    return [text for each in clauses for name, (text, _) in each.items() if name not in left_out]


def _names(exceptions: Mapping[str, str] | None, *clauses: Clauses) -> set[str]:
    known = [name for each in clauses for name in each]
    for name in exceptions or {}:
        if name not in known:
            raise SettingsError(f"there is no clause {name!r}; clauses: {', '.join(known)}")
    return set(exceptions or {})


def _parameters(what: Any, trials: Iterable[_Trial], exceptions: Mapping[str, str]) -> list[Any]:
    import pytest

    def hold(where: str, text: str, check: Callable[[Any], None], case: Any) -> None:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            if (seen := _clauses.seen(check, case)) is not None:
                raise ContractError(_clauses.told(what, where, {text: seen}, 1))

    def marks(name: str) -> tuple[Any, ...]:
        known = name in exceptions
        return (pytest.mark.xfail(reason=exceptions[name], raises=ContractError, strict=True),) if known else ()

    return [
        pytest.param(partial(hold, where, text, check, case), id=f"{where}-{name}".lstrip("-"), marks=marks(name))
        for where, clauses, case in trials
        for name, (text, check) in clauses.items()
    ]
