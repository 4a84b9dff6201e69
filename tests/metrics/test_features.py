import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from genfuse.data import Dataset, Split, load_data
from genfuse.errors import DataError, SettingsError
from genfuse.metrics import classifier_path, extractor, train_features, train_missing


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def images(shape: tuple[int, ...], y: torch.Tensor | None = None) -> Dataset:
    x = torch.randint(256, (40, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Dataset("noise", {"train": Split(x, y), "test": Split(x[:9], None if y is None else y[:9])}, levels=256)


def test_pixels_and_columns_are_the_examples_themselves(digits):
    x = digits.batch("test", slice(5)).x
    assert torch.equal(extractor("pixels", digits)(x), x.flatten(1))
    moons = load_data("toy:moons")
    points = moons.batch("test", slice(5)).x
    assert torch.equal(extractor("auto", moons)(points), points)
    assert extractor("auto", moons).name == "columns"


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 33, 20), (1, 28, 28), (2, 1, 5), (3, 64, 64)])
def test_random_features_are_always_the_same_and_keep_the_size_of_their_inputs(shape):
    data = images(shape)
    x = data.batch("train", slice(None)).x
    state = torch.get_rng_state()
    first = extractor("random-conv", data)(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(extractor("random-conv", data)(x), first)
    assert first.shape == (40, 64)
    assert 0.05 < first.square().mean() / x.square().mean() < 20
    one_by_one = torch.cat([extractor("random-conv", data)(row) for row in x.split(1)])
    assert one_by_one.numpy() == pytest.approx(first.numpy(), abs=1e-5)


def test_a_classifier_is_trained_once_stored_and_from_then_on_the_default(digits, cache):
    assert extractor("auto", digits).name == "random-conv"
    state = torch.get_rng_state()
    path, accuracy = train_features(digits, steps=300)
    assert torch.equal(torch.get_rng_state(), state)
    assert path == classifier_path(digits)
    assert path.parent == cache / "features"
    assert accuracy > 0.9
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["genfuse"])
    assert (facts["data"], facts["classes"], facts["accuracy"]) == ("digits", 10, accuracy)

    extract = extractor("auto", digits)
    assert extract.name == "classifier"
    assert f"held-out accuracy {accuracy:.2%}" in extract.about
    features, labels = extract(digits.batch("train", slice(None)).x), digits.splits["train"].y
    assert features.shape == (1500, 64)
    assert features.square().mean() == pytest.approx(1, abs=0.05)
    between = torch.stack([features[labels == k].mean(0) for k in range(10)]).var(0).sum()
    assert between > 0.3 * features.var(0).sum()  # of which the ten classes make a good part

    before = path.read_bytes()
    with pytest.raises(SettingsError, match=r"a classifier of 'digits' already, .*ask for overwrite"):
        train_features(digits, steps=300)
    assert train_features(digits, steps=300, overwrite=True) == (path, accuracy)
    assert path.read_bytes() == before
    train_features(digits, steps=300, seed=1, overwrite=True)
    assert path.read_bytes() != before


def test_points_have_a_classifier_too():
    data = load_data("toy:eight-gaussians")
    _, accuracy = train_features(data, steps=200)
    assert accuracy > 0.95
    extract = extractor("classifier", data)
    assert extract(data.batch("test", slice(7)).x).shape == (7, 64)
    assert extractor("auto", data).name == "classifier"


def test_other_data_has_another_classifier(digits):
    names = {classifier_path(data) for data in (digits, load_data("digits", binarize="static"), load_data("toy:moons"))}
    assert len(names) == 3
    train_features(digits, steps=1)
    with pytest.raises(SettingsError, match=r"`genfuse train-features digits --data\.binarize static --data\.seed 3`"):
        extractor("classifier", load_data("digits", binarize="static", seed=3))


def test_a_damaged_classifier_is_named(digits):
    path, _ = train_features(digits, steps=1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
        extractor("classifier", digits)


def test_a_classifier_needs_labels_of_two_classes():
    with pytest.raises(
        DataError, match=r"'noise': a classifier needs labels, and there are none in its splits train, t"
    ):
        train_features(images((1, 4, 4)))
    with pytest.raises(DataError, match=r"needs at least 2 classes; got 1"):
        train_features(images((1, 4, 4), torch.zeros(40, dtype=torch.int64)))
    with pytest.raises(SettingsError, match="steps and batch_size must be at least 1"):
        train_features(images((1, 4, 4)), steps=0)


@pytest.mark.parametrize(("count", "asked"), [(100, {"steps": 200}), (200, {"steps": 400}), (1200, {})])
def test_the_classifier_of_few_pictures_passes_over_them_no_more_than_200_times(monkeypatch, count, asked):
    def train(data, device, **options):
        assert options == asked
        return None, 0.5

    monkeypatch.setattr("genfuse.metrics._features.train_features", train)
    split = Split(torch.zeros(count, 1, 4, 4, dtype=torch.uint8), torch.arange(count) % 2)
    told: list[str] = []
    train_missing("auto", Dataset("few", {"train": split, "test": split}, levels=256), "cpu", told.append)
    assert told[1] == "its held-out accuracy: 50.00%"


class Detector(nn.Module):
    """Called as StyleGAN2-ADA's metrics call their InceptionV3; its features show what it was given."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = img.to(torch.float32)
        if return_features:
            return torch.cat([x.mean([2, 3]), x.amax([1, 2, 3]).unsqueeze(1)], 1)
        return x.sum([1, 2, 3]).unsqueeze(1)


class Plain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.uint8
        return x.to(torch.float32)[:, :, :1, :1]


@pytest.fixture
def weights(tmp_path):
    def save(module: nn.Module):
        path = tmp_path / "module.pt"
        torch.jit.script(module).save(str(path))
        return path

    return save


def test_an_inception_file_is_given_bytes_in_rgb_and_asked_for_features(digits, weights):
    path = weights(Detector())
    extract = extractor("inception", digits, inception_weights=path)
    x = digits.batch("test", slice(None)).x
    features = extract(x)
    assert features.shape == (297, 4)
    pixels = (x * 255).round()
    assert features[:, 0].numpy() == pytest.approx(pixels.mean((1, 2, 3)).numpy(), rel=1e-5)
    assert torch.equal(features[:, 0], features[:, 2])
    assert torch.equal(features[:, 3], pixels.amax((1, 2, 3)))
    assert str(path) in extract.about
    colours = images((3, 5, 5))
    assert torch.equal(
        extractor("inception", colours, inception_weights=weights(Plain()))(colours.batch("train", slice(None)).x),
        colours.splits["train"].x[:, :, 0, 0].float(),
    )


def test_an_inception_file_that_cannot_be_used_is_told_what_is_wanted(digits, tmp_path):
    wanted = r"a TorchScript InceptionV3 that takes uint8 RGB .*such as https://.*/inception-2015-12-05\.pt"
    with pytest.raises(SettingsError, match=f"need a file of weights, --inception-weights FILE: {wanted}"):
        extractor("inception", digits)
    with pytest.raises(SettingsError, match=f"there is no file .*absent.pt; wanted is {wanted}"):
        extractor("inception", digits, inception_weights=tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "state.pt")
    for name in ("text.pt", "state.pt"):
        with pytest.raises(SettingsError, match=f"{name} is no TorchScript file: .*; wanted is {wanted}"):
            extractor("inception", digits, inception_weights=tmp_path / name)
    with pytest.raises(SettingsError, match=r"of grey or RGB images; those of 'noise' are \(2, 4, 4\)"):
        extractor("inception", images((2, 4, 4)), inception_weights=tmp_path / "text.pt")


def test_features_without_meaning_for_the_data_are_refused(digits):
    moons = load_data("toy:moons")
    for name in ("pixels", "random-conv", "inception"):
        with pytest.raises(SettingsError, match=f"{name!r} are of images, but the data set 'toy:moons'"):
            extractor(name, moons)
    with pytest.raises(
        SettingsError, match="'columns' are of tables, but the data set 'digits' has images: use pixels"
    ):
        extractor("columns", digits)
    with pytest.raises(SettingsError, match=r"features must be one of auto, columns, .*inception; got 'vgg'"):
        extractor("vgg", digits)
    with pytest.raises(SettingsError, match="goes with features 'inception', got 'pixels'"):
        extractor("pixels", digits, inception_weights="file.pt")
