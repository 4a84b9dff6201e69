"""Checkpoints: all that a training needs to go on from a step, in memory and on disk."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genfuse._files import demand, keep_as, read_tensors, warn, write_tensors
from genfuse.errors import RunError, RunWarning

WEIGHTS, STATE = "model.safetensors", "state.safetensors"
BEFORE = re.compile(r"state-([1-9][0-9]*)\.safetensors")  # the checkpoints before the last one
FORMAT_OF_STATE = {"step": int, "processes": int, "scalars": dict[str, Any], "scaler": dict[str, Any]}


@dataclass(frozen=True)
class Checkpoint:
    """What a training needs to go on from a step: the weights, other tensors (optimizers, generators), plain facts.

    ``best`` holds the weights that the run is to be left with, if these are not the last; else nothing.
    """

    weights: dict[str, Tensor]
    others: dict[str, Tensor]
    facts: dict[str, Any]
    best: dict[str, Tensor] = field(default_factory=dict)

    def write(self, path: Path, keep: int | None = None) -> None:
        """Write it into a folder. Of those that are there, ``keep`` - 1 stay as the ones before; None: all that are."""
        if keep is not None:
            self._move_on(path, keep)
        # Copies, since safetensors refuses tensors that share memory, as tied weights do.
        weights, others, best = (
            {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
            for tensors in (self.weights, self.others, self.best)
        )
        prefixed = {f"{kind}.{key}": t for kind, of in (("model", weights), ("best", best)) for key, t in of.items()}
        write_tensors(path / STATE, {**prefixed, **others}, self.facts)
        facts = {"step": (self.facts["best"] if best else self.facts)["step"]}
        facts |= {key: self.facts[key] for key in ("config",) if key in self.facts}
        write_tensors(path / WEIGHTS, best or weights, facts)

    @staticmethod
    def _move_on(path: Path, keep: int) -> None:
        """Make the last checkpoint the one before, that one the one before it, and so on. A kill loses none."""
        for older in reversed(before(path)):
            number = int(BEFORE.fullmatch(older.name)[1]) + 1  # type: ignore[index]
            if number >= keep:
                older.unlink()
            else:
                os.replace(older, path / f"state-{number}.safetensors")
        if keep > 1 and (path / STATE).is_file():
            keep_as(path / STATE, "state-1.safetensors")

    @classmethod
    def read(cls, path: Path, name: str = STATE) -> "Checkpoint":
        """That of a run folder. Raises RunError, which names file and key, if it is damaged."""
        tensors, facts = read_tensors(path / name)
        demand(facts, FORMAT_OF_STATE, path / name)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "": {}}
        for where, tensor in tensors.items():
            kind, _, key = where.partition(".")
            part, key = (kind, key) if kind in parts else ("", where)
            parts[part][key] = tensor
        if parts["best"]:
            demand(facts, {"best.step": int, "best.loss": float}, path / name)
        return cls(parts["model"], parts[""], facts, parts["best"])

    @classmethod
    def newest(cls, path: Path) -> "Checkpoint":
        """The last one of a run folder, or if that is damaged the one before. A RunWarning says what was lost."""
        try:
            return cls.read(path)
        except RunError as error:
            damage = error
        for older in before(path):
            try:
                found = cls.read(path, older.name)
            except RunError:
                continue
            warn(
                f"{damage}; going on from {older.name}, the checkpoint before, of step {found.facts['step']}: what was "
                "trained after that is lost, and is trained again",
                RunWarning,
            )
            return found
        raise damage


def before(path: Path) -> list[Path]:
    """The checkpoints before the last one, the youngest first."""
    found = {int(match[1]): each for each in path.iterdir() if (match := BEFORE.fullmatch(each.name))}
    return [found[number] for number in sorted(found)]


def optimizer_tensors(
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of the players' optimizers as tensors, and as plain numbers, by optimizer.PLAYER.INDEX.KEY."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                (tensors if isinstance(value, Tensor) else scalars)[f"optimizer.{name}.{index}.{key}"] = value
    return tensors, scalars


def load_optimizers(
    optimizers: Mapping[str, torch.optim.Optimizer], trained: Mapping[str, list[nn.Parameter]], checkpoint: Checkpoint
) -> None:
    """Put what `optimizer_tensors` took back. Raises RunError for a state that does not fit the ``trained`` weights."""
    states: dict[str, dict[int, dict[str, Any]]] = {name: defaultdict(dict) for name in optimizers}
    for where, value in {**checkpoint.others, **checkpoint.facts["scalars"]}.items():
        kind, _, rest = where.partition(".")
        if kind == "optimizer":
            name, index, key = rest.rsplit(".", 2)
            states[name][int(index)][key] = value
    for name, optimizer in optimizers.items():
        _check_state(name, trained[name], states[name])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states[name]})


def _check_state(player: str, weights: list[nn.Parameter], states: dict[int, dict[str, Any]]) -> None:
    """Raise RunError for an optimizer's state that its kernels would read past the end of, or miss a part of."""
    keys = set().union(*(state.keys() for state in states.values()))
    for index, state in states.items():
        if not 0 <= index < len(weights):
            raise RunError(f"{STATE}: optimizer.{player}.{index}: the player has {len(weights)} weights")
        if missing := sorted(keys - state.keys()):
            raise RunError(f"{STATE}: it has no optimizer.{player}.{index}.{missing[0]}")
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != weights[index].shape:
                raise RunError(
                    f"{STATE}: optimizer.{player}.{index}.{key} has shape {tuple(value.shape)}, its weight "
                    f"{tuple(weights[index].shape)}"
                )
