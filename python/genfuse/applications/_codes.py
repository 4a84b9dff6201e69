"""Codes of examples, and what is made of codes again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genfuse.applications._examples import Examples
from genfuse.errors import SettingsError
from genfuse.models import Decodes, Encodes, Reconstructs
from genfuse.nn import slerp


def encode(found: Examples) -> Tensor:
    """The code z (N, D) of each example. Raises SettingsError for a model without ``encode``."""
    return found.of_all(_verb(found.model, "encode", Encodes), found.batch.x).flatten(1)


def reconstruct(found: Examples) -> Tensor:
    """Of each example what its code keeps of it, (N, *shape), as the model sees it; ``found.restored`` leads back.

    Raises SettingsError for a model without ``reconstruct``, or ``encode`` and ``decode``.
    """
    model: Any = found.model
    if not hasattr(model, "reconstruct") and isinstance(model, Encodes) and isinstance(model, Decodes):
        return found.of_all(lambda x, **given: model.decode(model.encode(x, **given), **given), found.batch.x)
    return found.of_all(_verb(model, "reconstruct", Reconstructs), found.batch.x)


def interpolate(found: Examples, steps: int = 10, pairs: int = 8) -> Tensor:
    """From one example to the next, (pairs, steps, *shape): of the first and second, third and fourth, and so on.

    By the model's own ``interpolate`` between examples, or decoded from the arcs between their codes. Raises
    SettingsError for fewer than two steps or examples, and a model without ``encode`` and ``decode``.
    """
    x, y = found.batch
    count = min(pairs, len(x) // 2)
    if steps < 2 or count < 1:
        raise SettingsError(f"between two examples, in two steps or more: got {len(x)} examples and {steps} steps")
    model: Any = found.model
    given = {} if y is None else {"y": y[: 2 * count : 2]}
    with torch.no_grad():
        a, b = x[: 2 * count : 2], x[1 : 2 * count : 2]
        if hasattr(model, "interpolate"):
            between = model.interpolate(a, b, steps, **given)
        else:
            start, end = (_verb(model, "encode", Encodes)(each, **given) for each in (a, b))
            decode = _verb(model, "decode", Decodes)
            shares = torch.linspace(0, 1, steps, device=a.device)
            between = torch.stack([decode(each, **given) for each in slerp(start, end, shares)])
    return between.transpose(0, 1).cpu()


def _verb(model: Any, name: str, protocol: Any) -> Callable[..., Any]:
    """A verb of the model. Raises SettingsError if it has none."""
    if not isinstance(model, protocol):
        verbs = [
            each for each in ("log_prob", "elbo", "encode", "decode", "reconstruct", "latents") if hasattr(model, each)
        ]
        raise SettingsError(f"a {type(model).__name__} has no {name}; it has: {', '.join(['sample', *verbs])}")
    verb: Callable[..., Any] = getattr(model, name)
    return verb
