import base64
import html
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from distributions import write_distribution
from markdown_it import MarkdownIt
from required import skip

import genfuse
from genfuse import plugins
from genfuse._files import locked, plain
from genfuse.cli import main
from genfuse.comparison import Budget, Comparison, compare_runs, markdown, show
from genfuse.comparison._columns import COLUMNS, training_seconds
from genfuse.comparison._report import Cell, Row, Table, _best, _together, about
from genfuse.data import Dataset, Split
from genfuse.errors import PluginError, RunError, SettingsError
from genfuse.metrics import train_features
from genfuse.training import Run, Trainer

SMALL = {
    "vae": {"hidden": [32], "latent_dim": 4},
    "gan": {"hidden": [32], "latent_dim": 4},
    "flow": {"network": "mlp", "hidden": [16], "layers": 2},
}
MODELS = ["vae", "gan", "flow=realnvp", "broken", "runaway", "picky"]
PLUGINS = {
    "acme_broken": "import module_that_is_not_there",
    "acme_runaway": """
from genfuse.models.vae import VAE

class Runaway(VAE):
    def loss(self, batch, player="model"):
        loss, terms = super().loss(batch, player)
        return (loss * float("nan") if self.updates > 2 else loss), terms
""",
    "acme_picky": """
from genfuse.models.vae import VAE

class Picky(VAE):
    def loss(self, batch, player="model"):
        raise RuntimeError("not <these> examples")
""",
}


@pytest.fixture(scope="module", autouse=True)
def _quick_classifiers():
    """What samples are compared by need not be accurate here."""

    def quick(data, **options):
        return train_features(data, **{**options, "steps": 100})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("genfuse.metrics._features.train_features", quick)
        yield


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Few of the digits, in two classes."""
    digits = genfuse.load_data("digits")
    return Dataset(
        "few-digits",
        {part: Split(split.x[:200], split.y[:200] % 2) for part, split in digits.splits.items()},
        levels=digits.levels,
    )


@pytest.fixture(scope="module")
def acme(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acme")
    entries = {name.removeprefix("acme_"): f"{name}:{name.removeprefix('acme_').title()}" for name in PLUGINS}
    write_distribution(folder, "acme", "models", entries, PLUGINS)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GENFUSE_DISABLE_PLUGINS", raising=False)
        patch.syspath_prepend(str(folder))
        plugins.discover.cache_clear()
        yield
    plugins.discover.cache_clear()


@pytest.fixture(scope="module")
def compared(data, acme, tmp_path_factory) -> tuple[Path, dict]:
    """A VAE, a GAN and a flow with two seeds each, and three plugins that fail in different ways."""
    out = tmp_path_factory.mktemp("compare") / "c"
    return out, genfuse.compare(MODELS, data, out=out, budget="1280examples", seeds=2, settings=SMALL, limit=50)


def row(result: dict, label: str) -> dict:
    return next(row for row in result["rows"] if row["label"] == label)


def changes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/seed-*/*") if path.is_file()}


# The budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("90s", Budget(seconds=90)),
        ("5m", Budget(seconds=300)),
        ("1.5 h", Budget(seconds=5400)),
        ("200_000examples", Budget(examples=200_000)),
    ],
)
def test_a_budget_is_a_time_or_a_number_of_examples(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "5", "5 minutes", "0s", "-1m", "1.5examples", "infs", "1e3s", "..s"])
def test_other_spellings_of_a_budget_are_refused(text):
    with pytest.raises(SettingsError, match="a budget is a time above 0, as 90s, 5m or 1h, or a number of examples"):
        Budget.parse(text)


def test_a_budget_of_examples_counts_those_of_all_players(compared):
    _, result = compared
    assert [row(result, label)["mean"]["steps"] for label in ("vae", "gan", "flow")] == [10, 10, 10]


def test_a_budget_of_time_is_met_and_is_the_same_number_of_steps_for_all_seeds(data, tmp_path):
    result = genfuse.compare(["vae"], data, out=tmp_path / "c", budget="0.3s", seeds=2, settings={"vae": SMALL["vae"]})
    steps = {run["figures"]["steps"] for run in result["rows"][0]["runs"]}
    assert len(steps) == 1
    assert steps.pop() > 16
    assert 0.06 < result["rows"][0]["mean"]["training_seconds"] < 1.5  # other processes may want the processor too


def test_the_seconds_of_a_run_are_those_of_its_speeds(data, tmp_path):
    model = genfuse.create("vae", data, **{**SMALL["vae"], "hidden": (32,)})
    run = Trainer(steps=7, batch_size=64, log_every=2, pictures=False, out=tmp_path / "r").fit(model, data)
    lines = [entry for entry in run.metrics() if entry["split"] == "train"]
    assert [entry["step"] for entry in lines] == [2, 4, 6, 7]  # an epoch is 64 + 64 + 64 + 8 examples
    seen = [128, 64 + 8, 128, 64]
    wanted = [examples / entry["examples_per_second"] for examples, entry in zip(seen, lines, strict=True)]
    assert training_seconds(run, data) == pytest.approx(sum(wanted))
    assert training_seconds(run, data, since=4) == pytest.approx(sum(wanted[2:]))


# What is found


def test_every_model_has_the_figures_that_its_verbs_allow(compared):
    _, result = compared
    keys = {label: set(row(result, label)["mean"]) for label in ("vae", "gan", "flow")}
    everywhere = {"frechet_distance", "precision", "recall", "density", "coverage", "smoothness", "sampling_seconds"}
    assert all(everywhere | {"training_seconds", "parameters", "steps", "spread"} <= keys[label] for label in keys)
    assert "reconstruction_error" in keys["vae"] & keys["flow"] - keys["gan"]
    assert keys["flow"] >= {"log_likelihood", "bits_per_dim"}
    assert "log_likelihood" not in keys["vae"] | keys["gan"]  # grey values have no Bernoulli density
    bounds = [row(result, label)["bound"] for label in ("vae", "gan", "flow")]
    assert bounds == ["none (Bernoulli on grey)", "none", "elbo"]


def test_means_and_spreads_are_those_of_the_seeds(compared):
    _, result = compared
    values = [run["figures"]["frechet_distance"] for run in row(result, "gan")["runs"]]
    assert values[0] != values[1]
    assert row(result, "gan")["mean"]["frechet_distance"] == pytest.approx(np.mean(values))
    assert row(result, "gan")["std"]["frechet_distance"] == pytest.approx(np.std(values, ddof=1))
    assert row(result, "gan")["mean"]["spread"] == pytest.approx(np.std(values, ddof=1) / np.mean(values))


def test_a_flow_is_inverted_and_a_vae_is_not(compared):
    _, result = compared
    assert row(result, "flow")["mean"]["inverted"] == 1
    assert row(result, "flow")["mean"]["reconstruction_error"] == pytest.approx(0, abs=1e-6)
    assert row(result, "vae")["mean"]["inverted"] == 0
    assert row(result, "vae")["mean"]["reconstruction_error"] > 0.01


def test_the_metrics_of_samples_are_those_of_evaluate(compared, data):
    from genfuse.metrics import evaluate_samples

    out, result = compared
    alone = evaluate_samples(Run(out / "vae" / "seed-0").model(), data)
    figures = row(result, "vae")["runs"][0]["figures"]
    assert {key: figures[key] for key in alone["samples"]} == pytest.approx(alone["samples"])
    assert result["real"] == pytest.approx(alone["real"])


def test_smoothness_is_1_for_a_straight_line_and_small_for_a_jump(data):
    from genfuse.comparison._columns import STEPS, _smoothness
    from genfuse.metrics import Extractor
    from genfuse.models import GenerativeModel

    class Model(GenerativeModel):
        def decode(self, z, y=None):
            return self.to_x(z)

        def latents(self, n, *, generator=None):
            return torch.randn(n, 2, generator=generator)

        def interpolate_latents(self, a, b, steps, y=None):
            raise NotImplementedError  # which is not asked for

    flat, model = Extractor("flat", "", lambda x: x), Model()
    model.weight = torch.nn.Parameter(torch.zeros(1))
    model.to_x = lambda z: z.atan2(z.flip(1))[:, :1] * 0 + 1  # nothing changes
    assert _smoothness(model, data, flat) == 1
    model.to_x = lambda z: (z[:, :1] > 0).float()  # changes at once, or not at all
    jumps = _smoothness(model, data, flat)
    torch.manual_seed(0)
    assert 1 / STEPS < jumps < 1
    model.to_x = lambda z: z
    assert 0.5 < _smoothness(model, data, flat) < 1  # an arc of an ellipse


def test_memory_is_what_was_taken_at_the_most():
    from genfuse.comparison._columns import peak_memory

    with peak_memory("cpu") as peak:
        block = torch.ones(25_000_000)  # 100 MB
        del block
        found = peak()
    if found is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 95 < found < 150


# Models that fail


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ("broken", "model 'broken' from acme 1.0 (acme_broken:Broken) failed to import: ModuleNotFoundError"),
        ("runaway", "0 of 2; 2 diverged; the loss is not finite at step 4 (epoch 2, player model): loss is nan |"),
        ("picky", "RuntimeError: not <these> examples"),
    ],
)
def test_a_model_that_fails_is_a_row_that_says_why(compared, label, why):
    out, result = compared
    assert row(result, label)["outcome"].startswith("0 of 2; ")
    assert "frechet_distance" not in row(result, label)["mean"]
    (line,) = [line for line in (out / "table.md").read_text().splitlines() if f"| {label} | 0 of 2" in line]
    assert why in line


def test_what_is_wrong_with_the_words_is_an_error_before_anything_is_trained(data, acme, tmp_path):
    def refused(kind, match, models=("vae",), **options):
        with pytest.raises(kind, match=match):
            genfuse.compare(models, data, out=tmp_path / "c", **{"budget": "128examples", **options})

    refused(PluginError, "there is no model 'vea'; known: ", ["gan", "vea"])
    refused(SettingsError, "seeds must be at least 1, got 0", seeds=0)
    refused(SettingsError, "a budget is a time", budget="5 minutes")
    refused(SettingsError, "there are settings for 'gan', but it is none of vae", settings={"gan": {"ema": 0}})
    refused(SettingsError, "VAE has no setting 'penalty'", settings={"vae": {"penalty": "r1"}})
    refused(SettingsError, "latent_dim must be at least 1", settings={"vae": {"latent_dim": 0}})
    refused(SettingsError, "'vae' and 'vae' would be one row", ["vae", "vae"])
    refused(SettingsError, "nothing to compare", [])
    refused(SettingsError, "one device at a time; got devices=2", trainer=Trainer(devices=2))
    refused(SettingsError, "features must be one of", features="colours")
    assert not (tmp_path / "c").exists()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").touch()
    refused(RunError, r"exists and is no comparison, as it has no comparison\.json: name another folder")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["thesis.tex"]


# Going on


def test_what_is_done_is_not_done_again_and_seeds_can_be_added(compared, data, tmp_path):
    out = tmp_path / "c"
    shutil.copytree(compared[0], out)
    before, said = changes(out), []
    again = genfuse.compare(
        ["vae", "runaway"], data, out=out, budget="1280examples", seeds=3, settings={"vae": SMALL["vae"]}, limit=50,
        say=said.append,
    )  # fmt: skip
    after = changes(out)
    assert {path: after[path] for path in before} == before
    assert {path.parent.relative_to(out) for path in after.keys() - before.keys()} == {
        Path("vae/seed-2"),
        Path("runaway/seed-2"),
    }
    assert said[:2] == ["vae, seed 0: done before", "vae, seed 1: done before"]
    assert [row["label"] for row in again["rows"]] == [row["label"] for row in compared[1]["rows"]]
    was = json.loads(json.dumps(compared[1]))  # which has no tuples
    assert row(again, "gan") == row(was, "gan")
    assert row(again, "vae")["runs"][:2] == row(was, "vae")["runs"]
    assert row(again, "vae")["outcome"] == "3 of 3"


def test_a_run_that_was_stopped_is_resumed_to_the_same_weights(compared, data, tmp_path, monkeypatch):
    from genfuse._files import read_tensors
    from genfuse.training.loop import Loop

    out = tmp_path / "c"
    options = {"out": out, "budget": "1280examples", "seeds": 1, "settings": {"vae": SMALL["vae"]}, "limit": 50}
    update = Loop._update

    def interrupted(loop, *arguments):
        update(loop, *arguments)
        if loop.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            genfuse.compare(["vae"], data, **options)
    result = genfuse.compare(["vae"], data, **options)
    assert result["rows"][0]["outcome"] == "1 of 1"
    weights, there = (read_tensors(f / "vae/seed-0/model.safetensors")[0] for f in (out, compared[0]))
    assert all(torch.equal(weights[key], there[key]) for key in there)


def test_a_comparison_that_was_stopped_in_its_first_trial_goes_on(data, tmp_path, monkeypatch):
    options = {
        "out": tmp_path / "c",
        "budget": "128examples",
        "seeds": 1,
        "settings": {"vae": SMALL["vae"]},
        "limit": 5,
    }

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    for where in ("_steps_of", "draw"):
        with monkeypatch.context() as patch:
            patch.setattr(f"genfuse.comparison._compare.{where}", stopped)
            with pytest.raises(KeyboardInterrupt):
                genfuse.compare(["vae"], data, **options)
    assert genfuse.compare(["vae"], data, **options)["rows"][0]["outcome"] == "1 of 1"


@pytest.mark.parametrize("path", ["/tmp/elsewhere", "../elsewhere", "vae/../../elsewhere", "vae/seed-1"])
def test_a_comparison_of_a_stranger_cannot_send_a_run_elsewhere(path, compared, data, tmp_path):
    out = tmp_path / "c"
    shutil.copytree(compared[0], out)
    result = json.loads((out / "comparison.json").read_text())
    run = row(result, "vae")["runs"][0]
    run["path"] = path
    del run["figures"], result["sha256"]
    (out / "comparison.json").write_text(json.dumps(result))
    with pytest.raises(RunError, match=rf"run 0 of 'vae' is said to lie in '{path}', .*not in 'vae/seed-0'"):
        genfuse.compare(["vae"], data, out=out, budget="1280examples", settings={"vae": SMALL["vae"]}, limit=50)
    assert {each.name for each in tmp_path.iterdir()} == {"c"}


@pytest.mark.parametrize(
    "name", ["comparison.json", "pictures", "vae", "vae/seed-0", "pictures/real.png", ".report.html.new"]
)
def test_a_link_in_a_comparison_is_refused(name, compared, data, tmp_path):
    out = tmp_path / "c"
    shutil.copytree(compared[0], out)
    path, moved = out / name, tmp_path / "moved"
    if path.exists():
        path.rename(moved)
    path.symlink_to(moved)
    with pytest.raises(RunError, match=f"{path} is a symbolic link"):
        genfuse.compare(["vae"], data, out=out, budget="1280examples", settings={"vae": SMALL["vae"]}, limit=50)


def test_a_comparison_that_was_edited_or_is_another_ones_turn_is_refused(compared, data, tmp_path):
    out = tmp_path / "c"
    shutil.copytree(compared[0], out)
    same = {"out": out, "budget": "1280examples", "settings": {"vae": SMALL["vae"]}, "limit": 50}
    with locked(out), pytest.raises(RunError, match="c is being written to by process"):
        genfuse.compare(["vae"], data, **same)
    file = out / "comparison.json"
    text = file.read_text()
    distance = repr(row(compared[1], "vae")["runs"][0]["figures"]["frechet_distance"])
    file.write_text(text.replace(distance, "0.001"))
    with pytest.raises(RunError, match="is not as genfuse wrote it: it was edited or is damaged"):
        genfuse.compare(["vae"], data, **same)
    for change, said in (
        (lambda c: c.pop("rows"), "it has no 'rows'"),
        (lambda c: c["rows"][0].pop("runs"), "row 0: it has no 'runs'"),
        (lambda c: c["rows"][0]["runs"][0].update(path=3), "row 0, run 0: 'path' is 3"),
        (lambda c: c["rows"][0]["runs"][0]["figures"].update(recall="much"), "'recall' is 'much'"),
        (lambda c: c["options"]["data"].update(class_names=0.5), "'options.data.class_names' is 0.5"),
        (lambda c: c["plugins"].update(mine={"better": "", "from": ""}), "plugins: mine: it has no 'about'"),
        (lambda c: c["rows"][0]["runs"][0]["losses"].update(model=[[0, 1.0]]), "no pair of step and loss"),
        (lambda c: c["rows"][0]["runs"][0].update(losses={"a": [[1]]}), "'losses' has what is no pair"),
        (lambda c: c.update(plugins={"x": {"better": 3}}), "'plugins' is"),
    ):
        changed = json.loads(text)
        change(changed)
        file.write_text(json.dumps(changed))
        with pytest.raises(RunError, match=rf"comparison\.json is no comparison.*{said}"):
            genfuse.compare(["vae"], data, **same)


# Names that look like more


HOSTILE = (
    "[/x]",
    "[red]",
    "a|b",
    "<script>alert(1)</script>",
    "![x](http://x)",
    "`code`",
    "*b*",
    "_c_",
    "\x1b[2J",
    "$x$",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_labels_titles_and_errors_are_shown_as_they_are_and_as_nothing_else(name, compared, capsys):
    from genfuse.comparison import _report

    result = json.loads(json.dumps(compared[1]))
    flow = row(result, "flow")
    flow["label"] = name
    flow["mean"][name] = 0.5
    result["plugins"] = {name: {"better": "lower", "about": name, "from": name}}
    result["options"]["data"]["name"] = result["options"]["about"] = name
    row(result, "picky")["outcome"] = f"0 of 2; {name}"
    visible = plain(name)
    _report.show(result)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert shown.count(visible) >= 3
    text = markdown(result)
    rendered = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    assert not re.search(r"<(script|img|em|strong|a)\b", rendered)
    assert html.unescape(re.sub("<[^>]+>", "", rendered)).count(visible) >= 4
    page = _report.html(result, compared[0], str)
    assert "<script>alert" not in page
    assert html.unescape(page).count(name) >= 4


def test_names_that_are_no_text_do_not_end_a_comparison(compared, tmp_path):
    from genfuse.comparison import _store

    result = json.loads(json.dumps(compared[1]))
    result["options"]["data"]["class_names"] = ["cat", os.fsdecode(b"\xff")]  # of a folder, on Linux
    _store.write(tmp_path, result)
    for name in ("table.md", "report.html"):
        assert r"0 cat, 1 \udcff" in (tmp_path / name).read_text()


def test_another_comparison_in_the_same_folder_is_refused(compared, data):
    out, _ = compared
    same = {"out": out, "budget": "1280examples", "limit": 50}
    with pytest.raises(RunError, match=r"is another comparison \(budget: was .*1280.*, now .*99"):
        genfuse.compare(["vae"], data, **{**same, "budget": "99examples"})
    with pytest.raises(RunError, match=r"training: was .*'batch_size': 128.*, now .*'batch_size': 64"):
        genfuse.compare(["vae"], data, **same, trainer=Trainer(batch_size=64))
    with pytest.raises(RunError, match=r"has 'vae' already, as vae with {'hidden'.*, not as vae with its defaults"):
        genfuse.compare(["vae"], data, **same)


# Runs that exist


def test_runs_that_exist_are_compared_and_left_alone(tmp_path, capsys):
    runs = [tmp_path / name for name in ("a", "b")]
    for run, dim in zip(runs, ("2", "3"), strict=True):
        few = ["--steps", "3", "--no-pictures", "--model.hidden", "16", "--model.latent-dim", dim]
        assert (
            main(["train", "vae", "--data", "toy:moons", "--model.decoder", "gaussian", "--out", str(run), *few]) == 0
        )
    before = {path: path.read_bytes() for run in runs for path in run.rglob("*") if path.is_file()}
    for _ in range(2):  # the second time in the place of the first
        assert main(["compare", *map(str, runs), "--out", str(tmp_path / "c"), "--n", "200", "--limit", "20"]) == 0
    assert before == {path: path.read_bytes() for run in runs for path in run.rglob("*") if path.is_file()}
    result = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert [row["label"] for row in result["rows"]] == list(map(str, runs))
    assert [row["settings"] for row in result["rows"]] == [
        {"hidden": [16], "latent_dim": dim, "decoder": "gaussian"} for dim in (2, 3)
    ], "neither what is usual nor what the data says"
    assert all(row["bound"] == "iwae_bound_50" and "bits_per_dim" not in row["mean"] for row in result["rows"])
    assert (tmp_path / "c" / "pictures" / "real.svg").is_file()
    assert "a run, which is trained already: leave out --seeds" in fails(capsys, "compare", runs[0], "--seeds", "2")
    assert "compare models or runs, not both" in fails(capsys, "compare", runs[0], "vae")


def test_runs_on_different_data_are_refused_with_both_names(compared, tmp_path):
    trainer = Trainer(steps=1, pictures=False, out=tmp_path / "moons")
    moons = genfuse.load_data("toy:moons")
    trainer.fit(genfuse.create("vae", moons, decoder="gaussian", hidden=(8,)), moons)
    first = compared[0] / "vae" / "seed-0"
    with pytest.raises(RunError, match=r"seed-0 was trained on 'few-digits' .*moons on 'toy:moons'"):
        compare_runs([first, tmp_path / "moons"], out=tmp_path / "c")
    assert not (tmp_path / "c").exists()


# The command


def fails(capsys, *args) -> str:
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    return re.sub(r"\s+", " ", capsys.readouterr().err)


def test_the_command_writes_and_prints_the_table(tmp_path, capsys):
    out = tmp_path / "c"
    words = ["compare", "small=vae", "--data", "digits", "--budget", "256examples", "--seeds", "1", "--out", str(out)]
    words += ["--set", "small.hidden=[16, 8]", "small.decoder=categorical", "--limit", "20"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "small, seed 0: training, 2 steps" in shown.err
    assert "Data: digits; 256 examples each." in shown.out
    assert re.search(r"Fréchet.*small +\d.*real +\d", shown.out, re.DOTALL)
    assert Run(out / "small" / "seed-0").config["model"]["settings"]["hidden"] == [16, 8]
    result = json.loads((out / "comparison.json").read_text())
    assert result["rows"][0]["bound"] == "iwae_bound_50"
    assert result["rows"][0]["mean"]["bits_per_dim"] == pytest.approx(
        -result["rows"][0]["mean"]["log_likelihood"] / (64 * np.log(2))
    )
    assert (out / "table.md").read_text() == markdown(result)


def test_the_command_says_what_is_missing_or_misspelt(tmp_path, capsys):
    assert "compare what? genfuse compare MODEL ... --data NAME" in fails(capsys, "compare")
    assert "which data? genfuse compare MODEL ... --data NAME" in fails(capsys, "compare", "vae")
    digits = ["compare", "vae", "--data", "digits", "--out", tmp_path / "c"]
    for word in ("vae=3", "vae.hidden", "hidden=3", "=3"):
        assert f"--set takes MODEL.SETTING=VALUE, as gan.penalty=r1; got '{word}'" in fails(
            capsys, *digits, "--set", word
        )
    assert "the value is not YAML" in fails(capsys, *digits, "--set", "vae.hidden=[1")
    assert "seeds must be at least 1, got 0" in fails(capsys, *digits, "--seeds", "0")
    assert "batch_size must be at least 1, got 0" in fails(capsys, *digits, "--batch-size", "0")
    assert "--limit must be at least 1; got 0" in fails(capsys, *digits, "--limit", "0")
    assert not (tmp_path / "c").exists()


# The page


def test_the_page_holds_everything_and_loads_nothing(compared):
    out, result = compared
    page = (out / "report.html").read_text()
    assert not re.search(r"https?:|//cdn|@import|url\(|<link[^>]+stylesheet|<script[^>]+src", page)
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 4  # real examples, and three models that have samples
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    players = [len(run["losses"]) for row in result["rows"] for run in row["runs"]]
    assert page.count("<polyline") == sum(players) >= 2 * (1 + 2 + 1)
    assert all(
        (f">{measure.about}<" in html.unescape(page)) is (measure.key != "kernel_distance")
        for measure in COLUMNS
        if measure.key in row(result, "flow")["mean"]
    )
    assert "not &lt;these&gt; examples" in page
    assert '<meta name="viewport" content="width=device-width' in page


def test_models_of_few_pictures_are_compared_by_the_kernel_distance(data, tmp_path):
    few = Dataset("few", {part: data.splits[part].some(slice(40)) for part in ("train", "test")}, levels=data.levels)
    result = genfuse.compare(["vae"], few, out=tmp_path / "c", budget="128examples", seeds=1, limit=9)
    page = (tmp_path / "c" / "report.html").read_text()
    assert "Fréchet distance ↓" not in page
    assert f"kernel distance {row(result, 'vae')['mean']['kernel_distance']:.3g}" in page
    assert "failed: " not in page, "a model without a Fréchet distance was called failed"


def test_the_page_shows_warnings_beside_runs_that_are_yet_to_be_trained(compared):
    from genfuse.comparison import _report

    result = json.loads(json.dumps(compared[1]))
    row(result, "gan")["runs"][0]["warnings"] = ["step 7: samples repeat"]
    row(result, "vae")["runs"].append({"seed": 2, "path": "vae/seed-2"})
    assert "<li>gan, seed 0, step 7: samples repeat</li>" in _report.html(result, compared[0], str)


@pytest.fixture(scope="module")
def browser():
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not (driver and chromium):
        skip("chromium", "no chromium and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, compared):
    browser.get((compared[0] / "report.html").as_uri())
    return browser


def column(page, head: str) -> list[tuple[str, str]]:
    """Label and text of a column's cells, from top to bottom."""
    heads = page.execute_script("return [...document.querySelectorAll('thead th:not(.group)')].map(h => h.innerText)")
    (at,) = [i for i, text in enumerate(heads) if text.startswith(head)]
    cells = "[...document.querySelector('tbody').rows].map(r => [0, arguments[0]].map(i => r.cells[i].innerText))"
    return [tuple(of_row) for of_row in page.execute_script(f"return {cells}", at)]


def test_the_table_shows_what_was_found(page, compared):
    _, result = compared
    for key, head in (("frechet_distance", "Fréchet distance"), ("bits_per_dim", "bits/dim"), ("parameters", "param")):
        for label, text in column(page, head):
            value = row(result, label)["mean"].get(key)
            shown = float(text.split("±")[0].replace(",", "")) if value is not None else text
            assert shown == ("–" if value is None else pytest.approx(value, rel=0.01))


def test_a_click_on_a_head_sorts_the_table_and_a_second_one_reverses_it(page, compared):
    from selenium.webdriver.common.by import By

    _, result = compared
    (button,) = [b for b in page.find_elements(By.CSS_SELECTOR, "thead button") if b.text.startswith("Fréchet")]
    distance = {row["label"]: row["mean"].get("frechet_distance") for row in result["rows"]}
    rising = sorted((label for label in distance if distance[label]), key=distance.get)
    for order, direction in ((rising, "ascending"), (rising[::-1], "descending")):
        button.click()
        assert [label for label, _ in column(page, "Fréchet")][:3] == order
        assert {label for label, text in column(page, "Fréchet")[3:] if text == "–"} == {"broken", "runaway", "picky"}
        assert button.find_element(By.XPATH, "..").get_attribute("aria-sort") == direction
    assert page.find_element(By.CSS_SELECTOR, "tfoot").text.startswith("real examples")
    page.find_element(By.CSS_SELECTOR, "thead button").click()
    labels = [label for label, _ in column(page, "Fréchet")]
    assert labels == sorted(MODEL.rpartition("=")[0] or MODEL for MODEL in MODELS)
    assert len(page.find_elements(By.CSS_SELECTOR, "[aria-sort]")) == 1


def test_the_best_of_each_column_is_marked(page, compared):
    _, result = compared
    marked = (
        "[...document.querySelectorAll('tbody td.best')].map(c => [c.cellIndex, c.parentElement.cells[0].innerText])"
    )
    heads = page.execute_script("return [...document.querySelectorAll('thead th:not(.group)')].map(h => h.innerText)")
    best = {}
    for at, label in page.execute_script(f"return {marked}"):
        best.setdefault(heads[at], set()).add(label)
    for key, head, pick in (("frechet_distance", "Fréchet distance", min), ("recall", "recall", max)):
        values = {r["label"]: r["mean"][key] for r in result["rows"] if key in r["mean"]}
        (seen,) = (labels for title, labels in best.items() if title.startswith(head))
        assert seen == {label for label, value in values.items() if value == pick(values.values())}
    assert not [title for title in best if title.startswith(("parameters", "runs"))]  # of which no direction is better


def test_a_loss_that_was_looked_at_once_is_no_line():
    rows = [
        {"label": name, "runs": [{"losses": {"model": [[step, 2.0 / step] for step in range(1, 1 + count)]}}]}
        for name, count in (("short", 1), ("long", 5), ("longer", 9))
    ]
    together = _together(rows)
    assert together is not None
    assert together["names"] == ["long", "longer"]
    assert _together(rows[:2]) is None


def test_where_all_rows_are_equal_none_is_the_best():
    for values, best in (((2.0, 2.0), set()), ((2.0, 1.0), {(COLUMNS[0].key, 1.0)})):
        rows = [Row(f"model {value}", {COLUMNS[0].key: Cell(str(value), value)}) for value in values]
        assert _best(Table([COLUMNS[0]], rows, rows[0])) == best


def test_what_was_compared_names_no_more_classes_than_one_reads():
    named = [f"bird {i}" for i in range(30)]
    options = {"budget": None, "data": {"name": "birds", "class_names": named}, "about": "pixels"}
    line = about({"options": options, "machine": {"genfuse": "1", "torch": "2", "device": "cpu", "threads": 1}})
    assert line.startswith("Data: birds (classes: 0 bird 0, 1 bird 1, ")
    assert "19 bird 19 and 10 more); existing runs" in line


def test_a_click_on_a_group_folds_its_columns_and_a_second_one_unfolds_them(page):
    from selenium.webdriver.common.by import By

    seen = "return [...document.querySelectorAll('tbody tr:first-child td')].filter(c => c.offsetWidth).length"
    whole = page.execute_script(seen)
    group = page.find_element(By.CSS_SELECTOR, "th.group")
    columns = int(group.get_attribute("colspan"))
    button = group.find_element(By.TAG_NAME, "button")
    button.click()
    assert page.execute_script(seen) == whole - columns + 1
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert page.execute_script(seen) == whole


def test_the_page_leads_to_the_runs_and_to_its_pictures(page, compared):
    from selenium.webdriver.common.by import By

    out, result = compared
    hrefs = {a.get_attribute("href").rstrip("/") for a in page.find_elements(By.TAG_NAME, "a")}
    for row in result["rows"]:
        for run in row["runs"]:
            assert (out / run["path"]).as_uri() in hrefs
    assert (out / "pictures" / "real.png").as_uri() in hrefs


def test_losses_of_models_of_one_player_lie_over_each_other_with_ticks(page, compared):
    from selenium.webdriver.common.by import By

    chart = page.find_element(By.CSS_SELECTOR, ".together svg")
    one = [r["label"] for r in compared[1]["rows"] if r["runs"] and len(r["runs"][0].get("losses", ())) == 1]
    assert len(chart.find_elements(By.TAG_NAME, "path")) == len(one) >= 2
    ticks = [text.text for text in chart.find_elements(By.TAG_NAME, "text")]
    assert ticks[-1] == "step"
    assert len(ticks) >= 5


def test_what_compare_returns_shows_the_report_in_a_notebook(compared):
    out, result = compared
    shown = Comparison(result, out)
    assert shown == result
    assert str(out / "report.html") in repr(shown)
    assert html.unescape(shown._repr_html_()).count("<main>") == 1


def test_a_table_of_many_columns_fits_a_terminal_of_80_columns(compared, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show(compared[1])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said


def test_the_page_has_no_error_and_asks_the_network_for_nothing(browser, compared):
    browser.get_log("performance")
    browser.get((compared[0] / "report.html").as_uri())
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]


def test_a_phone_scrolls_the_table_and_not_the_page(page):
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        wide, seen = page.execute_script(
            "const e = document.querySelector('.wide'); return [e.scrollWidth, e.clientWidth]"
        )
        assert wide > seen
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
