"""Models and data sets are entry points: ours and those of any installed package alike.

Discovery reads the metadata of installed distributions and imports nothing. A plugin is imported when it is used, so a
broken one fails its own user and nobody else.
"""

import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from genfuse.errors import PluginError

API = 1  # what `genfuse_api` on a model class is held against
KINDS = {"models": "model", "datasets": "data set"}  # groups are genfuse.models and genfuse.datasets
OURS = "genfuse"


@dataclass(frozen=True, order=True)
class Plugin:
    """One entry point: what a user types, and where it leads."""

    kind: str  # "models" or "datasets"
    name: str  # what the user types
    distribution: str
    version: str
    target: str  # "module:attribute"

    def __str__(self) -> str:
        return f"{KINDS[self.kind]} {self.name!r} from {self.distribution} {self.version} ({self.target})"

    def load(self) -> Any:
        """Import the target. Raises PluginError, with the cause chained, whatever goes wrong in it."""
        try:
            loaded = importlib.metadata.EntryPoint(self.name, self.target, f"genfuse.{self.kind}").load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a module that calls sys.exit() is broken too
            raise PluginError(f"{self} failed to import: {type(error).__name__}: {error}") from error
        if self.kind == "models":
            api = getattr(loaded, "genfuse_api", None)
            if api != API:
                written_for = "no plugin API (it has no `genfuse_api`)" if api is None else f"plugin API {api}"
                raise PluginError(f"{self} was written for {written_for}; this genfuse has plugin API {API}")
        elif not callable(loaded):
            raise PluginError(f"{self} is not callable: it is {loaded!r}")
        return loaded


def _owner(entry_point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution; half-removed ones have no metadata left to read them from."""
    try:
        return entry_point.dist.name or "unknown", entry_point.dist.version or "?"  # type: ignore[union-attr]
    except (AttributeError, KeyError, OSError, TypeError):
        return "unknown", "?"


@cache
def discover(kind: str) -> tuple[Plugin, ...]:
    """All plugins of one kind, sorted; those of other distributions only without GENFUSE_DISABLE_PLUGINS=1."""
    ours_only = os.environ.get("GENFUSE_DISABLE_PLUGINS", "0") not in ("", "0")
    found = set()
    for entry_point in importlib.metadata.entry_points(group=f"genfuse.{kind}"):
        owner, version = _owner(entry_point)
        if owner == OURS or not ours_only:
            found.add(Plugin(kind, entry_point.name, owner, version, entry_point.value))
    return tuple(sorted(found))


def find(kind: str, name: str) -> Plugin:
    """The plugin that a user means by ``name``, or by ``distribution:name``.

    Raises PluginError for an unknown name, and for one that several distributions claim.
    """
    plugins = discover(kind)
    owner, _, short = name.rpartition(":")
    claims = [p for p in plugins if p.name == name or (p.name == short and p.distribution == owner)]
    builtin = [p for p in claims if p.distribution == OURS]
    if len(builtin) == 1:  # the name of a built-in one cannot be taken
        return builtin[0]
    if not claims:
        known = ", ".join(sorted({p.name for p in plugins})) or "none; is genfuse installed?"
        raise PluginError(f"there is no {KINDS[kind]} {name!r}; known: {known}")
    if len(claims) > 1:
        choices = " or ".join(f"{p.distribution}:{p.name}" for p in claims)
        raise PluginError(f"{KINDS[kind]} {name!r} is claimed by {len(claims)} distributions; write {choices}")
    return claims[0]


def load(kind: str, name: str) -> Any:
    """Import what a user means by ``name``. Raises PluginError; see `find` and `Plugin.load`."""
    return find(kind, name).load()


def describe() -> Iterator[tuple[Plugin, PluginError | None]]:
    """Every plugin with the error that its import raises, if it does. This imports all of them."""
    for kind in KINDS:
        for plugin in discover(kind):
            try:
                plugin.load()
            except PluginError as error:
                yield plugin, error
            else:
                yield plugin, None
