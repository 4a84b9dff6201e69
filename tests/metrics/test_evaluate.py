import json

import pytest
import torch

from genfuse.data import Dataset, Split
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
    return VAE(VAEConfig(shape=(1, 4, 3), levels=6, hidden=(8,), latent_dim=3))


def test_means_are_those_of_the_whole_split():
    model, data = vae(), dataset()
    found = evaluate(model, data, samples=4)
    assert {split: of_split["examples"] for split, of_split in found.items()} == {
        "train": 700, "validation": 5, "test": 30
    }  # fmt: skip
    x = data.batch("train", slice(None)).x
    with torch.no_grad():
        mu, logvar = model.encode(x)
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


def test_limit_takes_the_first_examples():
    model, data = vae(), dataset()
    few = evaluate(model, data, samples=2, limit=40)
    assert (few["train"]["examples"], few["test"]["examples"]) == (40, 30)
    first = Dataset("first", {part: Split(split.x[:40]) for part, split in data.splits.items()}, levels=6)
    assert evaluate(model, first, samples=2) == few


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


def test_wrong_numbers_and_other_data_are_refused():
    for settings in ({"samples": 0}, {"limit": 0}):
        with pytest.raises(SettingsError, match="must be at least 1"):
            evaluate(vae(), dataset(), **settings)
    with pytest.raises(SettingsError, match="examples of shape"):
        evaluate(VAE(VAEConfig(shape=(2,))), dataset())
