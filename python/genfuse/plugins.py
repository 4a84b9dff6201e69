"""Models, data sets and metrics are entry points: ours and those of any installed package alike.

Discovery reads the metadata of installed distributions and imports nothing. A plugin is imported when it is used, so a
broken one fails its own user and nobody else.
"""

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from genfuse.errors import PluginError, near

API = 1  # what `genfuse_api` on a model class is held against
KINDS = {"models": "model", "datasets": "data set", "metrics": "metric"}  # groups are genfuse.models and so on
OURS = "genfuse"


Check = Callable[[Any], str | None]  # what makes an object unfit to be a plugin of its kind, or None


def not_callable(loaded: Any) -> str | None:
    """What makes an object unfit to be a data set or a metric."""
    return None if callable(loaded) else f"is not callable: it is {loaded!r}"


@dataclass(frozen=True, order=True)
class Plugin:
    """One entry point: what a user types, and where it leads."""

    kind: str  # one of KINDS
    name: str  # what the user types
    distribution: str
    version: str
    target: str  # "module:attribute"

    def __str__(self) -> str:
        return f"{KINDS[self.kind]} {self.name!r} from {self.distribution} {self.version} ({self.target})"

    def load(self, check: Check | None = None) -> Any:
        """Import the target. Raises PluginError, with the cause chained, whatever goes wrong in it, and if ``check``,
        by default whether it can be called, finds it unfit."""
        try:
            loaded = importlib.metadata.EntryPoint(self.name, self.target, f"genfuse.{self.kind}").load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a module that calls sys.exit() is broken too
            raise PluginError(f"{self} failed to import: {type(error).__name__}: {error}") from error
        if wrong := (check or not_callable)(loaded):
            raise PluginError(f"{self} {wrong}")
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
        raise PluginError(f"there is no {KINDS[kind]} {name!r}; known: {known}{near(name, (p.name for p in plugins))}")
    if len(claims) > 1:
        choices = " or ".join(f"{p.distribution}:{p.name}" for p in claims)
        raise PluginError(f"{KINDS[kind]} {name!r} is claimed by {len(claims)} distributions; write {choices}")
    return claims[0]


def typed(plugin: Plugin) -> str:
    """What a user types to mean just this plugin: its name, or DISTRIBUTION:NAME if the name is another's too."""
    try:
        alone = find(plugin.kind, plugin.name) == plugin
    except PluginError:  # claimed by several
        alone = False
    return plugin.name if alone else f"{plugin.distribution}:{plugin.name}"


def load(kind: str, name: str, check: Check | None = None) -> Any:
    """Import what a user means by ``name``. Raises PluginError; see `find` and `Plugin.load`."""
    return find(kind, name).load(check)


def table(kind: str, families: Mapping[str, Mapping[str, str]] = {}) -> list[str]:
    """The plugins of one kind as lines: ours by ``families``, {family: {name: what it is}}, then those of others, with
    what to type, the distribution, and where it is defined. Nothing is imported."""
    found = [(plugin, typed(plugin)) for plugin in discover(kind)]
    ours = {name for plugin, name in found if plugin.distribution == OURS}
    width = max((len(name) for _, name in found), default=0) + 2
    lines = [f"{kind}:"]
    for family, members in families.items():
        lines += [f" {family}", *(f"  {name:{width}}{about}" for name, about in members.items() if name in ours)]
    known = ours.intersection(*[{name for members in families.values() for name in members}] if families else [set()])
    others = [(plugin, name) for plugin, name in found if name not in known]
    if others and families:
        lines.append(" of other packages")
    return [*lines, *(f"  {name:{width}}{of.distribution} {of.version}  {of.target}" for of, name in others)]
