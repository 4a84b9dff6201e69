import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from genfuse.data import Dataset, Split, load_data
from genfuse.errors import SettingsError
from genfuse.metrics import (
    Samples,
    TooFewSamplesError,
    classify,
    evaluate_samples,
    extractor,
    frechet_distance,
    kernel_distance,
    mode_coverage,
    prdc,
    sliced_wasserstein_distance,
    train_features,
)
from genfuse.metrics.scores import compute, select, stacked_modes
from genfuse.models import GenerativeModel
from genfuse.models.vae import VAE, VAEConfig


@dataclass(frozen=True)
class PoolConfig:
    shape: tuple[int, ...] = (2,)
    classes: int | None = None
    conditional: bool = False


class Pool(GenerativeModel):
    """Draws from given examples, with replacement; where conditional, from those of the label."""

    Config = PoolConfig

    def __init__(self, x, y=None, spread=0.0):
        super().__init__(PoolConfig(tuple(x.shape[1:]), conditional=y is not None))
        self.x, self.y, self.spread = nn.Parameter(x), y, spread
        self.asked = []

    def sample(self, n, *, y=None, generator=None):
        if y is None:
            index = torch.randint(len(self.x), (n,), generator=generator)
        else:
            self.asked.append(y)
            index = torch.cat([(self.y == label).nonzero()[:1, 0] for label in y])
        return self.x[index] + self.spread * torch.randn(n, *self.x.shape[1:], generator=generator)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENFUSE_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def mixture():
    return load_data("toy:eight-gaussians")


def real(data: Dataset, split: str) -> torch.Tensor:
    return data.batch(split, slice(None)).x


def test_the_numbers_are_those_of_the_metrics_on_all_of_the_test_split(digits):
    found = evaluate_samples(Pool(real(digits, "train")[:40]), digits)
    assert (found["features"], found["dimensions"], found["n"], found["left_out"]) == ("random-conv", 64, 297, {})
    assert "random weights, not trained" in found["about"]

    extract = extractor("random-conv", digits)
    reference = extract(real(digits, "test"))
    chosen = torch.randperm(1500, generator=torch.Generator().manual_seed(0))[:297]
    floor = extract(digits.batch("train", chosen).x)
    drawn = extract(Pool(real(digits, "train")[:40]).sample(297, generator=torch.Generator().manual_seed(0)).detach())
    for column, features in (("real", floor), ("samples", drawn)):
        measured = dict(found[column])
        del measured["nearest_training"]
        assert measured == pytest.approx(
            {
                "frechet_distance": frechet_distance(features, reference),
                "kernel_distance": kernel_distance(features, reference).value,
                **prdc(features, reference)._asdict(),
                "sliced_wasserstein": sliced_wasserstein_distance(features, reference),
            },
            rel=1e-4,
        )


def test_copies_are_told_from_new_examples_by_the_nearest_training_example(digits):
    copies = evaluate_samples(Pool(real(digits, "train")), digits, features="pixels")
    train, test = (real(digits, split).flatten(1).double() for split in ("train", "test"))
    assert copies["samples"]["nearest_training"] < 1e-3
    expected = torch.cdist(test, train).min(1).values.mean().item()
    assert copies["real"]["nearest_training"] == pytest.approx(expected, rel=1e-6)
    # All else of a model that copies is as good as it gets.
    assert copies["samples"]["frechet_distance"] < 1.5 * copies["real"]["frechet_distance"]
    assert copies["samples"]["coverage"] > copies["real"]["coverage"] - 0.1
    noise = evaluate_samples(Pool(real(digits, "train"), spread=0.3), digits, features="pixels")
    assert noise["samples"]["nearest_training"] > noise["real"]["nearest_training"]
    assert noise["samples"]["precision"] < 0.1


def test_the_same_seed_gives_the_same_numbers_and_the_world_is_left_as_it_was(digits):
    torch.manual_seed(3)
    model = VAE.from_config(VAEConfig(shape=(1, 8, 8), levels=17, hidden=(8,), latent_dim=2))
    data = replace(digits).binarized("dynamic")
    state = torch.get_rng_state()
    first = evaluate_samples(model, data, n=100)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert json.loads(json.dumps(first)) == first
    torch.rand(5)
    assert evaluate_samples(model.eval(), data, n=100) == first
    assert not model.training
    assert evaluate_samples(model, data, n=100, seed=1)["samples"] != first["samples"]


def test_the_numbers_do_not_depend_on_how_examples_are_split_into_batches(digits, monkeypatch):
    model = Pool(real(digits, "train")[:40])
    whole = evaluate_samples(model, digits)
    monkeypatch.setattr("genfuse.metrics._samples.BATCH", 17)
    monkeypatch.setattr("genfuse.metrics._features.BATCH", 13)
    monkeypatch.setattr("genfuse.metrics._neighbours.BLOCK", 1000)
    parts = evaluate_samples(model, digits)
    for column in ("samples", "real"):
        assert parts[column] == pytest.approx(whole[column], rel=1e-4, abs=1e-5)


def test_a_conditional_model_is_given_labels_as_they_occur():
    y = torch.cat([torch.zeros(300), torch.ones(100)]).long()
    split = Split(torch.randn(400, 2) + 5 * y[:, None], y)
    data = Dataset("unbalanced", {"train": split, "test": split})
    model = Pool(split.x, y)
    evaluate_samples(model, data)
    assert torch.cat(model.asked).bincount().tolist() == [300, 100]


def test_modes_and_quality_of_a_mixture(mixture):
    centres = torch.tensor(mixture.mixture.centres)
    std = mixture.mixture.std
    at = [centres[0] + torch.tensor([2.9 * std, 0]), centres[0], centres[3], centres[5] + torch.tensor([0, 3.1 * std])]
    samples = torch.stack([*at, *at, torch.zeros(2), torch.full((2,), 99.0)])
    assert mode_coverage(samples, mixture.mixture) == (2, 0.6)
    with pytest.raises(
        TooFewSamplesError, match="mode coverage: at least 8 samples are needed, one a mode; there are 7"
    ):
        mode_coverage(samples[:7], mixture.mixture)


def test_modes_of_stacked_digits_are_counted_by_the_classifier_of_one_digit(tmp_path, monkeypatch):
    monkeypatch.setenv("GENFUSE_CACHE", str(tmp_path))
    data = load_data("stacked-mnist:digits")
    rows = (data.splits["train"].y % 111 == 0).nonzero()[:, 0]  # three times the same digit
    same = data.batch("train", rows.repeat(2)).x
    scores = compute(select(["stacked-modes"]), Samples(same, same, same, same, data, 0))
    assert "there is no classifier of 'digits'" in str(scores.failed["stacked-modes"])
    _, accuracy = train_features(data, steps=500)
    x, y = data.batch("test", slice(5000))
    assert extractor("auto", data)(x[:10]).shape == (10, 3 * 64)
    right = (classify(x, data) @ torch.tensor([100, 10, 1]) == y).float().mean()
    assert right == pytest.approx(accuracy**3, abs=0.05)

    def measured(x):
        return stacked_modes(Samples(x, x, x, x, data, 0))

    real, few = measured(x), measured(same)
    assert real["stacked_modes"] > 980
    assert real["stacked_kl"] == pytest.approx(1000 / (2 * 5000), abs=0.03)
    assert 10 <= few["stacked_modes"] < 100
    assert few["stacked_kl"] == pytest.approx(math.log(100), abs=0.4)  # 10 modes of 1,000, if none is mistaken
    with pytest.raises(TooFewSamplesError, match="the modes of stacked images: at least 1000 samples are needed"):
        measured(x[:999])


@pytest.mark.parametrize(("name", "modes"), [("eight-gaussians", 8), ("grid", 25)])
def test_modes_are_measured_of_toys_that_are_mixtures(name, modes):
    data = load_data(f"toy:{name}")
    few = Pool(torch.tensor(data.mixture.centres[:3]))
    found = evaluate_samples(few, data, n=1000)
    assert (found["samples"]["modes_covered"], found["samples"]["high_quality"]) == (3, 1)
    assert found["real"]["modes_covered"] == modes
    assert found["real"]["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.01)  # chi-squared with 2 degrees
    assert found["samples"]["recall"] < found["samples"]["coverage"] + 0.1 < 0.5
    assert "modes_covered" not in evaluate_samples(few, load_data("toy:rings"), n=100)["samples"]


def test_samples_are_drawn_beside_their_nearest_training_images(digits, tmp_path):
    train = real(digits, "train")
    path = tmp_path / "new" / "neighbours.png"
    evaluate_samples(Pool(train[:1]), digits, features="pixels", n=66, picture=path)
    with Image.open(path) as image:
        picture = np.asarray(image.convert("L")).astype(int)
    rows = picture[-8 * (picture.shape[1] // 8) :]
    side = rows.shape[1] / 8
    cells = [rows[int(side) // 8 : int(side) - 6, round(k * side) + 6 : round((k + 1) * side) - 6] for k in range(3)]
    shades = [cell[:: cell.shape[0] // 4, :: cell.shape[1] // 4][:4, :4] for cell in cells]
    assert (
        np.abs(shades[0] - shades[1]).mean() < 0.3 * np.abs(shades[0] - shades[2]).mean()
    )  # the copy stands beside it


def test_too_few_samples_are_an_error_where_asked_for_and_left_out_where_there_are_no_more(digits):
    model = Pool(real(digits, "train"))
    with pytest.raises(TooFewSamplesError, match=r"Fréchet distance: at least 65 samples are needed.*; there are 64"):
        evaluate_samples(model, digits, n=64)
    with pytest.raises(TooFewSamplesError, match=r"Fréchet.*kernel.*precision and recall.*there are 1"):
        evaluate_samples(model, digits, n=1)
    with pytest.raises(SettingsError, match=r"n must be in 1\.\.297, the examples of the smaller .*; got 298"):
        evaluate_samples(model, digits, n=298)
    with pytest.raises(SettingsError, match=r"n must be in 1\.\.297.*; got 0"):
        evaluate_samples(model, digits, n=0)
    few = Dataset("few", {part: Split(split.x[:5]) for part, split in digits.splits.items()}, levels=17)
    found = evaluate_samples(model, few)
    assert evaluate_samples(model, few, n=5) == found, "who asks for all that there are can ask for no more"
    assert found["n"] == 5
    assert found["samples"].keys() == found["real"].keys() == {
        "kernel_distance", "sliced_wasserstein", "nearest_training"
    }  # fmt: skip
    assert "at least 65 samples" in found["left_out"]["frechet-distance"]
    assert "at least 6 reference examples" in found["left_out"]["precision-recall"]


def test_a_model_that_cannot_sample_or_has_diverged_is_named(digits):
    class Silent(GenerativeModel):
        Config = PoolConfig

    with pytest.raises(SettingsError, match="a Silent cannot sample: there is nothing to compare"):
        evaluate_samples(Silent(PoolConfig((1, 8, 8))), digits)
    with pytest.raises(SettingsError, match="297 of 297 samples are NaN or infinite: the model has diverged"):
        evaluate_samples(Pool(torch.full((3, 1, 8, 8), torch.nan)), digits)
    with pytest.raises(SettingsError, match="examples of shape"):
        evaluate_samples(Pool(torch.zeros(3, 2)), digits)
