import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from genfuse.data import Dataset, Split, load_data
from genfuse.errors import SettingsError
from genfuse.metrics import evaluate
from genfuse.models import GenerativeModel
from genfuse.models.vae import VAE, VAEConfig
from genfuse.ops import kl_per_dimension


def dataset(n: int = 700, binarize: str = "none") -> Dataset:
    generator = torch.Generator().manual_seed(0)
    splits = {
        part: Split(torch.randint(6, (size, 1, 4, 3), generator=generator).to(torch.uint8))
        for part, size in (("train", n), ("validation", 5), ("test", 30))
    }
    return Dataset("noise", splits, levels=6).binarized(binarize)


def vae() -> VAE:
    torch.manual_seed(0)
    return VAE.from_config(VAEConfig(shape=(1, 4, 3), levels=6, hidden=(8,), latent_dim=3))


def test_means_are_those_of_the_whole_split():
    model, data = vae(), dataset()
    found = evaluate(model, data, samples=4)
    assert {split: of_split["examples"] for split, of_split in found.items()} == {
        "train": 700, "validation": 5, "test": 30
    }  # fmt: skip
    x = data.batch("train", slice(None)).x
    with torch.no_grad():
        mu, logvar, _ = model._encoded(x)
        kl = kl_per_dimension(mu, logvar)
        reconstruction_error = (model.reconstruct(x) - x).square().mean()
        elbo, bound = model.elbo(x), model.iwae_bound(x, 4)
    train = found["train"]
    assert train["examples"] == 700
    assert train["kl"] == pytest.approx(kl.sum(1).mean().item())
    assert train["kl_per_dimension"] == pytest.approx(kl.mean(0).tolist())
    assert train["reconstruction_error"] == pytest.approx(reconstruction_error.item())
    assert train["active_units"] == (mu.var(0, correction=0) > 0.01).sum()
    assert train["elbo"] == pytest.approx(elbo.mean().item(), abs=0.1)
    assert train["iwae_bound_4"] == pytest.approx(bound.mean().item(), abs=0.1)


def test_units_are_active_where_the_mean_moves_with_the_data():
    model = vae()
    with torch.no_grad():
        model.encoder[1][-1].weight[:3] *= torch.tensor([[20.0], [0.0], [20.0]])
    assert evaluate(model, dataset(), samples=1)["train"]["active_units"] == 2


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_the_numbers_are_the_same_each_time_and_the_world_is_left_as_it_was(binarize):
    model, data = vae(), dataset(binarize=binarize)
    state = torch.get_rng_state()
    first = evaluate(model, data, samples=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    torch.rand(5)
    model.eval()
    assert evaluate(model, data, samples=3) == first
    assert not model.training
    assert evaluate(model, data, samples=3, seed=1) != first
    assert json.loads(json.dumps(first)) == first


def test_the_number_of_samples_leaves_the_other_numbers():
    model, data = vae(), dataset(binarize="dynamic")
    few, many = (evaluate(model, data, samples=k)["train"] for k in (1, 20))
    assert few.pop("iwae_bound_1") < many.pop("iwae_bound_20")
    assert few == many


def test_a_float64_model_is_measured_in_float64():
    found, double = evaluate(vae(), dataset(), samples=1), evaluate(vae().double(), dataset(), samples=1)
    assert double["test"]["kl"] == pytest.approx(found["test"]["kl"], rel=1e-5)


def test_limit_takes_the_same_examples_every_time_and_of_all_kinds():
    model, data = vae(), dataset()
    few = evaluate(model, data, samples=2, limit=40)
    assert (few["train"]["examples"], few["test"]["examples"]) == (40, 30)
    assert evaluate(model, data, samples=2, limit=40) == few
    chosen = torch.randperm(len(data.splits["train"]), generator=torch.Generator().manual_seed(0))[:40].sort().values
    some = {**data.splits, "train": Split(data.splits["train"].x[chosen])}
    assert evaluate(model, Dataset("some", some, levels=6), samples=2) == few

    class Mean(GenerativeModel):
        Config = VAEConfig

        def log_prob(self, x):
            return x.flatten(1).mean(1)

        @property
        def device(self):
            return torch.device("cpu")

    in_order = torch.arange(1000.0)[:, None] / 1000  # as a folder of classes is
    table = Dataset("in order", {part: Split(in_order) for part in ("train", "test")})
    found = evaluate(Mean(VAEConfig(shape=(1,))), table, limit=200)
    assert found["test"]["log_prob"] == pytest.approx(0.5, abs=0.1)


def test_a_model_is_measured_by_the_verbs_that_it_has():
    class Uniform(GenerativeModel):
        Config = VAEConfig

        def log_prob(self, x):
            return torch.full((len(x),), -2.5)

        @property
        def device(self):
            return torch.device("cpu")

    model = Uniform(VAEConfig(shape=(1, 4, 3)))
    assert evaluate(model, dataset())["test"] == {"examples": 30, "log_prob": -2.5}


@dataclass(frozen=True)
class BellConfig:
    shape: tuple[int, ...] = (2,)
    levels: int | None = None
    classes: int | None = None
    conditional: bool = False


class Bell(GenerativeModel):
    """N(0, 1) of each cell, or N(y, 1); of discrete data, a bound with noise and the same in bits."""

    Config = BellConfig
    device = torch.device("cpu")

    def log_prob(self, x, y=None):
        mean = 0 if y is None else y[:, None]
        return -0.5 * ((x.flatten(1) - mean).square() + math.log(2 * math.pi)).sum(1)

    def elbo(self, x, y=None):
        return self.log_prob(x + torch.rand_like(x), y)

    def bits_per_dim(self, x, y=None):
        return -self.elbo(x, y) / (math.log(2) * math.prod(self.config.shape))

    def encode(self, x, y=None):
        return x.flatten(1)

    @property
    def likelihoods(self):
        return ("log_prob",) if self.config.levels is None else ("elbo", "bits_per_dim")


def test_a_model_says_which_of_its_verbs_are_likelihoods():
    found = evaluate(Bell(BellConfig(shape=(1, 4, 3), levels=6)), dataset())["train"]
    assert found.keys() == {"examples", "elbo", "bits_per_dim"}
    assert found["bits_per_dim"] == pytest.approx(-found["elbo"] / (12 * math.log(2)), rel=1e-6)


def test_the_density_of_a_table_in_its_own_units_is_that_of_scipy(tmp_path):
    rows = np.random.default_rng(0).normal([170, -3], [10, 0.2], (500, 2))
    np.save(tmp_path / "table.npy", rows)
    data = load_data(f"npy:{tmp_path / 'table.npy'}")
    found = evaluate(Bell(BellConfig()), data)["train"]
    own = data.scaling.restore(data.splits["train"].x).numpy()
    oracle = multivariate_normal(data.scaling.mean, np.diag(np.square(data.scaling.std)))
    assert found["log_prob_original_units"] == pytest.approx(oracle.logpdf(own).mean(), rel=1e-5)
    assert found["log_prob_original_units"] < found["log_prob"] - 0.5
    assert "log_prob_original_units" not in evaluate(Bell(BellConfig()), load_data("toy:moons"), limit=10)["test"]


def test_a_conditional_model_is_given_the_labels():
    y = torch.arange(40) % 4
    split = Split(torch.full((40, 2), 3.0), y)
    data = Dataset("labelled", {"train": split, "test": split})
    model = Bell(BellConfig(classes=4, conditional=True))
    expected = -((3 - y) ** 2).double().mean().item() - math.log(2 * math.pi)
    assert evaluate(model, data)["test"]["log_prob"] == pytest.approx(expected)
    bare = Dataset("bare", {"train": split, "test": Split(split.x)})
    with pytest.raises(SettingsError, match=r"needs labels, but the data set 'bare' has none in its splits test: use"):
        evaluate(model, bare)
    assert evaluate(Bell(BellConfig()), bare)["test"]["log_prob"] == pytest.approx(-9 - math.log(2 * math.pi))


def test_wrong_numbers_and_other_data_are_refused():
    for settings in ({"samples": 0}, {"limit": 0}):
        with pytest.raises(SettingsError, match="must be at least 1"):
            evaluate(vae(), dataset(), **settings)
    with pytest.raises(SettingsError, match="examples of shape"):
        evaluate(VAE.from_config(VAEConfig(shape=(2,))), dataset())
