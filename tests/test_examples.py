"""The hand-written models in `examples/plain`, and their twins in `examples/fused`, which call the operators."""

import difflib
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks.examples import EXAMPLES, difference
from examples.fused.realnvp import Coupling

ROOT = Path(__file__).parents[1]
CALLS = {
    "vae": ["bernoulli", "reparameterize_kl"],
    "wgan_gp": ["gradient_penalty"],
    "realnvp": ["affine_coupling", "standard_normal_log_prob"],
}
every_example = pytest.mark.parametrize("name", EXAMPLES)


def source(folder, name):
    return (ROOT / "examples" / folder / f"{name}.py").read_text(encoding="utf-8")


def changed_lines(before, after):
    """The longer side of each place that differs: lines replaced, and what is removed or added beyond them. Imports
    and blank lines count."""
    places = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False).get_opcodes()
    return sum(max(j - i, n - m) for kind, i, j, m, n in places if kind != "equal")


def test_the_count_of_changed_lines_is_that_of_a_diff():
    assert changed_lines("a\nb\nc\n", "a\nb\nc\n") == 0
    assert changed_lines("a\nb\nc\n", "import x\na\nB\nc\n") == 2
    assert changed_lines("a\nb\nc\nd\n", "a\nB\n") == 3


@every_example
def test_a_twin_calls_the_operators_after_at_most_five_changed_lines(name):
    plain, fused = source("plain", name), source("fused", name)
    assert 0 < changed_lines(plain, fused) <= 5
    assert "genfuse" not in plain
    assert re.findall(r"\bops\.(\w+)\(", fused) == CALLS[name]


@every_example
def test_a_twin_has_the_loss_and_the_gradient_of_plain_pytorch_given_the_same_noise(name):
    x = EXAMPLES[name].draw(64, 43)
    loss, gradient = difference(name, x)
    assert loss < 1e-5
    assert gradient < 1e-5


@every_example
@pytest.mark.parametrize("folder", ["plain", "fused"])
def test_an_example_learns(folder, name, capsys):
    main = import_module(f"examples.{folder}.{name}").main
    untrained, trained = main(0), main({"vae": 10, "wgan_gp": 15, "realnvp": 150}[name])
    assert trained < {"vae": 0.8, "wgan_gp": 0.5, "realnvp": 0.5}[name] * untrained
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_readme_shows_all_that_changes_in_the_vae():
    paths = "examples/plain/vae.py", "examples/fused/vae.py"
    lines = [source(folder, "vae").splitlines() for folder in ("plain", "fused")]
    (shown,) = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert shown.splitlines() == list(difflib.unified_diff(*lines, *paths, n=0, lineterm=""))


def test_the_plain_inverse_of_a_coupling_undoes_the_operator():
    coupling, x = Coupling(5, 16), torch.randn(7, 5)
    y, _ = coupling(x)
    assert not torch.allclose(y, x, atol=0.01)
    torch.testing.assert_close(coupling.inverse(y), x)
