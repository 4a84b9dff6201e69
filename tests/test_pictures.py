from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import multivariate_normal
from torch.distributions import MultivariateNormal

import genfuse
from genfuse import plots
from genfuse.data import Dataset, Scaling, Split
from genfuse.models import GenerativeModel
from genfuse.training import gallery

DECODED = ["traversal.png", "traversal.gif", "manifold.png"]  # of two latent dimensions


def opened(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (4, 2, 2), (7, 2, 4), (40, 5, 8), (64, 8, 8)])
def test_a_grid_shows_every_image_enlarged_in_blocks(n, rows, columns, tmp_path):
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
    plots.sample_grid(images, tmp_path / "grid.png")
    grid = opened(tmp_path / "grid.png")
    line = 2  # 8 x 8 pixels are shown as 64 x 64
    assert grid.shape == (rows * 64 + (rows + 1) * line, columns * 64 + (columns + 1) * line)
    for i in range(n):
        top, left = (line + where * (64 + line) for where in divmod(i, columns))
        shown = grid[top : top + 64, left : left + 64].reshape(8, 8, 8, 8)
        assert (shown == (images[i, 0] * 255).round().numpy()[:, None, :, None]).all()
    if n < rows * columns:
        assert set(np.unique(grid[-64:, -64:])) == {plots.LINE}, "no image there, not a black one"


def test_colours_stay_and_values_outside_the_range_are_clamped(tmp_path):
    images = torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1).expand(4, 3, 100, 100)
    plots.sample_grid(images, tmp_path / "grid.png")
    assert opened(tmp_path / "grid.png")[50, 50].tolist() == [0, 128, 255]


def test_reconstructions_stand_under_their_originals(tmp_path):
    originals = torch.zeros(11, 1, 28, 28)
    originals[3] = 1
    plots.reconstructions(originals, 1 - originals, tmp_path / "pairs.png")
    picture = opened(tmp_path / "pairs.png")[..., 0]
    cells = 8 * 86 + 2  # 28 x 28 pixels are shown as 84 x 84, and a line
    x = round(picture.shape[1] - cells * 4.5 / 8)
    first, second, _, _ = (picture[round(picture.shape[0] * (i + 0.5) / 4), x] for i in range(4))
    assert (first, second) == (255, 0)


@pytest.mark.parametrize("size", [(8, 8), (30, 48), (64, 64), (100, 140)])
def test_pixels_beside_text_are_blocks_of_one_size(tmp_path, size):
    images = torch.randint(0, 256, (6, 3, *size), generator=torch.Generator().manual_seed(0)) / 255
    plots.rows(images.split(3), ["first", "second"], tmp_path / "rows.png")
    plots.sample_grid(images, tmp_path / "grid.png", 3)
    grid = opened(tmp_path / "grid.png")
    shown = opened(tmp_path / "rows.png")[..., :3]
    scale = shown.shape[0] // grid.shape[0]
    assert (shown[:, -scale * grid.shape[1] :] == grid.repeat(scale, 0).repeat(scale, 1)).all()


def test_principal_components_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    points = np.random.default_rng(0).normal(size=(200, 5)) @ np.random.default_rng(1).normal(size=(5, 5))
    oracle = PCA(2).fit(points)
    found, shares = plots.principal_components(points)
    assert shares == pytest.approx(oracle.explained_variance_ratio_)
    assert np.abs(found) == pytest.approx(np.abs(oracle.transform(points)))


@pytest.mark.parametrize(("dimensions", "classes"), [(1, None), (2, 1), (2, 10), (5, 20), (5, 100)])
@pytest.mark.filterwarnings("error")
def test_latent_spaces_of_any_size_and_number_of_labels(dimensions, classes, tmp_path):
    labels = None if classes is None else torch.arange(300) % classes
    plots.latent_space(torch.randn(300, dimensions), labels, tmp_path / "latent.png")
    colours = np.unique(opened(tmp_path / "latent.png").reshape(-1, 4), axis=0)
    assert len(colours) > 10


def test_a_single_point_has_a_place_among_latents(tmp_path):
    plots.latent_space(torch.randn(1, 5), None, tmp_path / "latent.png")
    points, shares = plots.principal_components(np.ones((1, 5)))
    assert points.shape == (1, 2)
    assert shares.tolist() == [0, 0]


def test_the_names_of_classes_are_in_the_legend_and_on_sheets(figures, tmp_path):
    labels = torch.arange(30) % 3
    plots.latent_space(torch.randn(30, 2), labels, tmp_path / "latent.png", "points", ("cat", "dog", "emu"))
    (legend,) = [axes.get_legend() for axes in figures["latent.png"].axes]
    assert [text.get_text() for text in legend.get_texts()] == ["cat", "dog", "emu"]
    plots.rows(torch.rand(6, 1, 8, 8).split(2), ["cat", "dog", "emu"], tmp_path / "rows.png")
    assert [text.get_text() for text in figures["rows.png"].axes[0].texts] == ["cat", "dog", "emu"]


def test_samples_outside_a_histogram_are_counted(figures, tmp_path):
    data = torch.linspace(0, 1, 1000)[:, None].repeat(1, 2)
    samples = data.clone()
    samples[:250, 1] = 50.0
    plots.histograms(data, samples, tmp_path / "h.png")
    assert [axes.get_xlabel() for axes in figures["h.png"].axes] == ["", "25.1% of the samples lie outside"]


@pytest.mark.parametrize("size", [(2, 2), (12, 4)])
def test_ticks_do_not_run_into_each_other(tmp_path, size):
    with plots._figure(tmp_path / "t.png", size) as figure:
        figure.add_subplot().plot([0, 123_456], [0, 1])
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].get_xticklabels() if text.get_text()]
    assert len(boxes) >= 2
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_the_same_vector_picture_is_the_same_file(tmp_path):
    for name in "ab":
        plots.scatter(torch.zeros(5, 2), torch.ones(5, 2), tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert plots.inline(tmp_path / "a.svg").startswith('<img src="data:image/svg+xml;base64,')


def test_a_data_set_in_a_notebook_shows_all_its_classes(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "sample_grid", lambda x, path: (shown.append(x), path.touch()))
    y = torch.arange(320) // 80
    x = (60 * y).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).to(torch.uint8)
    Dataset("sorted", {"train": Split(x, y), "test": Split(x, y)}, levels=256)._repr_html_()
    assert (255 * shown[0].mean((1, 2, 3))).round().unique(return_counts=True)[1].tolist() == [8, 8, 8, 8]


def test_runs_and_histories_fit_into_a_notebook(tmp_path):
    data = genfuse.load_data("digits")
    run = genfuse.Trainer(steps=2, out=tmp_path / "run").fit(genfuse.create("vae", data, hidden=(8,)), data)
    shown = run._repr_html_()
    assert "max-width:min(100%, 420px)" in shown
    assert "max-width:min(100%, 900px)" in shown, "three curves beside each other in 420 pixels cannot be read"
    history = genfuse.Trainer(steps=2).fit(genfuse.create("vae", data, hidden=(8,)), data)
    assert "max-width:100%" in history._repr_html_()


def test_data_sets_and_models_show_themselves_in_notebooks():
    data = genfuse.load_data("digits")
    assert "data:image/png" in data._repr_html_()
    assert data._repr_html_().startswith("<p>&lt;Dataset &#x27;digits&#x27;: train 1500")
    points = genfuse.load_data("toy:moons")
    assert points._repr_html_().count("<tr") == 6
    rows = genfuse.load_data(pd.DataFrame({"a": range(50), "b": ["x", "y"] * 25}))
    assert "knots" not in genfuse.create("vae", rows, hidden=(8,))._repr_html_(), "what a column is takes a page"
    model = genfuse.create("vae", data, latent_dim=3)
    assert "vae: " in model._repr_html_()
    assert "<td>latent_dim</td><td>3</td>" in model._repr_html_()
    assert "parameters" in repr(model)


@pytest.mark.filterwarnings("error")
def test_a_collapsed_latent_space_is_drawn(tmp_path):
    plots.latent_space(torch.zeros(10, 5), None, tmp_path / "latent.png")
    assert opened(tmp_path / "latent.png").size


@pytest.mark.filterwarnings("error")
def test_curves_of_several_players_and_terms(tmp_path):
    metrics = [
        {"step": step, "epoch": 1, "split": split, "player": player, "loss": 1 / step, "penalty": 2.0, "lr": 0.1}
        for step in range(1, 50)
        for split in ("train", "test")
        for player in ("critic", "generator")
    ]
    plots.curves([*metrics, {"step": 50, "epoch": 1, "split": "epoch", "seconds": 1.0}], tmp_path / "curves.png")
    tall, wide, _ = opened(tmp_path / "curves.png").shape
    assert (tall, wide) == (2 * 480, 3 * 630)  # four panels in two rows of three


@pytest.mark.filterwarnings("error")
def test_real_and_fake_share_a_panel_of_the_curves(tmp_path, figures):
    entry = {"epoch": 1, "player": "critic", "loss": 1.0, "real": 0.7, "fake": 0.3, "gradient_norm": 2.0}
    metrics = [{"step": step, "split": split, **entry} for step in (1, 2) for split in ("train", "test")]
    plots.curves([*metrics, {"step": 2, "split": "warning", "message": "no"}], tmp_path / "curves.png")
    panels = {axes.get_title(): axes for axes in figures["curves.png"].axes}
    assert panels.keys() == {"loss", "real, fake", "gradient norm"}
    lines = {line.get_label(): line for line in panels["real, fake"].get_lines()}
    assert lines.keys() == {"real, train", "fake, train", "real, test", "fake, test"}
    assert lines["real, train"].get_color() == lines["real, test"].get_color() != lines["fake, train"].get_color()
    assert list(lines["fake, test"].get_ydata()) == [0.3, 0.3]


@pytest.mark.parametrize("unit", ["nats per example", "per cell, without unit"])
def test_curves_have_the_unit_of_the_models_loss(unit, tmp_path, figures, monkeypatch):
    monkeypatch.setattr(Affine, "loss_unit", unit)
    data = Dataset("two", {part: Split(torch.randn(20, 2)) for part in ("train", "test")})
    metrics = [{"step": step, "split": "train", "player": "model", "loss": 1.0} for step in (1, 2)]
    gallery.draw(tmp_path, Affine(AffineConfig()), data, metrics)
    assert figures["curves.png"].axes[0].get_ylabel() == unit


@pytest.mark.parametrize("moments", [2, 30])
def test_progress_shows_first_and_last_and_some_between(moments, tmp_path, figures):
    points = {100 * k: torch.full((5, 2), float(k)) for k in range(moments)}
    data = Dataset("two", {part: Split(torch.randn(20, 2)) for part in ("train", "test")})
    drawn = gallery.draw(tmp_path, Affine(AffineConfig()), data, [], points)
    assert tmp_path / "progress.png" in drawn
    titles = [axes.get_title() for axes in figures["progress.png"].axes]
    assert len(titles) == min(moments, 9)
    assert (titles[0], titles[-1]) == ("step 0", f"step {100 * (moments - 1):,}")


@pytest.mark.filterwarnings("ignore:No artists with labels")
def test_tables_are_shown_in_original_units(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.hist", lambda self, values, *a, **k: drawn.append(values))
    scaling = Scaling(mean=(100.0,) * 14, std=(10.0,) * 14, names=tuple("abcdefghijklmn"))
    x, samples = torch.randn(500, 14), torch.randn(500, 14)
    plots.histograms(x, samples, tmp_path / "table.png", scaling)
    assert len(drawn) == 2 * 12  # the first twelve columns
    assert drawn[0] == pytest.approx(x[:, 0].double().numpy() * 10 + 100)
    assert drawn[11] == pytest.approx(samples[:, 5].double().numpy() * 10 + 100)


@pytest.mark.filterwarnings("error")
def test_a_table_shows_words_whole_numbers_and_dates(figures, tmp_path):
    r = np.random.default_rng(0)
    frame = pd.DataFrame({
        "plan": r.choice(["basic", "a plan of many words", "$ plus"], 300), "age": r.integers(18, 90, 300),
        "seen": pd.Timestamp("2021-01-01") + pd.to_timedelta(r.integers(0, 700, 300), "D"), "size": r.normal(size=300),
        "zip": r.permutation(300) % 20,
    })  # fmt: skip
    data = genfuse.load_data(frame, types={"zip": "category"})
    x = data.splits["train"].x
    plots.table(x, x, tmp_path / "table.png", data.scaling, data.schema)
    plan, age, seen, size, code = figures["table.png"].axes
    assert [text.get_text() for text in plan.get_xticklabels()] == ["$ plus", "a plan of m…", "basic"]
    assert len(plan.patches) == 2 * 3
    edges = np.array([patch.get_x() for patch in age.patches])
    assert np.all(edges % 1 == 0.5), "whole numbers lie within a bin"
    assert len({round(patch.get_width(), 6) for patch in age.patches}) == 1
    assert {"2021", "2022"} & {text.get_text()[:4] for text in seen.get_xticklabels()}
    assert len(size.patches) == 2 * 39
    assert code.get_xlabel() == "20 categories"


@dataclass(frozen=True)
class AffineConfig:
    shape: tuple[int, ...] = (2,)
    conditional: bool = False
    steps: int = 2


class Affine(GenerativeModel):
    """x = step(... step(z)) with step(x) = x A^T + b, b = (0, 3 y) where it is conditional: a Gaussian."""

    Config = AffineConfig
    device = torch.device("cpu")
    A = torch.tensor([[1.0, 0.0], [0.3, 0.2]])

    def trajectory(self, z, y=None):
        assert (y is None) != self.config.conditional
        points = [z]
        for _ in range(self.config.steps):
            points.append(points[-1] @ self.A.T)
        if y is not None:
            points[-1] = points[-1] + torch.stack([torch.zeros(len(y)), 3.0 * y], 1)
        return points

    def sample(self, n, *, y=None, generator=None):
        return self.trajectory(torch.randn(n, 2, generator=generator), y)[-1]

    def log_prob(self, x, y=None):
        assert (y is None) != self.config.conditional
        mean = torch.zeros(len(x), 2) if y is None else torch.stack([torch.zeros(len(y)), 3.0 * y], 1)
        power = torch.linalg.matrix_power(self.A, self.config.steps)
        return MultivariateNormal(mean, power @ power.T).log_prob(x)

    def encode(self, x, y=None):
        assert (y is None) != self.config.conditional
        return x


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by the name of the picture."""
    drawn = {}

    def keep(self, file, format, save=Figure.savefig):
        drawn[file.name.removeprefix(".").removesuffix(".new")] = self
        save(self, file, format=format)

    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn


def test_a_density_is_that_of_scipy_in_original_units(tmp_path, figures):
    scaling = Scaling(mean=(100.0, -3.0), std=(10.0, 0.2), names=("height", "share"))
    model = Affine(AffineConfig())
    x = model.sample(4000)
    plots.density(model.log_prob, x, x[:1000], tmp_path / "density.png", scaling)
    heat, data, samples, _ = figures["density.png"].axes
    image = heat.images[0]
    left, right, bottom, top = image.get_extent()
    values = np.asarray(image.get_array())
    rows, columns = values.shape
    cell = (right - left) / columns * (top - bottom) / rows
    assert values.sum() * cell == pytest.approx(1, abs=1e-2)
    A = np.diag(scaling.std) @ np.linalg.matrix_power(model.A.double().numpy(), 2)
    for i, j in ((100, 100), (110, 120), (60, 80)):
        at = left + (j + 0.5) * (right - left) / columns, bottom + (i + 0.5) * (top - bottom) / rows
        assert values[i, j] == pytest.approx(multivariate_normal(scaling.mean, A @ A.T).pdf(at), rel=1e-3)
    assert image.origin == "lower"
    for axes, points in ((data, x), (samples, x[:1000])):
        assert np.asarray(axes.collections[0].get_offsets()) == pytest.approx(scaling.restore(points).numpy())
        assert (axes.get_xlim(), axes.get_ylim(), axes.get_xlabel()) == ((left, right), (bottom, top), "height")


@pytest.mark.parametrize(
    ("steps", "shown"), [(1, [0, 1]), (2, [0, 1, 2]), (7, list(range(8))), (21, [0, 3, 6, 9, 12, 15, 18, 21])]
)
def test_a_flow_is_shown_from_the_base_to_the_data(steps, shown, tmp_path, figures):
    trajectory = Affine(AffineConfig(steps=steps)).trajectory(torch.randn(200, 2))
    plots.flow(trajectory, tmp_path / "flow.png")
    panels = figures["flow.png"].axes
    titles = ["base", *(f"after {k} of {steps}" for k in shown[1:-1]), "data space"]
    assert [axes.get_title() for axes in panels] == titles
    colours = panels[0].collections[0].get_facecolor()
    assert len(np.unique(colours, axis=0)) > 150
    for axes, k in zip(panels, shown, strict=True):
        assert np.asarray(axes.collections[0].get_offsets()) == pytest.approx(trajectory[k].numpy())
        assert np.array_equal(axes.collections[0].get_facecolor(), colours)
        assert axes.get_aspect() == 1


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.filterwarnings("error")
def test_flows_in_two_dimensions_are_drawn_with_the_labels_of_the_data(conditional, tmp_path, figures):
    y = torch.arange(300) % 3 // 2  # a third of the labels is 1
    x = Affine(AffineConfig(conditional=True)).sample(300, y=y)
    data = Dataset("gaussians", {part: Split(x, y) for part in ("train", "test")})
    drawn = gallery.draw(tmp_path, Affine(AffineConfig(conditional=conditional)), data, [])
    assert [path.name for path in drawn] == ["samples.png", "density.png", "flow.png", "latent.png"]
    samples = np.asarray(figures["samples.png"].axes[1].collections[0].get_offsets())
    flowed = np.asarray(figures["flow.png"].axes[-1].collections[0].get_offsets())
    image = figures["density.png"].axes[0].images[0]
    bottom, top = image.get_extent()[2:]
    rows = np.asarray(image.get_array()).sum(1)
    upper = rows[np.linspace(bottom, top, len(rows)) > 1.5].sum() / rows.sum()
    share = 1 / 3 if conditional else 0
    assert [(samples[:, 1] > 1.5).mean(), (flowed[:, 1] > 1.5).mean()] == pytest.approx([share, share], abs=1e-2)
    assert upper == pytest.approx(share, abs=1e-2)
    assert figures["latent.png"].axes[0].get_title() == "the test split, encoded"


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    plots.sample_grid(torch.rand(4, 1, 8, 8), tmp_path / "grid.png")
    before = (tmp_path / "grid.png").read_bytes()

    def fail(self, file, format=None):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.sample_grid(torch.rand(4, 1, 8, 8), tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        (
            "digits",
            {},
            [*(f"{name}.png" for name in ("samples", "reconstructions", "interpolation", "latent")), *DECODED],
        ),
        ("toy:rings", {"decoder": "gaussian"}, ["samples.png", "latent.png"]),
    ],
)
def test_what_is_drawn_follows_from_verbs_and_data_and_is_the_same_each_time(name, settings, expected, tmp_path):
    data = genfuse.load_data(name)
    model = genfuse.create("vae", data, hidden=(8,), latent_dim=2, **settings).eval()
    state = torch.get_rng_state()
    first = gallery.draw(tmp_path / "a", model, data, [])
    torch.rand(1)
    second = gallery.draw(tmp_path / "b", model, data, [])
    torch.set_rng_state(state)
    assert [path.name for path in first] == expected
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    gallery.draw(tmp_path / "c", model, data, [])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gif_repeats_frames_that_are_grids_of_images(tmp_path):
    frames = torch.arange(4).view(4, 1, 1, 1, 1).expand(4, 3, 1, 8, 8) / 4
    plots.animation(frames.transpose(0, 1), tmp_path / "moving.gif", columns=3)
    with Image.open(tmp_path / "moving.gif") as gif:
        assert (gif.n_frames, gif.info["loop"], gif.info["duration"]) == (4, 0, 120)
        for i in range(4):
            gif.seek(i)
            assert gif.convert("L").getpixel((100, 30)) == pytest.approx(64 * i, abs=2)


def test_a_heat_map_is_the_darker_the_larger_the_share(tmp_path):
    plots.heat_map(np.array([[0.0, 1.0]]), ["shape"], ["z1", "z2"], tmp_path / "map.png")
    picture = opened(tmp_path / "map.png")[..., :3].sum(-1)
    height, width = picture.shape
    left, right = (picture[int(height * 0.35), int(width * x)] for x in (0.45, 0.75))
    assert right < left - 200
