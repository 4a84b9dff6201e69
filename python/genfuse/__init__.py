"""The classic generative models for PyTorch as one system, on fused kernels.

``genfuse.ops`` alone needs nothing but torch. The names below are imported when they are first used, so that
``import genfuse`` costs no more than it has to.
"""

import importlib
from typing import TYPE_CHECKING, Any

from genfuse._version import __version__ as __version__

if TYPE_CHECKING:
    from genfuse.comparison import compare as compare
    from genfuse.data import load_data as load_data
    from genfuse.models import create as create
    from genfuse.training import Run as Run
    from genfuse.training import Trainer as Trainer

__all__ = ["Run", "Trainer", "compare", "create", "load_data"]

_HOME = {
    "compare": "comparison",
    "create": "models",
    "load_data": "data",
    "Run": "training",
    "Trainer": "training",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"genfuse.{_HOME[name]}"), name)
    raise AttributeError(f"module 'genfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "importlib"})
