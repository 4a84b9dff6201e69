"""`sprites`, and factors as any data set may have them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from genfuse import plugins
from genfuse.data import Dataset, Source, Split, load_data
from genfuse.data.images import SPRITES
from genfuse.errors import DataError
from genfuse.testing import check_dataset


def whole(name="sprites:tiny"):
    """All images (N, H, W) and factors (N, K), in the order of dSprites."""
    data = load_data(name, hold_out=False)
    return data, data.splits["train"].x[:, 0], data.splits["train"].factors


def test_every_combination_of_factors_is_there_once_and_in_dsprites_order():
    data, x, factors = whole()
    sizes = [len(values) for values in data.factors.values()]
    assert dict(zip(data.factors, sizes, strict=True)) == {"shape": 3, "scale": 4, "orientation": 10, "x": 8, "y": 8}
    assert torch.equal(factors, torch.cartesian_prod(*map(torch.arange, sizes)))
    assert x.shape == (math.prod(sizes), 16, 16)
    assert set(x.unique().tolist()) == {0, 1}
    parts = load_data("sprites:tiny").splits
    assert {part: len(split) for part, split in parts.items()} == {"train": 6144, "test": 1536}
    together = torch.cat([split.factors for split in parts.values()]).tolist()
    assert sorted(together) == factors.tolist()


def test_sprites_full_has_the_layout_of_dsprites():
    side, scales, orientations, places = SPRITES["full"]
    assert (side, 3 * scales * orientations * places**2) == (64, 737_280)


@pytest.mark.parametrize("name", ["sprites:tiny", "sprites"])
def test_sprites_are_where_and_as_large_and_as_turned_as_their_factors_say(name):
    data, x, factors = whole(name)
    side = x.shape[-1]
    area = x.flatten(1).sum(1)
    assert not x[:, [0, -1]].float().mean() > 0.05  # whole ones, none cut off
    ellipses = factors[:, 0] == 1
    ellipses &= factors[:, 1] == 3
    grid = torch.arange(side).float()
    images = x[ellipses].float()
    total = images.sum((1, 2))
    across, down = (images.sum(1) @ grid / total, images.sum(2) @ grid / total)
    assert (across - (side // 4 + factors[ellipses, 3])).abs().max() < 0.2  # a pixel from each place to the next
    assert (down - (side // 4 + factors[ellipses, 4])).abs().max() < 0.2
    moment = lambda a, b: (images * (grid[None, :, None] - down[:, None, None]) ** a  # noqa: E731
                           * (grid[None, None] - across[:, None, None]) ** b).sum((1, 2))  # fmt: skip
    turned = 0.5 * torch.atan2(2 * moment(1, 1), moment(0, 2) - moment(2, 0))
    wanted = torch.tensor(data.factors["orientation"])[factors[ellipses, 2]]
    assert (torch.sin(turned - wanted).abs() < 0.1).all()
    for shape in range(3):
        mean = [area[(factors[:, 0] == shape) & (factors[:, 1] == scale)].float().mean().item() for scale in range(4)]
        ratio = np.sqrt(np.array(mean) / mean[3])
        assert ratio == pytest.approx(data.factors["scale"], abs=0.08)


@pytest.mark.parametrize("name", ["sprites:64", "sprites:big"])
def test_an_argument_that_is_no_size_is_refused(name):
    with pytest.raises(DataError, match="write sprites, sprites:tiny or sprites:full"):
        load_data(name)


def test_sprites_keep_the_contract():
    assert check_dataset(plugins.load("datasets", "sprites"), "tiny")


def small(n=6, **changes):
    factors = torch.cartesian_prod(torch.arange(2), torch.arange(3)).repeat(n // 6, 1)
    split = Split(torch.zeros(n, 1, 2, 2, dtype=torch.uint8), torch.arange(n) % 2, factors)
    given = {"levels": 256, "factors": {"a": (0.0, 1.0), "b": (0.0, 1.0, 2.0)}, **changes}
    return Dataset("mine", {"train": split, "test": split}, **given)


def test_factors_stay_with_their_examples():
    data = small(60)
    made = data.with_validation(0.5).binarized("static").to("cpu")
    x = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 1, 2, 2)
    numbered = replace(data, splits={part: replace(split, x=x) for part, split in data.splits.items()})
    for split in numbered.with_validation(0.5).splits.values():
        assert torch.equal(split.factors, data.splits["train"].factors[split.x[:, 0, 0, 0].long()])
    assert all(len(split.factors) == len(split) for split in made.splits.values())


@pytest.mark.parametrize(
    ("factors", "values", "words"),
    [
        (torch.zeros(6, 1, dtype=torch.int64), None, "the values of {}"),
        (None, {"a": (0.0, 1.0)}, "the values of {'a': 2}, two or more each; got <class 'NoneType'>"),
        (torch.zeros(6, 1), {"a": (0.0, 1.0)}, "got torch.float32, 6, 1"),
        (torch.zeros(5, 1, dtype=torch.int64), {"a": (0.0, 1.0)}, "got torch.int64, 5, 1"),
        (torch.zeros(6, 2, dtype=torch.int64), {"a": (0.0, 1.0)}, "got torch.int64, 6, 2"),
        (torch.zeros(6, 1, dtype=torch.int64), {"a": (0.0,)}, "{'a': 1}, two or more each"),
        (torch.full((6, 1), 2), {"a": (0.0, 1.0)}, "{'a': 2}, from 0; got [2] to [2]"),
        (torch.full((6, 1), -1), {"a": (0.0, 1.0)}, "from 0; got [-1] to [-1]"),
    ],
)
def test_factors_that_are_not_the_numbers_of_values_are_refused(factors, values, words):
    split = Split(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), factors=factors)
    with pytest.raises(DataError) as refused:
        Dataset("mine", {"train": split, "test": split}, levels=2, factors=values)
    assert words in str(refused.value)


def test_loading_sprites_twice_gives_the_same_split_by_the_seed():
    first, again, other = (load_data("sprites:tiny", seed=seed).fingerprint() for seed in (0, 0, 1))
    assert first == again != other
    assert Source("sprites").argument is None
