"""The layers of the library: imports point down the list, those in functions and for typing included."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import genfuse

ROOT = Path(genfuse.__file__).parent
LAYERS = [
    {"errors", "_version"},
    {"_files", "ops"},
    {"integrations", "nn", "plots"},
    {"flows", "diffusion"},
    {"plugins"},
    {"data"},
    {"models"},
    {"training"},
    {"metrics"},
    {"applications"},
    {"comparison", "doctor", "sklearn"},
    {"cli"},
    {"testing"},
    {"", "__main__"},  # the package itself, which imports the names of others when they are first used
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
FOR_ALL = {"_files", "_version"}  # private of the library, not of one room


def modules(root):
    """{dotted name: its tree}, without the template that `genfuse new-plugin` copies."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if "template" not in parts:
            name = ".".join(("genfuse", *parts)).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def arrows(trees):
    """(importing module, imported module, name, line) of every import of ours, wherever in a file it stands."""
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "genfuse":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield module, inner if inner in trees else node.module, alias.name, node.lineno
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "genfuse":
                        yield module, alias.name, "", node.lineno


def room(module):
    return (module.split(".") + [""])[1]


def upward(trees):
    return [
        f"{source}:{line} imports {name or target}, of {room(target) or 'genfuse'}"
        for source, target, name, line in arrows(trees)
        if room(source) != room(target) and RANK[room(source)] <= RANK[room(target)]
    ]


def circles(trees):
    graph = {module: set() for module in trees}
    for source, target, _, _ in arrows(trees):
        if target != source:
            graph[source].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def private(trees):
    found = []
    for source, target, name, line in arrows(trees):
        if room(source) == room(target):
            continue
        parts = [
            part for part in (*target.split(".")[1:], name) if re.fullmatch("_[^_].*", part) and part not in FOR_ALL
        ]
        if parts:
            found.append(f"{source}:{line} takes {name} of {target}")
    return found


TREES = modules(ROOT)


@pytest.mark.parametrize("rule", [upward, circles, private])
def test_the_library_keeps_to_its_layers(rule):
    assert rule(TREES) == []


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [
        (upward, "genfuse.nn._new", "def f():\n    from genfuse.models import create\n"),
        (
            upward,
            "genfuse.data.new",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import genfuse.models\n",
        ),
        (upward, "genfuse.metrics.new", "import genfuse\n"),
        (circles, "genfuse.errors", "from genfuse.data import load_data\n"),
        (private, "genfuse.models.new", "from genfuse.ops._philox import philox\n"),
        (private, "genfuse.models.new", "from genfuse.ops import _philox\n"),
    ],
)
def test_each_rule_sees_what_breaks_it(rule, module, text):
    assert rule({**TREES, module: ast.parse(text)})
