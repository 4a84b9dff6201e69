import numpy as np
import pytest
import torch
from PIL import Image

import genfuse
from genfuse import pictures
from genfuse.data import Scaling


def opened(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (4, 2, 2), (7, 2, 4), (64, 8, 8)])
def test_a_grid_shows_every_image_enlarged_in_blocks(n, rows, columns, tmp_path):
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
    pictures.sample_grid(images, tmp_path / "grid.png")
    grid = opened(tmp_path / "grid.png")
    line = 2  # 8 x 8 pixels are shown as 64 x 64
    assert grid.shape == (rows * 64 + (rows + 1) * line, columns * 64 + (columns + 1) * line)
    for i in range(n):
        top, left = (line + where * (64 + line) for where in divmod(i, columns))
        shown = grid[top : top + 64, left : left + 64].reshape(8, 8, 8, 8)
        assert (shown == (images[i, 0] * 255).round().numpy()[:, None, :, None]).all()


def test_colours_stay_and_values_outside_the_range_are_clamped(tmp_path):
    images = torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1).expand(4, 3, 100, 100)
    pictures.sample_grid(images, tmp_path / "grid.png")
    assert opened(tmp_path / "grid.png")[50, 50].tolist() == [0, 128, 255]


def test_reconstructions_stand_under_their_originals(tmp_path):
    originals = torch.zeros(11, 1, 28, 28)
    originals[3] = 1
    pictures.reconstructions(originals, 1 - originals, tmp_path / "pairs.png")
    picture = opened(tmp_path / "pairs.png")[..., 0]
    labels = picture.shape[1] * 1.2 / (1.2 + 8 * 0.8)
    x = round(labels + (picture.shape[1] - labels) * 3.5 / 8)
    first, second, _, _ = (picture[round(picture.shape[0] * (i + 0.5) / 4), x] for i in range(4))
    assert (first, second) == (255, 0)


def test_principal_components_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    points = np.random.default_rng(0).normal(size=(200, 5)) @ np.random.default_rng(1).normal(size=(5, 5))
    oracle = PCA(2).fit(points)
    found, shares = pictures.principal_components(points)
    assert shares == pytest.approx(oracle.explained_variance_ratio_)
    assert np.abs(found) == pytest.approx(np.abs(oracle.transform(points)))


@pytest.mark.parametrize(("dimensions", "classes"), [(1, None), (2, 1), (2, 10), (5, 20), (5, 100)])
@pytest.mark.filterwarnings("error")
def test_latent_spaces_of_any_size_and_number_of_labels(dimensions, classes, tmp_path):
    labels = None if classes is None else torch.arange(300) % classes
    pictures.latent_space(torch.randn(300, dimensions), labels, tmp_path / "latent.png")
    colours = np.unique(opened(tmp_path / "latent.png").reshape(-1, 4), axis=0)
    assert len(colours) > 10


@pytest.mark.filterwarnings("error")
def test_a_collapsed_latent_space_is_drawn(tmp_path):
    pictures.latent_space(torch.zeros(10, 5), None, tmp_path / "latent.png")
    assert opened(tmp_path / "latent.png").size


@pytest.mark.filterwarnings("error")
def test_curves_of_several_players_and_terms(tmp_path):
    metrics = [
        {"step": step, "epoch": 1, "split": split, "player": player, "loss": 1 / step, "penalty": 2.0, "lr": 0.1}
        for step in range(1, 50)
        for split in ("train", "test")
        for player in ("critic", "generator")
    ]
    pictures.curves([*metrics, {"step": 50, "epoch": 1, "split": "epoch", "seconds": 1.0}], tmp_path / "curves.png")
    tall, wide, _ = opened(tmp_path / "curves.png").shape
    assert (tall, wide) == (2 * 480, 3 * 630)  # four panels in two rows of three


@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_tables_are_shown_in_original_units(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.hist", lambda self, values, *a, **k: drawn.append(values))
    scaling = Scaling(mean=(100.0,) * 8, std=(10.0,) * 8, names=tuple("abcdefgh"))
    x, samples = torch.randn(500, 8), torch.randn(500, 8)
    pictures.histograms(x, samples, tmp_path / "table.png", scaling)
    assert len(drawn) == 2 * 6  # the first six columns
    assert drawn[0] == pytest.approx(x[:, 0].double().numpy() * 10 + 100)
    assert drawn[11] == pytest.approx(samples[:, 5].double().numpy() * 10 + 100)


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    pictures.sample_grid(torch.rand(4, 1, 8, 8), tmp_path / "grid.png")
    before = (tmp_path / "grid.png").read_bytes()

    def fail(self, file, format=None):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        pictures.sample_grid(torch.rand(4, 1, 8, 8), tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("digits", {}, ["samples.png", "reconstructions.png", "latent.png"]),
        ("toy:rings", {"decoder": "gaussian"}, ["samples.png", "latent.png"]),
    ],
)
def test_what_is_drawn_follows_from_verbs_and_data_and_is_the_same_each_time(name, settings, expected, tmp_path):
    data = genfuse.load_data(name)
    model = genfuse.create("vae", data, hidden=(8,), latent_dim=2, **settings).eval()
    state = torch.get_rng_state()
    first = pictures.draw(tmp_path / "a", model, data, [])
    torch.rand(1)
    second = pictures.draw(tmp_path / "b", model, data, [])
    torch.set_rng_state(state)
    assert [path.name for path in first] == expected
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    pictures.draw(tmp_path / "c", model, data, [])
    assert torch.equal(torch.get_rng_state(), state)
