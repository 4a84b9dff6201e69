"""The contract of plugins as a test suite for their authors.

import pytest
from genfuse.testing import model_clauses
from my_package import MyModel

@pytest.mark.parametrize("clause", model_clauses(MyModel))
def test_the_contract(clause):
    clause()
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genfuse.data import Dataset as _Dataset
from genfuse.data import Source as _Source
from genfuse.data import load_data as _load_data
from genfuse.errors import SettingsError as _SettingsError
from genfuse.models import GenerativeModel as _GenerativeModel
from genfuse.models import configure as _configure
from genfuse.testing._clauses import Clauses as _Clauses
from genfuse.testing._clauses import seen as _seen
from genfuse.testing._clauses import told as _told
from genfuse.testing._dataset import DATASET as _DATASET
from genfuse.testing._dataset import DataCase as _DataCase
from genfuse.testing._model import MODEL as _MODEL
from genfuse.testing._model import PLUGIN as _PLUGIN
from genfuse.testing._model import ModelCase as _ModelCase
from genfuse.testing._model import shortened as _shortened
from genfuse.training.run import plugin_of as _plugin_of

__all__ = ["ContractError", "check_dataset", "check_model", "dataset_clauses", "model_clauses"]

_DATA = ("digits", "toy:moons")  # images of 17 levels, and real-valued points: what a model is tried on
_REFUSES = "what a model cannot take, a shape, data or settings, it refuses with a SettingsError when it is made"


class ContractError(AssertionError):
    """A plugin breaks clauses of the contract. The message names each, and what was seen."""


def check_model(
    cls: type[_GenerativeModel], *data: _Dataset, exceptions: Mapping[str, str] | None = None, **settings: Any
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
    left_out = _names(exceptions, _PLUGIN, _MODEL)
    if broken := _broken(_PLUGIN, cls, left_out):
        raise ContractError(_told(cls, "", broken, len(_PLUGIN)))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        told = [
            _told(cls, f" on {case.data.name}", broken, len(_MODEL))
            for case in _cases(cls, data, settings)
            if (broken := _broken(_MODEL, case, left_out))
        ]
    if told:
        raise ContractError("\n".join(told))
    return [text for name, (text, _) in {**_PLUGIN, **_MODEL}.items() if name not in left_out]


def check_dataset(
    make: Callable[[_Source], _Dataset], argument: str | None = None, *, root: str | Path | None = None
) -> list[str]:
    """Hold a data set plugin against its contract; returns what the clauses say that were checked.

    ``argument`` is what a user would type after the ':', ``root`` what --data-root would be. The function has to be
    installed as a plugin. Raises ContractError, which names every clause that is broken and what was seen.

    >>> check_dataset(my_package.cats)
    """
    with torch.random.fork_rng(devices=[]):
        broken = _broken(_DATASET, _DataCase(make, argument, None if root is None else Path(root)), set())
    if broken:
        raise ContractError(_told(make, "", broken, len(_DATASET)))
    return [text for text, _ in _DATASET.values()]


def model_clauses(
    cls: type[_GenerativeModel], *data: _Dataset, exceptions: Mapping[str, str] | None = None, **settings: Any
) -> list[Any]:
    """The clauses of `check_model` as parameters of a pytest test, each a function without arguments.

    A clause that ``exceptions`` names, {name: reason}, is expected to fail (strictly: one that is kept is a failure).
    """
    _names(exceptions, _PLUGIN, _MODEL)
    cases: list[tuple[str, _Clauses, Any]] = [("", _PLUGIN, cls)]
    cases += [(f"{case.data.name}-", _MODEL, case) for case in _cases(cls, data, settings)]
    return _parameters(cls, cases, exceptions or {})


def dataset_clauses(
    make: Callable[[_Source], _Dataset],
    argument: str | None = None,
    *,
    root: str | Path | None = None,
    exceptions: Mapping[str, str] | None = None,
) -> list[Any]:
    """The clauses of `check_dataset` as parameters of a pytest test, as `model_clauses` are."""
    _names(exceptions, _DATASET)
    case = _DataCase(make, argument, None if root is None else Path(root))
    return _parameters(make, [("", _DATASET, case)], exceptions or {})


def _cases(cls: type[_GenerativeModel], data: tuple[_Dataset, ...], settings: dict[str, Any]) -> Iterator[_ModelCase]:
    """What a model class is tried on. Raises ContractError if it refuses otherwise than it should."""
    refused, found = [], 0
    for each in data or map(_load_data, _DATA):
        few = _shortened(each)
        try:
            config = _configure(cls, settings, few)
            cls.from_config(config).check_data(few)
        except _SettingsError as error:
            refused.append(f"{each.name}: {error}")
            continue
        except Exception as error:
            seen = {_REFUSES: f"{type(error).__name__}: {error}"}
            raise ContractError(_told(cls, f" on {each.name}", seen, len(_MODEL))) from error
        found += 1
        yield _ModelCase(cls, _plugin_of(cls), config, few)
    if not found or (data and refused):
        raise _SettingsError(f"{cls.__name__} takes no data that it could be tried on: {'; '.join(refused)}")


def _broken(clauses: _Clauses, case: Any, left_out: set[str]) -> dict[str, str]:
    """What was seen, by the texts of the clauses that are broken."""
    found = {text: _seen(check, case) for name, (text, check) in clauses.items() if name not in left_out}
    return {text: seen for text, seen in found.items() if seen is not None}


def _names(exceptions: Mapping[str, str] | None, *clauses: _Clauses) -> set[str]:
    known = [name for each in clauses for name in each]
    for name in exceptions or {}:
        if name not in known:
            raise _SettingsError(f"there is no clause {name!r}; clauses: {', '.join(known)}")
    return set(exceptions or {})


def _parameters(what: Any, cases: list[tuple[str, _Clauses, Any]], exceptions: Mapping[str, str]) -> list[Any]:
    import pytest

    def hold(where: str, text: str, check: Callable[[Any], None], case: Any) -> None:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            if (seen := _seen(check, case)) is not None:
                raise ContractError(_told(what, where, {text: seen}, 1))

    def marks(name: str) -> tuple[Any, ...]:
        known = name in exceptions
        return (pytest.mark.xfail(reason=exceptions[name], raises=ContractError, strict=True),) if known else ()

    return [
        pytest.param(
            partial(hold, f" on {where[:-1]}" if where else "", text, check, case), id=where + name, marks=marks(name)
        )
        for where, clauses, case in cases
        for name, (text, check) in clauses.items()
    ]
