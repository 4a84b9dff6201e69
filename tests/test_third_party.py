"""Packages of other people, installed by pip and used through the real commands, whole ones and broken ones."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributions import write_wheel

ROOT = Path(__file__).parents[1]

MODEL = """
from dataclasses import dataclass
import torch
from genfuse.models import GenerativeModel

@dataclass(frozen=True)
class Config:
    shape: tuple[int, ...] = (2,)

class Model(GenerativeModel):
    Config = Config
"""

# name of the model: what its module holds, and what `genfuse plugins` says of it
BROKEN = {
    "imports": ("import module_that_is_not_there", "failed to import: ModuleNotFoundError"),
    "syntax": ("def model(:", "failed to import: SyntaxError"),
    "exits": ("raise SystemExit(3)", "failed to import: SystemExit"),
    "base": ("class Model:\n    genfuse_api = 1", "is not a subclass of genfuse.models.GenerativeModel"),
    "api": (MODEL + "    genfuse_api = 99", "was written for plugin API 99; this genfuse has plugin API 1"),
    "verb": (MODEL, "lacks the verb loss(batch, player)"),
    "config": (MODEL + "    Config = 3\n    def loss(self, batch, player): pass", "has no dataclass of settings"),
}
SLEEP = 1.5
SLOW = f"import time; time.sleep({SLEEP})\n" + MODEL + "    def loss(self, batch, player): pass"


class Site:
    """A folder that pip installs packages into, beside those of this interpreter."""

    def __init__(self, folder: Path, cwd: Path) -> None:
        self.folder, self.cwd = folder, cwd

    def install(self, *what: Path) -> None:
        options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", self.folder, *what]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def run(self, *args: object, code: int = 0) -> str:
        """What a command says. Python's arguments, or those of ``genfuse``."""
        words = list(map(str, args))
        command = [sys.executable, *(words if words[0] in ("-m", "-c") else ["-m", "genfuse", *words])]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "COLUMNS": "200"}
        environment.pop("GENFUSE_DISABLE_PLUGINS", None)
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.cwd, env=environment)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Site:
    """With a package for each broken plugin, one whose name is taken, one that is slow, and two that claim one name."""
    wheels = tmp_path_factory.mktemp("wheels")
    packages = [
        *(
            write_wheel(wheels, f"acme-{name}", {name: f"acme_{name}:Model"}, source)
            for name, (source, _) in BROKEN.items()
        ),
        write_wheel(wheels, "acme-slow", {"slow": "acme_slow:Model"}, SLOW),
        write_wheel(wheels, "acme-thief", {"vae": "acme_thief:Model", "mine": "acme_thief:Model"}, "1 / 0"),
        write_wheel(wheels, "acme-other", {"mine": "acme_other:Model"}, MODEL),
    ]
    site = Site(tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work"))
    site.install(*packages)
    return site


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Site:
    site = Site(tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work"))
    site.install(_copy(ROOT / "examples" / "plugin", tmp_path_factory.mktemp("source")))
    return site


def _copy(package: Path, folder: Path) -> Path:
    """A build leaves files in the folder that it builds."""
    for file in package.rglob("*"):
        if file.is_file() and not {"build", "__pycache__"} & set(file.parts) and ".egg-info" not in str(file):
            target = folder / file.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return folder


def test_every_broken_plugin_is_listed_with_its_error_beside_those_that_work(broken):
    said = broken.run("plugins")
    for name, (_, reason) in BROKEN.items():
        assert re.search(
            rf"^{name} +model +acme-{name} +1\.0 +acme_{name}:Model +BROKEN\n +model .*{re.escape(reason)}", said, re.M
        )
    assert re.search(r"^vae +model +genfuse .* ok$", said, re.M)
    assert re.search(r"^acme-thief:vae +model +acme-thief .*BROKEN\n.*ZeroDivisionError", said, re.M)
    assert re.search(r"^slow +model .* ok, but its import takes 1\.[5-9] s$", said, re.M)
    assert "acme-thief:mine" in said
    assert "acme-other:mine" in said
    assert f"{len(BROKEN) + 3} broken" in said.splitlines()[-1]


def test_the_doctor_counts_them(broken):
    said = broken.run("doctor")
    models = re.search(r"^ +models +(.*)$", said, re.M).group(1)
    assert re.search(r"\b17 of genfuse \d", models)
    assert {"1 of acme-slow 1.0", "2 of acme-thief 1.0"} <= set(models.split(", "))
    assert "model syntax" in said
    assert said.count("ERROR") == len(BROKEN) + 3


def test_a_model_trains_beside_every_one_of_them(broken):
    assert "run: " in broken.run("train", "vae", "--data", "digits", "--steps", 2, "--out", "beside")
    assert "reconstruction" in broken.run("evaluate", "beside", "--limit", 10, "--n", 100)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_fails_its_own_user_with_its_distribution_and_the_reason(broken, name):
    said = broken.run("train", name, "--data", "digits", "--steps", 2, code=2)
    assert re.search(rf"genfuse: error: model '{name}' from acme-{name} 1\.0 .*{re.escape(BROKEN[name][1])}", said)


def test_a_broken_model_is_a_row_of_a_comparison_that_says_why(broken):
    of = ["--data", "digits", "--features", "random-conv", "--budget", "200examples", "--seeds", 1, "--n", 100]
    said = broken.run("compare", "vae", "syntax", *of, "--out", "table")
    rows = json.loads((broken.cwd / "table" / "comparison.json").read_text())["rows"]
    assert "SyntaxError" in rows[1]["outcome"], said
    assert rows[0]["outcome"] == "1 of 1"


def test_list_imports_no_plugin_and_is_quick(broken):
    began = time.perf_counter()
    said = broken.run("list")
    seconds = time.perf_counter() - began
    assert {"imports", "syntax", "acme-thief:vae", "acme-other:mine"} <= set(said.split())
    assert seconds < SLEEP  # that of the slow one alone
    code = "import sys, genfuse.cli; genfuse.cli.main(['list']); print({'torch', 'acme_slow'} & set(sys.modules))"
    assert broken.run("-c", code).endswith("set()\n")


def test_the_example_is_in_every_command(example):
    listed = example.run("list").split()
    assert {"aae", "waves", "spread-error"} <= set(listed)
    assert re.search(r"^aae +model +genfuse-aae .* ok$", example.run("plugins", "models"), re.M)

    train = ["train", "aae", "--data", "waves:8", "--model.latent-dim", 3, "--model.hidden", 32, "--batch-size", 500]
    example.run(*train, "--epochs", 2, "--out", "straight", "--no-pictures")
    example.run(*train, "--epochs", 1, "--out", "run", "--no-pictures")
    example.run("train", "--resume", "run", "--epochs", 2, "--pictures")
    runs = [example.cwd / name / "model.safetensors" for name in ("straight", "run")]
    assert runs[0].read_bytes() == runs[1].read_bytes()

    example.run("sample", "run", "--n", 5, "--out", "five.npy")
    said = example.run("evaluate", "run", "--limit", 50, "--n", 200)
    assert re.search(r"spread error +│ +[\d.e-]+ +│ +[\d.e-]+", said)
    figures = json.loads((example.cwd / "run" / "evaluation.json").read_text())["samples"]
    assert figures["plugins"]["spread_error"]["better"] == "lower"
    assert 0 < figures["real"]["spread_error"] < figures["samples"]["spread_error"]


def test_its_model_and_metric_are_in_the_table_of_a_comparison(example):
    example.run(
        "compare", "aae", "vae", "--data", "waves", "--budget", "2000examples", "--seeds", 2, "--n", 200, "--limit", 50,
        "--out", "table", "--set", "vae.decoder=gaussian",
    )  # fmt: skip
    table = (example.cwd / "table" / "table.md").read_text()
    lines = table[table.index("|  | spread error ↓ |") :].splitlines()
    assert re.fullmatch(r"\| aae \| [\d.]+ ± [\d.e-]+ \|", lines[2])
    assert re.fullmatch(r"\| real examples \| 0\.\d+ \|", lines[4])
    page = (example.cwd / "table" / "report.html").read_text()
    assert "Mean relative error of the standard deviation of a cell" in page


def test_wrong_use_of_the_example_is_an_error_in_its_words(example):
    said = example.run("train", "aae", "--data", "waves", "--model.weight", "-1", "--steps", 1, code=2)
    assert "weight must be above 0 and finite, got -1.0" in said
    assert "a wave has a length of 2 or more, as waves:32; got 'long'" in example.run(
        "train", "aae", "--data", "waves:long", "--steps", 1, code=2
    )


def test_its_own_tests_pass(example):
    assert "2 passed" in example.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "examples" / "plugin" / "tests"
    )


def test_without_plugins_it_is_not_there(example):
    code = "import os; os.environ['GENFUSE_DISABLE_PLUGINS'] = '1'; from genfuse.cli import main; main(['list'])"
    listed = example.run("-c", code).split()
    assert "aae" not in listed
    assert "vae" in listed


def test_a_new_plugin_installs_trains_and_passes_its_tests_as_it_is(tmp_path):
    site = Site(tmp_path / "site", tmp_path)
    assert "next: pip install --editable lucid-dream" in site.run("new-plugin", "lucid-dream")
    site.install(_copy(tmp_path / "lucid-dream", tmp_path / "copy"))
    site.run("train", "lucid-dream", "--data", "digits", "--steps", 3, "--out", "run")
    site.run("sample", "run", "--n", 4, "--out", "four.png")
    assert "2 passed" in site.run("-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path / "copy" / "tests")
    text = "".join(file.read_text() for file in (tmp_path / "lucid-dream").rglob("*") if file.is_file())
    assert "class LucidDream(" in text
    assert not re.search("my.?model", text, re.IGNORECASE)
    assert "taken, by the model 'lucid-dream' from lucid-dream 0.1.0" in site.run("new-plugin", "lucid-dream", code=2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vae", "the name 'vae' is taken, by the model 'vae' from genfuse"),
        ("My Model", "lower-case letters, digits and single -"),
        ("-x", "."),
        ("json", "would hide the module 'json'"),
        ("class", "would hide the module 'class'"),
    ],
)
def test_a_name_that_a_new_plugin_cannot_have_is_refused_and_nothing_written(tmp_path, monkeypatch, capsys, name, said):
    from genfuse.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", name]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_new_plugin_replaces_nothing(tmp_path, monkeypatch, capsys):
    from genfuse.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert main(["new-plugin", "mine"]) == 2
    assert "mine exists: name another folder by --out" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("there", [True, False])
def test_half_a_new_plugin_is_cleared_away(there, tmp_path, monkeypatch):
    from genfuse.cli import _commands

    out, files = tmp_path / "mine", iter(range(2))
    if there:
        out.mkdir()

    def full(path, text, write_text=_commands.write_text):
        if next(files, None) is None:
            raise OSError(28, "No space left on device")
        write_text(path, text)

    monkeypatch.setattr(_commands, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        _commands.new_plugin("mine", out=out)
    assert list(tmp_path.rglob("*")) == ([out] if there else [])
    monkeypatch.undo()
    assert _commands.new_plugin("mine", out=out) == 0
    assert len([file for file in out.rglob("*") if file.is_file()]) > 3


BAD_METRICS = {
    "fails": ("def metric(samples): return 1 / 0", "failed: ZeroDivisionError"),
    "returns": ("def metric(samples): return 3.5", "failed: TypeError: a metric must return a dict of numbers by name"),
    "nan": ("def metric(samples): return {'odd': float('nan')}", "failed: ValueError: not finite: odd = nan"),
    "taken": ("def metric(samples): return {'recall': 1.0}", "names: recall"),
    "absent": ("", "failed to import: AttributeError"),
}


def test_a_broken_metric_is_left_out_and_said_why_beside_the_figures_of_the_others(tmp_path, monkeypatch):
    from distributions import write_distribution

    import genfuse
    from genfuse import plugins
    from genfuse.metrics import evaluate_samples

    for name, (source, _) in BAD_METRICS.items():
        module = f"acme_metric_{name}"
        write_distribution(tmp_path, f"acme-{name}", "metrics", {name: f"{module}:metric"}, {module: source})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("GENFUSE_DISABLE_PLUGINS", raising=False)
    plugins.discover.cache_clear()
    try:
        data = genfuse.load_data("digits")
        torch.manual_seed(0)
        model = genfuse.create("vae", data, hidden=(8,), latent_dim=2)
        found = evaluate_samples(model, data, n=100, features="pixels")
        assert {"frechet_distance", "recall"} <= found["samples"].keys()
        for name, (_, said) in BAD_METRICS.items():
            assert said in found["left_out"][name]
        alone = evaluate_samples(model, data, n=100, features="pixels", metrics=["sliced-wasserstein"])
        assert alone["samples"].keys() == {"sliced_wasserstein", "nearest_training"}
        with pytest.raises(genfuse.errors.PluginError, match=r"there is no metric 'fid'; known: .*frechet-distance"):
            evaluate_samples(model, data, n=100, metrics=["fid"])
    finally:
        plugins.discover.cache_clear()


def test_the_ten_minutes_of_the_page_on_plugins_go_as_written(tmp_path):
    site = Site(tmp_path / "site", tmp_path)
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    commands = re.search(r"^```\n(genfuse new-plugin .*?)^```$", page, re.M | re.S).group(1).splitlines()
    assert len(commands) >= 6
    for command in commands:  # as they stand, but for the length of the trainings and where pip installs to
        name, *words = (
            command.replace("--epochs 50", "--epochs 1").replace("--budget 10s", "--budget 400examples").split()
        )
        if name == "pip":
            assert words[:2] == ["install", "--editable"]
            site.install(_copy(tmp_path / words[2], tmp_path / "source"))
        elif name == "pytest":
            assert "2 passed" in site.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *words)
        else:
            assert name == "genfuse"
            site.run(*words)
    assert (tmp_path / "dream.png").is_file()
    assert (tmp_path / "runs" / "dream-and-vae" / "report.html").is_file()
