import functools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from distributions import write_distribution
from PIL import Image
from required import skip
from safetensors.torch import load_file

import genfuse
from genfuse import plugins
from genfuse.cli import main
from genfuse.cli._commands import COMMANDS
from genfuse.cli._completion import script
from genfuse.cli._families import FAMILIES
from genfuse.cli.train import arguments_of, parse
from genfuse.errors import SettingsError

QUICK = ["--epochs", "1", "--no-pictures", "--device", "cpu", "--model.hidden", "16", "--model.latent-dim", "2"]
GAUSSIAN = [*QUICK, "--model.decoder", "gaussian"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A trained run on images."""
    out = tmp_path_factory.mktemp("runs") / "vae"
    assert main(["train", "vae", "--data", "digits", "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Three columns of very different means and spreads."""
    path = tmp_path_factory.mktemp("data") / "bodies.csv"
    rows = np.random.default_rng(0).normal([170, 70000, 0.5], [10, 9000, 0.01], (400, 3))
    np.savetxt(path, rows, delimiter=",", header="height,mass,share", comments="")
    return path


@pytest.fixture(scope="module")
def table_run(table, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "table"
    assert (
        main(["train", "vae", "--data", f"csv:{table}", "--model.decoder", "gaussian", "--out", str(out), *QUICK]) == 0
    )
    return out


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No classifier that the user has trained, and none that a test leaves behind."""
    monkeypatch.setenv("GENFUSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def acme(tmp_path, monkeypatch) -> Path:
    """A folder on the path, for this process and those it starts, in which distributions can be written."""
    monkeypatch.delenv("GENFUSE_DISABLE_PLUGINS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.discover.cache_clear()
    yield tmp_path
    plugins.discover.cache_clear()


def command(*args: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "genfuse", *map(str, args)], capture_output=True, text=True, timeout=120, **options
    )


def fails(capsys: pytest.CaptureFixture, *args: str | Path) -> str:
    """The one message of a command that exits with 2."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return re.sub(r"\s+", " ", re.sub("[│╭╮╰╯─]", " ", err))


def config(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


# Without a run


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"genfuse {genfuse.__version__}\n"


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in ("list", "train", "sample", "evaluate", "train-features", "doctor"))


def test_no_command_shows_the_usage_and_is_an_error(capsys):
    assert main([]) == 2
    assert "usage: genfuse COMMAND" in capsys.readouterr().err


def test_a_resume_that_had_nothing_to_do_says_so(capsys, run):
    assert main(["train", "--resume", str(run)]) == 0
    assert "nothing was to be done: the run had ended; to train on, ask for more" in capsys.readouterr().out


def test_an_unknown_command_is_answered_with_the_known_ones(capsys):
    assert "no command 'trian'; commands: train, list, plugins, new-plugin, sample" in fails(capsys, "trian")


@pytest.mark.parametrize(
    "name",
    [
        "list",
        "plugins",
        "new-plugin",
        "train",
        "sample",
        "evaluate",
        "train-features",
        "compare",
        "doctor",
        "completion",
    ],
)
def test_every_command_has_help_with_an_example(capsys, name):
    assert main([name, "--help"]) == 0
    assert re.search(rf"example:\n +genfuse {name}\b", capsys.readouterr().out)


def test_list_shows_what_each_name_is_by_family(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"models:\n variational autoencoders\n  vae +encoder and decoder", out)
    assert re.search(r"datasets:\n images\n  digits +1,797 digits", out)
    assert max(map(len, out.splitlines())) <= 80
    assert main(["list", "models"]) == 0
    assert "digits" not in capsys.readouterr().out


def test_each_of_our_plugins_has_its_line_in_a_family():
    for kind, families in FAMILIES.items():
        told = [name for members in families.values() for name in members]
        assert sorted(told) == sorted(p.name for p in plugins.discover(kind) if p.distribution == plugins.OURS)


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["trian"], "did you mean train?"),
        (["train", "vea", "--data", "digits"], "did you mean vae?"),
        (["train", "vae", "--data", "digitz"], "did you mean digits?"),
        (["compare", "vae", "--data", "digits", "--set", "vae.latent_dims=3"], "did you mean latent_dim?"),
    ],
)
def test_what_was_probably_meant_is_told(capsys, args, meant):
    assert meant in fails(capsys, *args)
    assert "did you mean" not in fails(capsys, "xyzzy")


def test_help_is_a_command_too(capsys):
    for typed, asked in ((["help"], ["--help"]), (["help", "sample"], ["sample", "--help"])):
        assert main(typed) == 0
        first = capsys.readouterr().out
        assert main(asked) == 0
        assert capsys.readouterr().out == first


@functools.cache
def completion_of(shell: str) -> str:
    return script(shell, COMMANDS)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("genfuse tr", ["train", "train-features"]),
        ("genfuse train flow", ["flow-matching"]),
        ("genfuse train vae --model.latent", ["--model.latent-dim"]),
        ("genfuse train vae --data bin", ["binarized-mnist"]),
        ("genfuse compare vae --data.fi", ["--data.fit"]),
        ("genfuse sample run --temp", ["--temperature"]),
    ],
)
def test_a_shell_completes_commands_names_and_options(line, words):
    if not shutil.which("bash"):
        skip("bash", "no bash")
    script = completion_of("bash")
    ask = f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _genfuse; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == words


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_what_is_made_for_them(shell):
    if not shutil.which(shell):
        skip(shell, f"no {shell}")
    start = "autoload -U compinit; compinit -u\n" if shell == "zsh" else ""
    done = subprocess.run([shell, "-c", start + completion_of(shell)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("typed", [["16,8"], ["16", "8"], ["16,", "8"]])
def test_a_list_is_typed_with_commas_or_without(typed):
    assert parse("vae", ["--data", "digits", "--model.hidden", *typed]).model["hidden"] == (16, 8)
    assert parse("vae", ["--data", "digits", "--model.hidden", "16"]).model["hidden"] == (16,)


def test_a_list_is_typed_with_commas_in_settings_of_all_kinds():
    data = genfuse.load_data("digits")
    assert genfuse.create("vae", data, hidden="16,8").config.hidden == (16, 8)
    with pytest.raises(SettingsError, match="setting 'hidden' of VAE: got '16;8'"):
        genfuse.create("vae", data, hidden="16;8")


def test_list_shows_what_to_type_where_two_distributions_claim_a_name(capsys, acme):
    for name in ("acme", "zeta"):
        write_distribution(acme, name, "models", {"flow": f"{name}_flow:Flow", "vae": f"{name}_flow:VAE"})
    plugins.discover.cache_clear()
    assert main(["list", "models"]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:] if line.startswith("  ")]
    ours = {"flow", "vae"}
    claimed = [name for name in shown if name.rpartition(":")[2] in ours]
    assert claimed == ["vae", "acme:flow", "zeta:flow", "acme:vae", "zeta:vae"]
    assert "write acme:flow or zeta:flow" in fails(capsys, "train", "flow", "--data", "digits")


def test_list_and_version_import_neither_plugins_nor_torch(acme):
    write_distribution(
        acme, "acme", "models", {"flow": "acme_sick:Flow"}, {"acme_sick": "raise SystemExit('imported')"}
    )
    code = """
import sys
from genfuse.cli import main
assert [main(args) for args in (["list"], ["--version"], ["train", "--help"])] == [0, 0, 0]
print(sorted({"torch", "numpy", "rich", "acme_sick", "genfuse.models"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\n  flow +acme 1\.0 ", done.stdout)
    assert done.stdout.endswith("\n[]\n")


def test_import_costs_no_more_than_torch_and_50_ms():
    def seconds(module: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return time.perf_counter() - start

    pairs = [(seconds("genfuse"), seconds("torch")) for _ in range(3)]
    ours, torchs = (statistics.median(times) for times in zip(*pairs, strict=True))
    assert ours <= torchs + 0.05


def test_ops_import_torch_and_little_else(tmp_path):
    code = """
import gc, sys, time
import torch
gc.disable()  # a collection of PyTorch's objects takes longer, and comes when it comes
start = time.process_time()
import genfuse.ops
extras = "sklearn matplotlib lightning_fabric PIL tensorboard rich tyro yaml typeguard safetensors scipy triton"
print(time.process_time() / start - 1, *(set(extras.split()) & set(sys.modules)))
"""
    # The first compiles the sources, which takes longer than to run them; the others read what it has written.
    cached = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    of = [sys.executable, "-c", code]
    said = [subprocess.run(of, env=cached, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert said[0][1:] == []
    assert min(float(share) for share, *_ in said) <= 0.04  # of PyTorch's own time, which is 1.6 to 2.9% by version


def test_help_of_a_model_imports_no_compiler():
    code = """
import sys
from genfuse.cli import main
main(["train", "ddpm", "--help"])
print(*({"torch._dynamo", "triton", "sympy", "matplotlib", "lightning_fabric"} & set(sys.modules)), file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "\n"


def test_a_training_ends_without_a_list_of_what_triton_leaks(tmp_path):
    pytest.importorskip("triton")
    done = command("train", "vae", "--data", "toy:moons", "--steps", "1", "--out", tmp_path / "run")
    assert "leaked" not in done.stdout + done.stderr


def test_a_reader_that_leaves_early_meets_no_traceback():
    # A pipe whose reading end is closed: what `genfuse list | head -0` leaves.
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-m", "genfuse", "list"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode == 141


# train


def test_help_of_train_breaks_lines_where_the_terminal_ends_alone(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["train", "vae", "--help"]) == 0
    out = capsys.readouterr().out
    assert "auto: the best of a model with one player" in out
    assert "n^(-1/(D + 4)) standard deviations" in out


def test_train_help_lists_the_models(capsys):
    assert main(["train", "--help"]) == 0
    assert re.search(r"models:\n variational autoencoders\n  vae ", capsys.readouterr().out)


def test_help_of_a_model_shows_its_settings_with_meaning_and_default(capsys):
    assert main(["train", "vae", "--help"]) == 0
    out = re.sub(r"\s+", " ", re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out))
    assert "--model.latent-dim INT dimensions of z (default: 20)" in out
    assert "--epochs INT Passes over the training split; left out, as many `steps` as the model" in out
    assert "--steps INT Updates in all" in out
    assert "--keep {auto,last,best} Weights to end with: the last ones, or" in out
    assert "--data NAME What to train on" in out
    assert "--data.binarize {none,static,dynamic}" in out
    assert "example: genfuse train vae --data digits" in out


def test_no_option_of_a_training_lacks_its_meaning(capsys):
    for plugin in plugins.discover("models"):
        assert main(["train", plugins.typed(plugin), "--help"]) == 0
        out = re.sub(r"\s+", " ", re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out))
        assert re.findall(r"--([\w.-]+)(?:, --[\w.-]+| \S+) \((?:default|required)", out) == []


def test_what_the_data_decides_is_no_option(capsys):
    assert main(["train", "vae", "--help"]) == 0
    out = capsys.readouterr().out
    assert not any(f"--model.{name}" in out for name in ("shape", "levels", "classes"))
    assert "--model.levels" in fails(capsys, "train", "vae", "--data", "digits", "--model.levels", "2")


def test_a_run_holds_the_settings_that_were_typed(run):
    was = config(run)
    assert was["model"]["name"] == "vae"
    assert was["model"]["settings"]["hidden"] == [16]
    assert was["model"]["settings"]["latent_dim"] == 2
    assert was["model"]["settings"]["levels"] == 17
    assert (was["data"]["name"], was["training"]["epochs"]) == ("digits", 1)
    assert genfuse.Run(run).model().config.shape == (1, 8, 8)


def test_train_ends_with_where_the_run_is_and_what_to_do_next(capsys, tmp_path):
    quick = [arg for arg in QUICK if arg != "--no-pictures"]
    out = tmp_path / "my run"
    assert main(["train", "vae", "--data", "digits", "--out", str(out), *quick]) == 0
    said, err = capsys.readouterr()
    assert f"run: {out}: 1 epochs, 12 steps" in said
    assert re.search(r"test: model: loss [\d.]+, reconstruction [\d.]+, kl [\d.]+", said)
    assert f"picture: {out}/pictures/samples.png" in said
    assert f"genfuse evaluate '{out}'" in said
    assert err == ""  # no progress bar where there is no terminal


def test_the_best_weights_are_kept_and_named(capsys, tmp_path):
    rows = np.random.default_rng(0).normal(size=(300, 3))
    np.savez(tmp_path / "parts.npz", train=rows[:200], validation=rows[200:250], test=rows[250:])
    out = tmp_path / "run"
    train = ["train", "vae", "--data", f"npz:{tmp_path / 'parts.npz'}", *GAUSSIAN, "--out", str(out)]
    assert main([*train, "--steps", "5", "--keep", "best"]) == 0
    said = capsys.readouterr().out
    assert f"run: {out}: 3 epochs, 5 steps" in said
    assert re.search(r"validation: model: loss", said)
    best = min((e for e in genfuse.Run(out).metrics() if e["split"] == "validation"), key=lambda entry: entry["loss"])
    assert f"kept: the weights of step {best['step']}, with the lowest validation loss, {best['loss']:.5g}" in said
    assert main(["evaluate", str(out), "--samples", "2"]) == 0
    assert list(json.loads((out / "evaluation.json").read_text())) == ["train", "validation", "test", "samples"]
    assert "use keep='last'" in fails(capsys, "train", "gan", "--data", "digits", "--keep", "best", *QUICK)
    assert main(["train", "vae", "--data", "digits", "--patience", "1", "--out", str(out), "--overwrite", *QUICK]) == 0
    assert "'digits' has no validation split: 150 of its training examples" in capsys.readouterr().err
    assert main(["train", "--resume", str(out), "--epochs", "2"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["evaluate", str(out), "--samples", "2", "--n", "0"]) == 0


def test_the_folder_is_named_by_model_and_data_where_it_is_not_given(monkeypatch, tmp_path, table):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.csv").write_bytes(table.read_bytes())
    assert main(["train", "vae", "--data", "csv:a b.csv", *GAUSSIAN]) == 0
    assert (tmp_path / "runs" / "vae-csv-a-b.csv" / "config.json").is_file()


def test_the_seed_decides_the_weights(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(ord(name))
        out = str(tmp_path / name)
        assert main(["train", "vae", "--data", "digits", "--out", out, "--seed", str(seed), *QUICK]) == 0
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_binarize_reaches_the_data(tmp_path):
    out = tmp_path / "run"
    assert main(["train", "vae", "--data", "digits", "--data.binarize", "dynamic", "--out", str(out), *QUICK]) == 0
    assert config(out)["data"]["binarize"] == "dynamic"
    assert config(out)["model"]["settings"]["levels"] == 2


def test_the_seed_of_the_data_decides_the_split_and_is_kept(tmp_path, table):
    for seed in ("0", "3"):
        out = str(tmp_path / seed)
        assert main(["train", "vae", "--data", f"csv:{table}", *GAUSSIAN, "--out", out, "--data.seed", seed]) == 0
        assert main(["evaluate", out, "--samples", "2", "--limit", "10"]) == 0
    a, b = (config(tmp_path / seed)["data"] for seed in ("0", "3"))
    assert (a["seed"], b["seed"]) == (0, 3)
    assert a["fingerprint"] != b["fingerprint"]


def test_an_option_of_the_wrong_type_is_named(capsys):
    assert "--epochs" in fails(capsys, "train", "vae", "--data", "digits", "--epochs", "many")
    assert "--model.network" in fails(capsys, "train", "vae", "--data", "digits", "--model.network", "rnn")
    assert "--data NAME" in fails(capsys, "train", "vae")


def test_an_option_out_of_range_is_named(capsys, tmp_path):
    out = tmp_path / "run"
    said = fails(capsys, "train", "vae", "--data", "digits", "--out", out, "--model.latent-dim", "0")
    assert "latent_dim must be at least 1" in said
    assert "epochs must be at least 1" in fails(
        capsys, "train", "vae", "--data", "digits", "--out", out, "--epochs", "0"
    )
    assert not out.exists()


def test_train_without_a_model_says_how_to_name_one(capsys):
    assert "which model? genfuse train MODEL --data NAME" in fails(capsys, "train", "--data", "digits")
    assert "there is no model 'vea'; known: " in fails(capsys, "train", "vea", "--data", "digits")


@pytest.mark.parametrize("data", ["dogits", "csv:absent.csv", "images:absent"])
def test_data_that_is_not_there_is_one_message_and_no_folder(capsys, tmp_path, data):
    out = tmp_path / "run"
    said = fails(capsys, "train", "vae", "--data", data, "--out", out, *QUICK)
    assert said.startswith("genfuse: error: ")
    assert data.rpartition(":")[2] in said
    assert not out.exists()


def test_debug_shows_the_traceback_wherever_it_stands(capsys):
    for args in (["--debug", "train", "vae", "--data", "dogits"], ["train", "vae", "--debug", "--data", "dogits"]):
        assert main(args) == 2
        assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_broken_plugin_fails_its_own_user_alone(capsys, acme, tmp_path):
    write_distribution(acme, "acme", "models", {"flow": "acme_sick:Flow"}, {"acme_sick": "import nowhere_at_all"})
    plugins.discover.cache_clear()
    said = fails(capsys, "train", "flow", "--data", "digits")
    assert "acme 1.0 (acme_sick:Flow) failed to import: ModuleNotFoundError" in said
    assert main(["train", "vae", "--data", "digits", "--out", str(tmp_path / "run"), *QUICK]) == 0


def test_a_model_without_settings_is_a_plugin_error(capsys, acme):
    source = "from genfuse.models import GenerativeModel\nclass Flow(GenerativeModel): pass"
    write_distribution(acme, "acme", "models", {"flow": "acme_bare:Flow"}, {"acme_bare": source})
    plugins.discover.cache_clear()
    assert "acme 1.0 (acme_bare:Flow) has no dataclass of settings" in fails(
        capsys, "train", "flow", "--data", "digits"
    )


def test_a_model_of_another_distribution_brings_its_own_options(capsys, acme, tmp_path):
    source = """
from dataclasses import dataclass
import torch
from genfuse.models import GenerativeModel

@dataclass(frozen=True)
class Config:
    shape: tuple[int, ...] = (2,)
    width: float = 1.0  # of the bell
    sharp: bool = False  # whether it is sharp

class Bell(GenerativeModel):
    Config = Config
    def __init__(self, config):
        super().__init__(config)
        self.mean = torch.nn.Parameter(torch.zeros(config.shape))
    def loss(self, batch, player):
        total = ((batch.x - self.mean) ** 2).flatten(1).sum(1).mean() / self.config.width**2
        return total, {"distance": total}
    def sample(self, n, *, generator=None):
        noise = torch.randn(n, *self.config.shape, generator=generator, device=self.device)
        return self.mean + self.config.width * noise
"""
    write_distribution(acme, "acme", "models", {"bell": "acme_bell:Bell"}, {"acme_bell": source})
    plugins.discover.cache_clear()
    assert main(["train", "bell", "--help"]) == 0
    assert re.search(r"--model.width FLOAT\W+of the bell \(default: 1.0\)", capsys.readouterr().out)
    out = tmp_path / "run"
    train = ["train", "bell", "--data", "toy:moons", "--out", str(out), "--epochs", "1", "--no-pictures"]
    assert main([*train, "--model.width", "3", "--model.sharp"]) == 0
    assert config(out)["model"] == {"name": "bell", "settings": {"shape": [2], "width": 3.0, "sharp": True}}
    assert main(["sample", str(out), "--out", str(out / "x.npy"), "--n", "5"]) == 0
    assert np.load(out / "x.npy").shape == (5, 2)
    assert main(["train", "--config", str(out / "config.json"), "--out", str(out), "--overwrite"]) == 0
    assert config(out)["model"]["settings"]["sharp"] is True


# --config


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_file_gives_options_and_the_command_line_wins(tmp_path, suffix):
    settings = {
        "data": {"name": "digits", "binarize": "static", "seed": 3},
        "epochs": 1,
        "lr": 0.002,
        "pictures": False,
        "grad-clip": None,
        "model": {"hidden": [8, 4], "latent_dim": 3, "beta": 2},
    }
    file = tmp_path / f"settings{suffix}"
    file.write_text(json.dumps(settings) if suffix == ".json" else yaml.safe_dump(settings))
    out = tmp_path / "run"
    assert main(["train", "vae", "--config", str(file), "--model.latent-dim", "5", "--out", str(out)]) == 0
    was = config(out)
    assert was["model"]["settings"]["hidden"] == [8, 4]
    assert was["model"]["settings"]["latent_dim"] == 5
    assert was["model"]["settings"]["beta"] == 2.0
    assert (was["training"]["lr"], was["training"]["grad_clip"]) == (0.002, None)
    assert was["data"]["binarize"] == "static"
    assert not (out / "pictures").exists()


def test_a_file_may_name_model_and_data(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(f"model: vae\ndata: digits\nout: {tmp_path / 'run'}\n")
    assert main(["train", f"--config={file}", *QUICK]) == 0
    assert config(tmp_path / "run")["model"]["name"] == "vae"


def test_a_model_on_the_command_line_must_be_that_of_the_file(capsys, acme):
    write_distribution(acme, "acme", "models", {"flow": "acme_flow:Flow"})
    plugins.discover.cache_clear()
    file = acme / "settings.yaml"
    file.write_text("model: vae\n")
    assert "'flow' on the command line, but 'vae' in" in fails(capsys, "train", "flow", "--config", file)


def test_the_config_of_a_run_trains_another_like_it(run, tmp_path):
    assert main(["train", "--config", str(run / "config.json"), "--out", str(tmp_path / "again")]) == 0
    assert config(tmp_path / "again") == config(run)
    a, b = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "again"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch: 3", "there is no option 'epoch'"),
        ("model: {latent: 3}", "there is no option 'model.latent'"),
        ("model: {shape: [1, 8, 8]}", "there is no option 'model.shape'"),
        ("data: {name: digits, path: x}", "there is no option 'data.path'"),
        ("resume: true", "there is no option 'resume'"),
        ("1: 2", "there is no option 1"),
        ("epochs: [", "is not YAML"),
        ("[" * 100_000, "is not YAML: it is nested too deeply"),
        ("epochs: &a 3\nsteps: *a", "aliases (*name) are not read"),
        ("epochs: 1:30", "--epochs 1:30"),  # which YAML 1.1 takes for 90
        ("model: [a]", "model must be a name or options by name; it is ['a']"),
        ("data: {name: [a]}", "data must be a name or options by name"),
        ("- epochs", "must hold options by name"),
        ("epochs: many", "--epochs many"),
        ("model: {latent-dim: 1.5}", "--model.latent-dim 1.5"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(capsys, tmp_path, text, said):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    message = fails(capsys, "train", "vae", "--data", "digits", "--config", file)
    assert said in message
    assert str(file) in message


def test_a_file_that_is_not_there_or_no_text_is_named(capsys, tmp_path):
    assert "absent.yaml" in fails(capsys, "train", "vae", "--config", tmp_path / "absent.yaml")
    (tmp_path / "noise.json").write_bytes(b"\xff\xfe\x00")
    assert "noise.json is not JSON" in fails(capsys, "train", "vae", "--config", tmp_path / "noise.json")


def test_numbers_are_read_as_people_mean_them(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("epochs: 010\nlr: 1_0.5e-3\nbatch_size: 0x10\npictures: no\n")  # by YAML 1.1 8 epochs
    arguments = arguments_of("vae", file)
    assert arguments == ["--epochs", "010", "--lr", "0.0105", "--batch-size", "16", "--no-pictures"]


# --out, --overwrite, --resume


def test_an_existing_folder_is_refused_and_left_alone(capsys, run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert "exists" in fails(capsys, "train", "vae", "--data", "digits", "--out", run, *QUICK)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_overwrite_replaces_a_run(tmp_path):
    out = str(tmp_path / "run")
    assert main(["train", "vae", "--data", "digits", "--out", out, *QUICK]) == 0
    assert main(["train", "vae", "--data", "digits", "--out", out, *QUICK, "--overwrite", "--batch-size", "64"]) == 0
    assert config(tmp_path / "run")["training"]["batch_size"] == 64


def test_resume_needs_nothing_but_the_run_and_ends_as_if_never_stopped(tmp_path):
    train = ["train", "vae", "--data", "digits", *QUICK]
    assert main([*train, "--out", str(tmp_path / "a"), "--epochs", "3"]) == 0
    assert main([*train, "--out", str(tmp_path / "b"), "--epochs", "1"]) == 0
    assert main(["train", "--resume", str(tmp_path / "b"), "--epochs", "3"]) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert config(tmp_path / "b")["training"]["epochs"] == 3


def test_resume_refuses_other_settings(capsys, run):
    said = fails(capsys, "train", "vae", "--resume", run, "--model.latent-dim", "3")
    assert "latent_dim: was 2, now 3" in said
    assert "batch_size: was 128, now 64" in fails(capsys, "train", "--resume", run, "--batch-size", "64")
    assert "leave out --out elsewhere" in fails(capsys, "train", "--resume", run, "--out", "elsewhere")
    assert "absent" in fails(capsys, "train", "--resume", run / "absent")


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "genfuse",
            "train",
            "vae",
            "--data",
            "digits",
            "--out",
            out,
            *QUICK,
            "--epochs",
            "100000",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while not ((out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    match = re.fullmatch(rf"genfuse: interrupted; saved in {out}; to continue: genfuse (train --resume {out})\n", err)
    assert match, err
    epoch = genfuse.Run(out).metrics()[-1]["epoch"]
    assert main([*match[1].split(), "--epochs", str(epoch + 1)]) == 0
    assert genfuse.Run(out).metrics()[-1]["epoch"] == epoch + 1


# sample


def test_samples_are_arrays_of_the_shape_of_the_data(run, tmp_path):
    for name in ("x.npy", "x.npz"):
        assert main(["sample", str(run), "--n", "3", "--out", str(tmp_path / "new" / name)]) == 0
    x = np.load(tmp_path / "new" / "x.npy")
    assert x.shape == (3, 1, 8, 8)
    assert 0 <= x.min() <= x.max() <= 1
    assert np.array_equal(np.load(tmp_path / "new" / "x.npz")["x"], x)


def test_samples_follow_the_seed(run, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = str(tmp_path / f"{name}.npy")
        assert main(["sample", str(run), "--n", "1030", "--seed", str(seed), "--out", out]) == 0
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    assert len(a) == 1030
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert not np.array_equal(a[:6], a[1024:])


def test_samples_of_images_are_a_grid(run, tmp_path):
    assert main(["sample", str(run), "--n", "9", "--out", str(tmp_path / "grid.png")]) == 0
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width == image.height > 3 * 8


def test_samples_of_a_table_are_in_its_units(capsys, table_run, tmp_path):
    assert main(["sample", str(table_run), "--n", "2000", "--out", str(tmp_path / "x.npz")]) == 0
    with np.load(tmp_path / "x.npz") as file:
        assert list(file["names"]) == ["height", "mass", "share"]
        assert np.allclose(file["x"].mean(0), [170, 70000, 0.5], rtol=0.05)
    said = fails(capsys, "sample", table_run, "--out", tmp_path / "x.png")
    assert "examples of shape (3,): use --out" in said
    assert not (tmp_path / "x.png").exists()


FLOW = """
from dataclasses import dataclass
import torch
from genfuse.models import GenerativeModel

@dataclass(frozen=True)
class Config:
    shape: tuple[int, ...] = (2,)
    classes: int | None = None
    conditional: bool = False  # whether it takes labels

class Flow(GenerativeModel):
    Config = Config
    def __init__(self, config):
        super().__init__(config)
        self.mean = torch.nn.Parameter(torch.zeros(config.shape))
    def loss(self, batch, player):
        return -self.log_prob(batch.x, batch.y if self.conditional else None).mean(), {}
    def log_prob(self, x, y=None):
        return -0.5 * ((x - self.mean) ** 2).sum(1)
    def sample(self, n, *, y=None, temperature=1.0, generator=None):
        noise = temperature * torch.randn(n, *self.config.shape, generator=generator, device=self.device)
        return noise if y is None else noise + 10 * y[:, None]
"""


@pytest.fixture
def flow(acme) -> Path:
    """A package with a model whose samples take temperature and labels."""
    write_distribution(acme, "acme", "models", {"flow": "acme_flow:Flow"}, {"acme_flow": FLOW})
    plugins.discover.cache_clear()
    return acme


TRAIN_FLOW = ["train", "flow", "--data", "toy:moons", "--steps", "2", "--no-pictures", "--device", "cpu"]


def test_samples_take_a_temperature_and_a_label(capsys, flow, monkeypatch):
    monkeypatch.chdir(flow)
    drawn = []
    monkeypatch.setattr("genfuse.plots.scatter", lambda x, *args: drawn.append(x))
    assert main([*TRAIN_FLOW, "--out", "run", "--model.conditional"]) == 0
    assert main(["sample", "run", "--n", "2000", "--out", "any.npz", "--temperature", "0.5"]) == 0
    with np.load("any.npz") as file:
        x, y = file["x"], file["y"]
    assert sorted(set(y.tolist())) == [0, 1]
    assert y.mean() == pytest.approx(0.5, abs=0.05)
    assert (x - 10 * y[:, None]).std() == pytest.approx(0.5, rel=0.05)
    assert main(["sample", "run", "--n", "2000", "--out", "one.npy", "--label", "1"]) == 0
    assert np.load("one.npy").mean(0) == pytest.approx([10, 10], abs=0.1)
    assert main(["sample", "run", "--n", "2000", "--out", "one.png", "--label", "1"]) == 0
    test = genfuse.load_data("toy:moons").splits["test"]
    assert torch.equal(drawn[0], test.x[test.y == 1])  # the samples stand beside examples of their own label
    assert "--label must be one of 0..1; got 2" in fails(capsys, "sample", "run", "--out", "x.npy", "--label", "2")
    assert "got -1" in fails(capsys, "sample", "run", "--out", "x.npy", "--label", "-1")
    assert main(["evaluate", "run", "--limit", "50", "--n", "50"]) == 0
    assert "log prob" in capsys.readouterr().out


def test_temperature_and_label_are_refused_where_they_have_no_meaning(capsys, flow, run, monkeypatch):
    monkeypatch.chdir(flow)
    assert main([*TRAIN_FLOW, "--out", "plain"]) == 0
    for temperature in ("0", "-1", "nan", "inf"):
        said = fails(capsys, "sample", "plain", "--out", "x.npy", "--temperature", temperature)
        assert "--temperature must be above 0 and finite; got" in said
    assert "a Flow, was trained without labels" in fails(capsys, "sample", "plain", "--out", "x.npy", "--label", "0")
    assert "a VAE, takes none" in fails(capsys, "sample", run, "--out", "x.npy", "--temperature", "0.5")
    assert "a VAE, was trained without labels" in fails(capsys, "sample", run, "--out", "x.npy", "--label", "0")
    assert not Path("x.npy").exists()
    assert "needs labels, but the data set 'toy:checkerboard' has none" in fails(
        capsys, "train", "flow", "--data", "toy:checkerboard", "--model.conditional", "--out", "bare"
    )
    assert not Path("bare").exists()


def test_samples_take_a_sampler_and_the_first_of_many_are_the_few(capsys, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--model.hidden", "8", "--model.conditional"]
    train = ["train", "edm", "--data", "toy:moons", "--steps", "2", "--no-pictures", "--device", "cpu", *small]
    assert main([*train, "--out", "edm"]) == 0
    options = ["--sampler", "ddim", "--steps", "3", "--guidance", "1.5"]
    for n in (100, 200, 1100):
        assert main(["sample", "edm", "--n", str(n), "--out", f"{n}.npz", *options]) == 0
    few, more, many = (dict(np.load(f"{n}.npz")) for n in (100, 200, 1100))
    for part in ("x", "y"):
        np.testing.assert_allclose(few[part], more[part][:100], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(more[part], many[part][:200], rtol=1e-4, atol=1e-5)
    assert main(["sample", "edm", "--n", "100", "--out", "plain.npz"]) == 0
    assert not np.allclose(dict(np.load("plain.npz"))["x"], few["x"], atol=1e-3)
    assert "sampler must be one of ancestral" in fails(capsys, "sample", "edm", "--out", "x.npy", "--sampler", "euler")
    assert "--steps: the model of" in fails(capsys, "sample", run, "--out", "x.npy", "--steps", "5")


def test_samples_in_two_dimensions_are_points(tmp_path):
    assert main(["train", "vae", "--data", "toy:moons", *GAUSSIAN, "--out", str(tmp_path / "run")]) == 0
    assert main(["sample", str(tmp_path / "run"), "--n", "100", "--out", str(tmp_path / "points.png")]) == 0
    with Image.open(tmp_path / "points.png") as image:
        assert image.width > image.height > 100


def test_sample_overwrites_nothing_unasked(capsys, run, tmp_path):
    out = tmp_path / "x.npy"
    out.write_text("mine")
    assert "exists: name another file, or pass --overwrite" in fails(capsys, "sample", run, "--out", out)
    assert out.read_text() == "mine"
    assert main(["sample", str(run), "--out", str(out), "--overwrite"]) == 0
    assert len(np.load(out)) == 64


def test_what_sample_cannot_do_is_said(capsys, run, tmp_path):
    assert "--out must end in .png, .npy or .npz; got x.jpg; of tables in .csv, too" in fails(
        capsys, "sample", run, "--out", "x.jpg"
    )
    assert "--n must be at least 1; got 0" in fails(capsys, "sample", run, "--out", "x.png", "--n", "0")
    assert "--device must be" in fails(capsys, "sample", run, "--out", "x.png", "--device", "abacus")
    assert "there is no run folder" in fails(capsys, "sample", tmp_path / "absent", "--out", "x.png")
    assert "not a run folder, or half of one" in fails(capsys, "sample", tmp_path, "--out", "x.png")


def test_a_run_of_another_version_is_refused(capsys, run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**config(run), "version": 99}))
    assert "is of version 99" in fails(capsys, "evaluate", tmp_path)


# evaluate


def test_evaluate_prints_a_table_and_writes_what_it_measured(capsys, run, tmp_path):
    capsys.readouterr()
    evaluate = ["evaluate", str(run), "--samples", "5", "--limit", "100"]
    assert main([*evaluate, "--json", str(tmp_path / "numbers.json")]) == 0
    out = capsys.readouterr().out
    result = json.loads((run / "evaluation.json").read_text())
    assert json.loads((tmp_path / "numbers.json").read_text()) == result
    for split in ("train", "test"):
        measured = result[split]
        assert measured["examples"] == 100
        assert measured["elbo"] <= measured["iwae_bound_5"] + 0.1 < 0  # each is an estimate from other draws
        assert sum(measured["kl_per_dimension"]) == pytest.approx(measured["kl"])
        assert 0 <= measured["active_units"] <= 2
        assert f"{measured['elbo']:.5g}" in out
        assert f"{split}, largest first: {max(measured['kl_per_dimension']):.2f}" in out
    assert main(evaluate) == 0
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert "exists" in fails(capsys, *evaluate, "--json", tmp_path / "numbers.json")


def evaluated(run: Path, *options: str) -> dict:
    assert main(["evaluate", str(run), "--samples", "1", "--limit", "10", *options]) == 0
    return json.loads((run / "evaluation.json").read_text())


def test_evaluate_shows_samples_beside_real_examples(capsys, run, tmp_path):
    capsys.readouterr()
    found = evaluated(run, "--pictures", str(tmp_path / "drawn"))["samples"]
    out = capsys.readouterr().out
    assert (found["features"], found["n"]) == ("random-conv", 297)
    assert "features: random-conv: 64 features of a convolution network with random weights, not trained" in out
    for name, value in found["samples"].items():
        numbers = (re.escape(f"{of:.5g}") for of in (value, found["real"][name]))
        row = " +│ +".join([name.replace("_", " "), *numbers])
        assert re.search(row, out)
    assert found["real"]["frechet_distance"] < found["samples"]["frechet_distance"]
    with Image.open(tmp_path / "drawn" / "neighbours.png") as picture:
        assert picture.size[1] > picture.size[0] > 500
    again = evaluated(run, "--n", "100", "--seed", "1", "--features", "pixels")["samples"]
    assert (again["features"], again["dimensions"], again["n"]) == ("pixels", 64, 100)
    assert (run / "pictures" / "neighbours.png").is_file()
    assert "samples" not in evaluated(run, "--n", "0")


def test_features_of_a_classifier_are_trained_by_a_command_of_their_own(capsys, run):
    said = fails(capsys, "evaluate", run, "--features", "classifier")
    assert "no classifier of 'digits'" in said
    assert "train one, by `genfuse train-features digits`" in said
    command = ["train-features", "digits", "--steps", "200", "--device", "cpu"]
    assert main(command) == 0
    path, accuracy = capsys.readouterr().out.splitlines()
    assert Path(path).is_file()
    assert float(re.match(r"held-out accuracy: ([\d.]+)% of 297 examples", accuracy)[1]) > 80
    assert "ask for overwrite to replace it" in fails(capsys, *command)
    assert main([*command, "--overwrite"]) == 0
    assert evaluated(run)["samples"]["features"] == "classifier"
    assert evaluated(run, "--features", "random-conv")["samples"]["features"] == "random-conv"


def test_features_can_come_from_a_file(capsys, run, tmp_path):
    class Detector(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float32)[:, 0, 3].flatten(1)

    torch.jit.script(Detector()).save(str(tmp_path / "detector.pt"))
    found = evaluated(run, "--features", "inception", "--inception-weights", str(tmp_path / "detector.pt"))["samples"]
    assert (found["features"], found["dimensions"]) == ("inception", 8)
    assert "--inception-weights FILE: a TorchScript InceptionV3" in fails(
        capsys, "evaluate", run, "--features", "inception"
    )


def test_samples_of_a_table_are_compared_by_its_columns(capsys, table_run):
    found = evaluated(table_run)["samples"]
    assert (found["features"], found["dimensions"], found["n"]) == ("columns", 3, 80)
    assert "columns: the columns themselves, standardized" in capsys.readouterr().out
    assert not (table_run / "pictures").exists()
    assert "are of images, but the data set" in fails(capsys, "evaluate", table_run, "--features", "pixels")


def test_what_evaluate_cannot_compare_is_said_and_nothing_is_written(capsys, run, table, tmp_path):
    before = (run / "evaluation.json").read_bytes()
    for options, said in (
        (["--features", "vgg"], "features must be one of auto, columns, pixels, random-conv, classifier, inception"),
        (["--n", "20"], "Fréchet distance: at least 65 samples are needed"),
        (["--n", "298"], "n must be in 1..297"),
    ):
        assert said in fails(capsys, "evaluate", run, *options)
    assert (run / "evaluation.json").read_bytes() == before
    assert "a classifier needs labels, and there are none" in fails(capsys, "train-features", f"csv:{table}")
    assert "--steps" in fails(capsys, "train-features", "digits", "--steps", "many")


def test_evaluate_takes_data_that_has_moved(capsys, table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_bytes(table.read_bytes())
    assert main(["train", "vae", "--data", "csv:a.csv", *GAUSSIAN, "--out", "run"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluate = ["evaluate", "../run", "--limit", "5", "--samples", "2", "--n", "0"]
    assert main(evaluate) == 0
    Path("../a.csv").rename("b.csv")
    assert "if that has moved, say where it is, by --data or --data-root" in fails(capsys, *evaluate)
    assert main([*evaluate, "--data", "csv:b.csv"]) == 0
    assert main(["train", "--resume", "../run", "--data", "csv:b.csv", "--epochs", "2"]) == 0
    assert main(evaluate) == 0  # where the run has seen them last


def test_names_in_tables_are_shown_as_they_are(capsys):
    from genfuse.cli._evaluate import _print_evaluation, _print_samples

    _print_evaluation({"[/x]": {"[/y]": 0.5, "[bold]z": 3, "per [/a]": [0.5, 1.0]}})
    figures = {"n": 3, "features": "[/f]", "about": "\x1b[2J", "samples": {"[/m]": 0.25}, "real": {}}
    _print_samples({**figures, "left_out": {"x": "[/why]"}})
    out = capsys.readouterr().out
    for name in ("[/x]", "[/y]", "[bold]z", "per [/a]", "[/f]", "\\x1b[2J", "[/m]", "[/why]"):
        assert name in out


def test_evaluate_refuses_data_that_has_changed(capsys, table, tmp_path):
    moved = tmp_path / "table.csv"
    moved.write_bytes(table.read_bytes())
    out = tmp_path / "run"
    assert main(["train", "vae", "--data", f"csv:{moved}", *GAUSSIAN, "--out", str(out)]) == 0
    moved.write_text(moved.read_text().replace("\n1", "\n2"))
    assert "is not what the run" in fails(capsys, "evaluate", out)
    assert not (out / "evaluation.json").exists()


def test_other_data_is_measured_as_the_runs_own_and_leaves_its_evaluation_alone(capsys, table, table_run, tmp_path):
    rows = np.loadtxt(table, delimiter=",", skiprows=1)[:50]
    other = tmp_path / "other.csv"
    np.savetxt(
        other, np.column_stack([np.arange(50) % 2, rows]), delimiter=",", header="odd,height,mass,share", comments=""
    )
    before = (table_run / "evaluation.json").exists()
    options = ["--data", str(other), "--samples", "2", "--n", "40", "--json", str(tmp_path / "other.json")]
    assert main(["evaluate", str(table_run), *options]) == 0
    assert "evaluation.json stays as it is" in capsys.readouterr().out
    measured = json.loads((tmp_path / "other.json").read_text())
    assert measured["test"]["examples"] == 50
    assert measured["samples"]["n"] == 40
    assert (table_run / "evaluation.json").exists() == before
    labelled = ["evaluate", str(table_run), "--data", str(other), "--labels", "odd", "--pictures", str(tmp_path)]
    assert main([*labelled, "--json", str(tmp_path / "odd.json")]) == 0
    assert 0.3 < json.loads((tmp_path / "odd.json").read_text())["auroc"] < 0.7
    assert Image.open(tmp_path / "detection.png").size[0] > 1000
    assert "name those too" in fails(capsys, "evaluate", table_run, "--labels", "odd")
    assert "has no labels 'even'" in fails(capsys, "evaluate", table_run, "--data", other, "--labels", "even")


@pytest.mark.parametrize(
    ("verb", "suffixes", "header"),
    [
        ("score", ["csv", "npy"], "row,score,column_1,weight_1,column_2,weight_2,column_3,weight_3"),
        ("encode", ["csv", "npy", "png"], "z1,z2"),
        ("reconstruct", ["csv", "npy"], "height,mass,share"),
        ("interpolate", ["csv", "npy"], "height,mass,share"),
    ],
)
def test_results_are_written_by_the_suffix(verb, suffixes, header, capsys, table, table_run, run, tmp_path):
    for suffix in suffixes:
        out = tmp_path / f"out.{suffix}"
        assert main([verb, str(table_run), str(table), "--out", str(out)]) == 0
        assert f"written: {out}" in capsys.readouterr().out
        assert f"{out} exists: name another file, or pass --overwrite" in fails(
            capsys, verb, table_run, table, "--out", out
        )
    assert (tmp_path / "out.csv").read_text().splitlines()[0] == header
    assert np.isfinite(np.load(tmp_path / "out.npy")).all()
    assert "--out must end in" in fails(capsys, verb, table_run, table, "--out", tmp_path / "out.xyz")
    if verb in ("reconstruct", "interpolate"):
        assert main([verb, str(run), "digits", "--out", str(tmp_path / "images.png")]) == 0
        assert Image.open(tmp_path / "images.png").size[0] > 300
        assert "--out must end in .csv or .npy" in fails(capsys, verb, table_run, table, "--out", tmp_path / "out.png")
    assert "images, and the run" in fails(capsys, verb, table_run, "digits", "--out", tmp_path / "other.npy")


def test_a_training_begins_with_the_weights_of_another(capsys, run, table, tmp_path):
    out = tmp_path / "finer"
    start = ["train", "--from", str(run), "--out", str(out), "--steps", "1", "--lr", "1e-9", "--no-pictures"]
    assert main([*start, "--data.seed", "1"]) == 0
    assert f"begins with the weights of {run}, step" in capsys.readouterr().out
    pairs = zip(*(genfuse.Run(each).model().parameters() for each in (run, out)), strict=True)
    assert all(torch.allclose(before, after, atol=1e-6) for before, after in pairs)
    assert "model latent_dim: was 2, now 3" in fails(capsys, *start, "--overwrite", "--model.latent-dim", "3")
    assert "model shape: was [1, 8, 8], now [3]" in fails(
        capsys, *start, "--overwrite", "--data", f"csv:{table}", "--model.decoder", "gaussian"
    )
    assert "give one of them" in fails(capsys, "train", "--from", run, "--resume", run)


def test_an_export_says_what_it_wrote_or_what_the_model_lacks(capsys, run, tmp_path):
    assert main(["export", str(run), "--out", str(tmp_path / "m.pt2"), "--verbs", "decode"]) == 0
    assert f"written: {tmp_path / 'm-decode.pt2'}" in capsys.readouterr().out
    for options, message in (
        (["--out", tmp_path / "m.pt2", "--verbs", "decode"], "exists: name another file, or pass --overwrite"),
        (
            ["--out", tmp_path / "m.pt2", "--verbs", "log_prob"],
            "a VAE has no log_prob that could be exported; it has: encode",
        ),
        (["--out", tmp_path / "m.bin"], "--out must end in .pt2 or .onnx"),
    ):
        assert message in fails(capsys, "export", run, *options)


def test_the_installed_command_does_all_of_it(tmp_path):
    out = tmp_path / "run"
    done = command("train", "vae", "--data", "digits", "--out", out, *QUICK)
    assert (done.returncode, done.stderr) == (0, "")
    refused = command("train", "vae", "--data", "digits", "--out", out, *QUICK)
    assert refused.returncode == 2
    assert refused.stderr.startswith("genfuse: error: ")
    assert refused.stdout == ""


# Names of classes, and tables as others write them


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Pictures in folders 1, 2, 10: all dark, middling or bright."""
    root = tmp_path_factory.mktemp("folders")
    for shade, name in ((10, "1"), (120, "2"), (240, "10")):
        (root / name).mkdir()
        for i in range(20):
            Image.fromarray(np.full((8, 8), shade + i % 3, np.uint8)).save(root / name / f"{i}.png")
    return root


def test_samples_of_a_class_are_asked_for_by_its_name(capsys, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ["train", "gan", "--data", f"images:{folders}", "--out", "run", "--steps", "2", "--no-pictures"]
    assert main([*train, "--device", "cpu", "--model.conditional", "--model.hidden", "8"]) == 0
    assert config(Path("run"))["data"]["class_names"] == ["1", "2", "10"]
    assert genfuse.Run("run").class_names == ("1", "2", "10")
    assert main(["sample", "run", "--n", "4", "--out", "ten.npz", "--label", "10"]) == 0
    with np.load("ten.npz") as drawn:
        assert drawn["y"].tolist() == [2] * 4
        assert drawn["class_names"].tolist() == ["1", "2", "10"]
    assert main(["sample", "run", "--n", "4", "--out", "one.npz", "--label", "1"]) == 0
    with np.load("one.npz") as drawn:
        assert drawn["y"].tolist() == [0] * 4
    said = fails(capsys, "sample", "run", "--out", "x.npy", "--label", "0")
    assert "--label must be one of 1, 2, 10; got 0" in said  # and not class 1, whose label is 0


def test_codes_are_drawn_with_the_names_of_classes(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr("genfuse.plots.latent_space", lambda z, y, path, title, names: drawn.append((len(z), names)))
    train = ["train", "vae", "--data", f"images:{folders}", "--out", "run", "--steps", "1", "--no-pictures"]
    assert main([*train, "--device", "cpu", "--model.hidden", "8"]) == 0
    assert main(["encode", "run", str(folders), "--out", "codes.png"]) == 0
    assert drawn == [(60, ("1", "2", "10"))]


def test_a_run_remembers_how_its_table_is_read(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).normal(size=(60, 2))
    text = "2000;2010\n" + "".join(f"{a:.4f};{b:.4f}\n" for a, b in rows).replace(".", ",")
    Path("t.csv").write_text(text)
    train = ["train", "vae", "--data", "csv:t.csv", "--out", "run", *GAUSSIAN]
    assert "separated by semicolons? --data.delimiter ';' --data.decimal ," in fails(capsys, *train)
    marks = ["--data.delimiter", ";", "--data.decimal", ","]
    assert "may be names of columns or the first example: say which by --data.header yes or no" in fails(
        capsys, *train, *marks
    )
    assert main([*train, *marks, "--data.header", "yes"]) == 0
    assert config(Path("run"))["data"]["options"] == {"header": "yes", "delimiter": ";", "decimal": ","}
    assert main(["train", "--resume", "run", "--epochs", "2"]) == 0
    assert main(["evaluate", "run", "--samples", "2", "--n", "0"]) == 0
    assert main(["sample", "run", "--n", "3", "--out", "x.npz"]) == 0
    with np.load("x.npz") as drawn:
        assert drawn["names"].tolist() == ["2000", "2010"]


def test_what_is_left_out_of_the_data_is_one_line_of_warning(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).normal(size=(60, 2))
    Path("t.csv").write_text(",a,b\n" + "".join(f"{i},{a:.4f},{b:.4f}\n" for i, (a, b) in enumerate(rows)))
    assert main(["train", "vae", "--data", "csv:t.csv", "--out", "run", *GAUSSIAN]) == 0
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("genfuse: warning: t.csv: the first column, without a name") for line in said) == 1


def test_a_run_of_given_columns_is_sampled_at_values_of_them(tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(400, 3)).astype(str)
    table = tmp_path / "t.csv"
    table.write_text("a,k=1,c\n" + "\n".join(map(",".join, rows)) + "\n")
    run = str(tmp_path / "run")
    settings = ["--model.layers", "1", "--model.hidden", "8", "--steps", "5", "--out", run]
    assert main(["train", "maf", "--data", f"csv:{table}", "--data.condition", "c, k=1", *settings]) == 0
    out = tmp_path / "drawn.npz"
    assert main(["sample", run, "--condition", "k=1=2.5, c=-1", "--n", "7", "--out", str(out)]) == 0
    drawn = np.load(out)
    assert drawn["x"].shape == (7, 1)
    assert drawn["names"].tolist() == ["a"]
    assert drawn["y_names"].tolist() == ["c", "k=1"]
    assert drawn["y"] == pytest.approx(np.tile([-1, 2.5], (7, 1)), abs=1e-5)
    assert main(["sample", run, "--n", "7", "--out", str(tmp_path / "any.npz")]) == 0  # conditions of test examples
    assert main(["evaluate", run]) == 0
    assert main(["train", "--resume", run, "--steps", "6"]) == 0
    capsys.readouterr()
    for wrong, said in {
        "c=1": "no value of k=1",
        "c=1,k=1=x": "got 'k=1=x'",
        "c=1,c=2,k=1=0": "got 'c=2'",
        "c=inf,k=1=0": "got 'c=inf'",
        "d=1": "got 'd=1'",
    }.items():
        assert main(["sample", run, "--condition", wrong, "--out", str(tmp_path / "x.npz")]) == 2
        assert said in capsys.readouterr().err
    assert main(["sample", run, "--label", "1", "--out", str(tmp_path / "x.npz")]) == 2


def test_settings_of_a_former_run_are_typed_by_the_types_of_now(tmp_path):
    run = tmp_path / "run"
    assert main(["train", "gan", "--data", "digits", "--model.hidden", "8", "--steps", "2", "--out", str(run)]) == 0
    config = json.loads((run / "config.json").read_text())
    config["model"]["settings"]["channels"] = 64  # as it was before it was the widths of all stages
    old = tmp_path / "config.json"
    old.write_text(json.dumps(config))
    arguments = arguments_of("gan", old)
    assert arguments[arguments.index("--model.channels") + 1] == "64"
