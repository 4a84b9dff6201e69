"""The promise of docs/stability.md: no public name, argument, setting or command vanishes unnoticed.

tests/public_names.txt lists them. `make names` adds what is new; a line is taken out of it by hand.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import types
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along

import pytest

from genfuse.cli._commands import COMMANDS

LIST = Path(__file__).with_name("public_names.txt")
PROJECT = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
ROOMS = "applications comparison data diffusion errors flows metrics models nn ops plugins sklearn testing training"
INNER = "diffusion.likelihood diffusion.samplers diffusion.schedules nn.likelihoods"
MODULES = ["genfuse", *(f"genfuse.{name}" for name in (*ROOMS.split(), *INNER.split()))]
PATCHES = [f"genfuse.integrations.{name}" for name in ("nflows", "normflows", "pythae", "zuko")]


def names_in(source):
    """What a module offers: `__all__`; or what it defines, and what it imports `as` a name (PEP 484's rule)."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom):
            names += [alias.asname for alias in node.names if alias.asname]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)]
            if "__all__" in found:
                return ast.literal_eval(node.value)
            names += found
    return [name for name in names if not name.startswith("_")]


def arguments(thing):
    if isinstance(thing, types.GenericAlias):  # whose signature is the class's, if Python knows it: 3.13 does
        return None
    try:
        given = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):  # a type alias
        return None
    return [p.name for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and not p.name.startswith("_")]


def line(name, thing):
    """`name(arguments): members`."""
    if not callable(thing):
        return name
    text = name if (given := arguments(thing)) is None else f"{name}({', '.join(given)})"
    if inspect.isclass(thing):
        ours = [vars(cls) for cls in thing.__mro__ if cls.__module__.startswith("genfuse")]
        members = {member for names in ours for member in names if not member.startswith("_")} - set(given or ())
        text += f": {' '.join(sorted(members))}" if members else ""
    return text


def public():
    lines = ["command train", *(line(f"command {name}", command) for name, command in COMMANDS.items())]
    for kind in ("models", "datasets", "metrics"):
        for name, target in PROJECT["entry-points"][f"genfuse.{kind}"].items():
            lines.append(f"{kind.removesuffix('s')} {name}")
            if kind == "models":
                module, _, cls = target.partition(":")
                model = getattr(importlib.import_module(module), cls)
                lines += [line(f"{module}.{cls}", model), line(f"{module}.{cls}.Config", model.Config)]
    for module in MODULES:
        source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        for name in names_in(source):
            lines.append(line(f"{module}.{name}", getattr(importlib.import_module(module), name)))
    for module in PATCHES:  # none of them can be imported without the library that it patches
        source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        lines += [f"{module}.{name}()" for name in {"patch", "report", "unpatch"} & {*names_in(source)}]
    return {subject(text): text for text in sorted(set(lines))}


def subject(text):
    return re.match(r"[^(:]*", text)[0]


def parts(text):
    """A line's arguments, and its members."""
    given, members = re.fullmatch(r"[^(:]*(?:\((.*)\))?(?:: (.*))?", text).groups(default="")
    return [each for each in given.split(", ") if each], members.split()


def listed():
    return {subject(text): text for text in LIST.read_text(encoding="utf-8").splitlines()}


def gone(before, now):
    """What was promised and is not there; what moved is not where it was."""
    missing = [name for name in before if name not in now]
    for name in before.keys() & now.keys():
        (old, members), (new, others) = parts(before[name]), parts(now[name])
        missing += [f"{name}({each}=)" for each in old if each not in {*new, *others}]
        missing += [f"{name}.{each}" for each in members if each not in {*new, *others}]
        kept = [each for each in new if each in old]
        if kept != [each for each in old if each in new]:
            missing.append(f"{name}({', '.join(old)}): the arguments' order")
    return sorted(missing)


def added(before, now):
    """Lines that have something which is not listed."""
    return sorted(text for name, text in now.items() if name not in before or news(before[name], text))


def news(before, now):
    (old, members), (new, others) = parts(before), parts(now)
    return {*new, *others} - {*old, *members}


def merged(before, now):
    """Both: a line that has lost something stays as it was, with what is new behind it."""
    lines = dict(now)
    for name, text in before.items():
        (old, members), (new, others) = parts(text), parts(now.get(name, name))
        new += [each for each in old if each not in {*new, *others}]
        others = sorted({*others, *members} - set(new))
        bare = "(" not in text + now.get(name, "")
        lines[name] = name + ("" if bare else f"({', '.join(new)})") + (f": {' '.join(others)}" if others else "")
    return "".join(f"{lines[name]}\n" for name in sorted(lines))


GONE = """\
public names are gone:
  {}
People's code uses them. Keep each, with a DeprecationWarning that names what to use instead (docs/stability.md says for
how long). If its time is over, say so in CHANGELOG.md and take it out of tests/public_names.txt by hand."""
NEW = """\
these are public, and not in tests/public_names.txt:
  {}
If they are meant to be, run `make names`. If not, give them a name that begins with an underscore."""


def test_no_public_name_vanishes():
    missing = gone(listed(), public())
    assert not missing, GONE.format("\n  ".join(missing))


def test_every_public_name_is_listed():
    new = added(listed(), public())
    assert not new, NEW.format("\n  ".join(new))


@pytest.mark.parametrize(
    ("before", "now", "missing"),
    [
        ("a.f(x)", "a.g(x)", ["a.f"]),
        ("a.f(x, y)", "a.f(x, z)", ["a.f(y=)"]),
        ("a.f(x, y)", "a.f(y, x)", ["a.f(x, y): the arguments' order"]),
        ("a.C(x): run stop", "a.C(x): run", ["a.C.stop"]),
        ("a.C(x): run", "a.C(x, y): run stop", []),
        ("command train", "command sample", ["command train"]),
    ],
)
def test_what_vanishes_is_seen_and_stays_listed(before, now, missing):
    before, now = {subject(before): before}, {subject(now): now}
    assert gone(before, now) == missing
    kept = {subject(text): text for text in merged(before, now).splitlines()}
    if "order" not in str(missing):
        assert gone(kept, now) == missing
        assert gone(before, kept) == []
    assert added(kept, now) == []


if __name__ == "__main__":
    LIST.write_text(merged(listed() if LIST.exists() else {}, public()), encoding="utf-8")
