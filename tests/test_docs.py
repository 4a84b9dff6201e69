"""Every code block of the pages is run or held against what it speaks of, and the pages name all that there is."""

import dataclasses
import functools
import gzip
import importlib.util
import inspect
import re
import shlex
import struct
import sys
import types
from pathlib import Path
from typing import NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along

import numpy as np
import pytest
import yaml
from distributions import write_distribution
from PIL import Image

import genfuse
from benchmarks.__main__ import _parser
from genfuse import ops, plugins
from genfuse.cli import main
from genfuse.metrics import train_features
from genfuse.models import FACTS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def pages(test, chosen=PAGES):
    return pytest.mark.parametrize("page", chosen, ids=[str(page.relative_to(ROOT)) for page in chosen])(test)


def of_theory(test):
    return pages(test, [page for page in PAGES if page.parent.name == "theory"])


def text_of(page):
    return page.read_text(encoding="utf-8")


# Code blocks. Indented ones are formulas, which claim nothing; so do fenced ones of the kind `text`.


class Block(NamedTuple):
    kind: str  # what stands behind the fence
    text: str
    line: int  # of the page, at which the text begins


def blocks(page):
    found, text = [], text_of(page)
    for block in re.finditer(r"^```(.*)\n((?:.*\n)*?)^```$", text, re.MULTILINE):
        found.append(Block(block[1], block[2], text.count("\n", 0, block.start(2)) + 1))
    assert 2 * len(found) == len(re.findall(r"^\s*```", text, re.MULTILINE)), f"{page.name}: a fence that no other ends"
    return found


def prose_of(page):
    """What stands between the blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Someone who reads a page in an empty folder and does what each block says. All data sets are there, but small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GENFUSE_DATA", str(tmp_path / "data"))
    _write_images(tmp_path / "data")
    few = functools.partial(train_features, steps=2)  # of the classifier that a comparison wants
    monkeypatch.setattr("genfuse.metrics._features.train_features", few)
    # Which draw thousands of samples of each model.
    monkeypatch.setattr("genfuse.comparison._columns._sampling_seconds", lambda model, data: 1.0)
    monkeypatch.setattr("genfuse.comparison._columns.PATHS", 2)
    yield Reader(tmp_path, monkeypatch)
    plugins.discover.cache_clear()
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


class Reader:
    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.names = {}  # what the page's Python has defined
        self.left_out = []  # blocks, with the reason
        self.does = {
            "": self.commands, "sh": self.commands, "python": self.python, "toml": self.toml, "diff": self.diff,
            "json": lambda block, page: yaml.safe_load(block.text),
            "yaml": lambda block, page: yaml.safe_load(block.text),
            "text": lambda block, page: None,
        }  # fmt: skip

    def python(self, block, page):
        """As it stands; the tests that it defines pass. Trackers and the like need not be installed."""
        wanted = re.findall(r"^import (wandb|mlflow|optuna|zuko)$", block.text, re.MULTILINE)
        if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
            self.left_out.append(f"{page.name}, line {block.line}: {missing[0]} is not installed")
            return
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), self.names)
        for name in re.findall(r"^def (test_\w+)\(\)", block.text, re.MULTILINE):
            self.names[name]()

    def toml(self, block, page):
        """The page's Python has what the entry points name, and the commands that follow have them as plugins."""
        project = tomllib.loads(block.text)["project"]
        for entries in project["entry-points"].values():
            for target in entries.values():
                module, name = target.split(":")
                assert name in self.names, f"{target}: the page's Python has no {name}"
                there = sys.modules.get(module, types.ModuleType(module))
                setattr(there, name, self.names[name])
                self.names[name].__module__ = module
                self.monkeypatch.setitem(sys.modules, module, there)
        self.install(project)

    def install(self, project):
        """The plugins of a pyproject.toml, whose modules can be imported."""
        for group, entries in project["entry-points"].items():
            kind = group.removeprefix("genfuse.")
            assert kind in plugins.KINDS, f"{group} is no group of entry points that genfuse reads"
            name = f"{project.get('name', 'of-the-page')}-{kind}"
            write_distribution(site := self.folder / "site" / name, name, kind, entries)
            self.monkeypatch.syspath_prepend(str(site))
        plugins.discover.cache_clear()

    def diff(self, block, page):
        """Of two files of ours, whose lines it shows."""
        for sign, header in (("-", r"^--- (?:a/)?(\S+)"), ("+", r"^\+\+\+ (?:b/)?(\S+)")):
            file = re.search(header, block.text, re.MULTILINE)
            assert file, "a diff without the names of its files"
            there = text_of(ROOT / file[1]).splitlines()
            shown = re.findall(rf"^[ {sign}](?!{re.escape(2 * sign)} )(.*)$", block.text, re.MULTILINE)
            assert not set(shown) - set(there)

    def commands(self, block, page):
        lines = block.text.replace("\\\n", " ").splitlines()
        for words in filter(None, (shlex.split(line, comments=True) for line in lines)):
            self.command(words, f"{page.name}, block of line {block.line}: {shlex.join(words)}")

    def command(self, words, where):
        match words:
            case ["genfuse", *args]:
                self.make_up_table(args)
                assert main(shortened(args, re.sub(r"\W+", "-", where)[:80])) == 0, where
            case ["make", target, *variables]:
                names = [f"{target}:", *(f"{variable.partition('=')[0]} ?=" for variable in variables)]
                makefile = text_of(ROOT / "Makefile").splitlines()
                assert all(any(line.startswith(name) for line in makefile) for name in names), where
            case ["pip", "install", "--editable", folder]:
                self.monkeypatch.syspath_prepend(str(self.folder / folder / "src"))
                self.install(tomllib.loads(text_of(self.folder / folder / "pyproject.toml"))["project"])
            case ["pytest", folder]:
                assert list((self.folder / folder / "tests").glob("test_*.py")), where
            case ["python", "-m", "benchmarks", *args]:
                _parser().parse_args(args)
            case ["python", file, *_]:
                assert (ROOT / file).is_file(), where
            case _:
                pytest.fail(f"{where}: no rule says how to check this; see Reader.command")

    def make_up_table(self, args):
        """A table that a command names, and the reader is thought to have."""
        data = args[args.index("--data") + 1] if "--data" in args else ""
        kind, _, path = data.partition(":")
        if kind == "npy" and not (self.folder / path).exists():
            (self.folder / path).mkdir(parents=True)
            for part in ("train", "validation", "test"):
                np.save(self.folder / path / part, np.random.default_rng(0).normal(size=(200, 6)))


def shortened(args, folder):
    """The same command in little time: of an option that is given twice, the last one counts."""
    command, *rest = args
    if command == "train":
        steps = "4" if "--resume" in rest else "2"
        small = {} if rest[0].startswith("-") else small_settings(rest[0])
        small = [f"--model.{name}={value.strip('[]')}" for name, value in small.items()]
        return [command, rest[0], *small, *rest[1:], "--steps", steps, "--no-pictures"]
    if command == "train-features":
        return [*args, "--steps", "2"]
    if command == "sample":
        return [*args, "--n", "4", *(["--steps", "2"] if "--steps" in rest else [])]
    if command == "evaluate":  # 64 features take more than 64 samples
        return [*args, "--samples", "2", "--limit", "4", "--n", "0" if "0" in rest else "70"]
    if command == "compare" and "--data" in rest:
        models, options = rest[: rest.index("--data")], rest[rest.index("--data") :]
        names = {label or name: name for label, _, name in (model.rpartition("=") for model in models)}
        small = {label: small_settings(name) for label, name in names.items()}  # every one is a model
        given = options[options.index("--set") + 1 :] if "--set" in options else []
        # Two train, and those that are given settings: the commands of a page name the same ones again and again.
        kept = {*list(names)[:2], *(setting.partition(".")[0] for setting in given)}
        models = [model for label, model in zip(names, models, strict=True) if label in kept]
        small = [f"{label}.{s}={v}" for label in names if label in kept for s, v in small[label].items()]
        few = ["--budget", "200examples", "--seeds", "1", "--n", "70", "--limit", "4"]
        # Into a folder of its own, as one folder has one set of options.
        return [command, *models, *options, *few, "--out", folder, "--set", *small, *given]
    return args


def small_settings(model):
    """Of networks and samplers that take long, where a model has them: as `--set` takes them."""
    fields = {field.name: field.default for field in dataclasses.fields(genfuse.models.load(model).Config)}
    small = {"timesteps": "20", "channels": "[8]" if isinstance(fields.get("channels"), tuple) else "8"}
    return {name: value for name, value in small.items() if name in fields}


def _write_images(root):
    """Data sets of a few random images, in the files that MNIST comes in."""
    draw = np.random.default_rng(0)
    for part, n in (("train", 300), ("t10k", 100)):
        for kind, shape, most in (("images-idx3", (n, 28, 28), 256), ("labels-idx1", (n,), 10)):
            header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
            content = gzip.compress(header + draw.integers(most, size=shape, dtype=np.uint8).tobytes())
            for name in ("mnist", "fashion-mnist"):
                (root / name).mkdir(parents=True, exist_ok=True)
                (root / name / f"{part}-{kind}-ubyte.gz").write_bytes(content)


@pages
def test_every_block_of_a_page_does_what_it_says(page, reader):
    for block in blocks(page):
        assert block.kind in reader.does, f"{page.name}, line {block.line}: no rule for blocks of {block.kind!r}"
        reader.does[block.kind](block, page)
    if page.parent.name == "theory":
        for name in pictures(page):
            assert_alike(page.parent / name, reader.folder / name)
    if reader.left_out:
        pytest.skip("; ".join(reader.left_out))


def pictures(page):
    return re.findall(r"^!\[[^]]+\]\(([\w-]+\.png)\)$", text_of(page), re.MULTILINE)


def assert_alike(kept, made):
    """Of two pictures, whatever the fonts are and however a training's last digits come out."""
    assert made.is_file(), f"{kept.name} is made by no block of its page"
    first, second = (
        np.asarray(Image.open(file).convert("RGB").resize((64, 32), Image.Resampling.BOX), np.float64)
        for file in (kept, made)
    )
    off = np.abs(first - second).mean()
    assert off < 3, f"{kept.name} is {off:.1f} of 255 away from what its page draws: copy it from there again"


@of_theory
def test_a_page_of_theory_has_formulas_that_markdown_leaves_alone_and_a_small_picture(page):
    text = prose_of(page)
    formulas = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.DOTALL)
    assert any(formula.startswith("$$") for formula in formulas)
    escaped = [formula for formula in formulas if re.search(r"\\[!-/:-@\[-`{-~]|\*", formula)]
    assert not escaped, "Markdown takes a backslash before punctuation away, and * for emphasis"
    assert pictures(page)
    assert all((page.parent / name).stat().st_size < 60_000 for name in pictures(page))
    assert "arxiv.org/abs/" in text


@pages
def test_links_to_files_lead_somewhere(page):
    text = prose_of(page)
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


# The pages of models.

MODELS = [plugin.name for plugin in plugins.discover("models") if plugin.distribution == plugins.OURS]


def page_of(model):
    """The one that README's table names."""
    return ROOT / re.search(rf"\[[^]]*`{model}`[^]]*\]\((docs/\w+\.md)\)", text_of(ROOT / "README.md"))[1]


def rows(page):
    """Cells of the rows of all tables."""
    lines = (line[1:-1] for line in text_of(page).splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


def shown(value):
    """A default as the pages have it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize("model", MODELS)
def test_the_page_of_a_model_has_its_settings_with_their_defaults(model):
    missing = []
    for field in dataclasses.fields(genfuse.models.load(model).Config):
        defaults = [
            f" {each}"  # such as "wgan-gp 5" in "1; `wgan-gp` 5"
            for setting, default, *rest in rows(page_of(model))
            if f"`{field.name}`" in setting and (len(rest) < 2 or rest[0] == "all" or f"`{model}`" in rest[0])
            for each in re.split("[,;] ?", default.replace("`", ""))
        ]
        found = any(field.default is None or default.endswith(f" {shown(field.default)}") for default in defaults)
        if field.name not in FACTS and not found:
            missing.append((field.name, field.default))
    assert not missing


@pytest.mark.parametrize("model", MODELS)
def test_the_page_of_all_models_leads_to_the_page_of_each(model):
    target = re.search(rf"\[`{model}`\]\(([^)]+)\)", text_of(ROOT / "docs" / "models.md"))[1]
    page = page_of(model)
    assert f"`{model}`" in text_of(page)
    assert target.startswith("#") if page.name == "models.md" else target == page.name


@pytest.mark.parametrize("page", sorted({page_of(model) for model in MODELS}), ids=lambda page: page.name)
def test_a_page_of_models_has_a_formula_and_a_picture(page):
    assert re.search(r"^    \S", text_of(page), re.MULTILINE)
    assert re.search(r"[(\"][\w-]+\.png[)\"]", text_of(page))


# The page of operators.

PUBLIC = [n for n, f in vars(ops).items() if inspect.isfunction(f) and f.__module__ != "genfuse.ops._op"]
OPERATORS = ROOT / "docs" / "operators.md"


def test_every_operator_has_a_section_and_every_section_an_operator():
    sections = re.findall(r"^## `(\w+)`$", text_of(OPERATORS), re.MULTILINE)
    assert sections == sorted(PUBLIC)
    assert set(PUBLIC) <= set(re.findall(r"`(\w+)`", text_of(ROOT / "README.md")))


@pytest.mark.parametrize("name", PUBLIC)
def test_the_section_of_an_operator_is_whole(name):
    section = re.search(rf"^## `{name}`\n(.*?)(?=^## |\Z)", text_of(OPERATORS), re.MULTILINE | re.DOTALL)[1]
    assert re.search(r"^    \S", section, re.MULTILINE), "no formula"
    for part in ("Shapes", "Derivatives", "Source", "Cost"):
        assert f"- **{part}.** " in section
    assert f"ops.{name}(" in section, "no example"
    spans = " ".join(re.findall(r"`([^`\n]+)`", section))
    assert not {p for p in inspect.signature(getattr(ops, name)).parameters if not re.search(rf"\b{p}\b", spans)}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_table_of_operators_has_their_implementations(name):
    kernel = ops._op.KERNELS.get(name)
    native, triton = (kernel.native, kernel.triton) if kernel else (None, None)
    compiled = ["C++"] if kernel and kernel.cpu_only else ["C++", "CUDA"]
    expected = [*(compiled if native else []), *(["Triton"] if triton else []), "PyTorch"]
    found = next(row[2] for row in rows(OPERATORS) if row[0] == f"[`{name}`](#{name})")
    assert found == ", ".join(expected) or (kernel is None and found.startswith("PyTorch, "))
