"""Pictures of tensors; no model is asked.

Images are (N, C, H, W) in [0, 1] with one channel or three. Every picture is written beside its place and renamed.
"""

import base64
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from genfuse._files import replacing
from genfuse.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SAMPLES = 64  # in a grid
CLIPS = 8  # of which each has a row
POINTS = 4000  # in a scatter plot or a histogram
COLUMNS = 12  # of a table
GRID = 200  # cells along each side of a density
PANELS = 8  # of a flow
TOGETHER = {"real": "real, fake", "fake": "real, fake"}  # loss terms that one panel of the curves compares
LINE = 40  # brightness of the lines between images
CELL = 64  # pixels that the shorter side of a small image is enlarged to
BESIDE_TEXT = 120  # pixels that an image is about as wide as in a figure, if it is not larger
DPI = 150
DATA, MODEL = "#3b6ea5", "#d1495b"
SPLITS = {"train": DATA, "validation": "#e09f3e", "test": MODEL}  # in curves
CONTEXT: Any = {  # for every figure
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # a column may be called $a
    "font.size": 10,
    "figure.dpi": DPI,
    "svg.hashsalt": "genfuse",  # the same picture is the same file
}


def sample_grid(images: Tensor, path: str | Path, columns: int | None = None) -> None:
    """Images (N, C, H, W) in a grid, by default about square; small ones enlarged, each pixel a block. Clips
    (N, T, C, H, W) have a row each, of their frames."""
    if images.dim() == 5:
        images, columns = images.flatten(0, 1), images.shape[1]
    _save(_tiled(_pixels(images), columns), path)


def write_picture(image: Tensor, path: str | Path) -> None:
    """One image (1, C, H, W) as a PNG, cell by cell."""
    _save(_pixels(image)[0], path)


def animation(clips: Tensor, path: str | Path, rate: int = 8, columns: int | None = None) -> None:
    """Clips (N, T, C, H, W) in a grid that moves, ``rate`` frames a second: a .gif, or a .mp4 if imageio is there.

    Raises SettingsError for a .mp4 without it.
    """
    from PIL import Image

    frames = [_tiled(_pixels(frame), columns) for frame in clips.unbind(1)]
    with replacing(Path(path)) as file:
        if file.suffix == ".gif":
            first, *others = (Image.fromarray(frame.squeeze()) for frame in frames)
            first.save(file, save_all=True, append_images=others, duration=1000 // rate, loop=0)
            return
        try:
            import imageio_ffmpeg  # noqa: F401  (imageio alone would take another writer)
            from imageio import v3
        except ModuleNotFoundError:
            raise SettingsError("a .mp4 needs imageio and imageio-ffmpeg: pip install 'genfuse[video]'") from None
        even = [
            np.pad(f, [(0, f.shape[0] % 2), (0, f.shape[1] % 2), (0, 0)]).repeat(4 - f.shape[2], 2)[..., :3]
            for f in frames
        ]
        v3.imwrite(file, np.stack(even), fps=rate, codec="libx264", macro_block_size=2)


def reconstructions(originals: Tensor, reconstructed: Tensor, path: str | Path) -> None:
    """Rows of originals (N, C, H, W), each over the row of their reconstructions; of clips (N, T, C, H, W), a clip's
    frames are a row."""
    if originals.dim() == 5:
        pairs = zip(originals, reconstructed, strict=True)
    else:
        columns = min(8, len(originals))
        pairs = zip(originals.split(columns), reconstructed.split(columns), strict=True)
    images = [row for pair in pairs for row in pair]
    rows(images, ["original", "reconstruction"] * (len(images) // 2), path)


def rows(images: Iterable[Tensor], names: Sequence[str], path: str | Path) -> None:
    """Rows of images (N, C, H, W), each with its name before it; a shorter one is filled up."""
    each = [_pixels(row) for row in images]
    columns = max(map(len, each))
    grid = _enlarged(_tiled(np.concatenate([_filled(row, columns) for row in each]), columns), columns)
    from matplotlib.transforms import blended_transform_factory

    label = math.ceil(13 * min(max(4, *map(len, names)), 30)) / DPI
    width = label + grid.shape[1] / DPI
    with _figure(path, (width, grid.shape[0] / DPI), layout=None) as figure:
        axes = _axes_of(grid, figure, label)
        where = blended_transform_factory(figure.transFigure, axes.transData)
        for i, name in enumerate(names):
            y = (i + 0.5) * grid.shape[0] / len(names)
            axes.text(0.93 * label / width, y, name, transform=where, ha="right", va="center", size=9)


def points_over_time(samples: dict[int, Tensor], x: Tensor, path: str | Path, scaling: Any = None) -> None:
    """Samples (N, 2) after each number of steps, in the box of data x (N, 2); in original units with a `Scaling`."""
    low, high = _box(_original_units(x, scaling))
    with _figure(path, (2.3 * len(samples), 2.6)) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(samples), sharey=True))
        for axes, (step, drawn) in zip(panels, samples.items(), strict=True):
            points = _original_units(drawn, scaling)
            axes.scatter(points[:, 0], points[:, 1], s=3, alpha=0.5, color=MODEL, linewidths=0, rasterized=True)
            axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
            axes.tick_params(labelsize=7)
            axes.set_title(f"step {step:,}", fontsize=10)


def neighbours(samples: Tensor, nearest: Tensor, path: str | Path) -> None:
    """Samples (N, C, H, W) in the first column, each beside the K training images (N, K, C, H, W) nearest to it."""
    columns = nearest.shape[1] + 1
    grid = _tiled(_pixels(torch.cat([samples[:, None].to(nearest), nearest], 1).flatten(0, 1)), columns)
    grid, title = _enlarged(grid, columns), 52 / DPI
    with _figure(path, (grid.shape[1] / DPI, title + grid.shape[0] / DPI), layout=None) as figure:
        top = 1 - title / figure.get_figheight()
        axes = _axes_of(grid, figure)
        axes.axvline(grid.shape[1] / columns, color=MODEL, lw=2)
        for x, text in ((0.5, "sample"), (1.1, "nearest training images")):
            ha = "center" if x == 0.5 else "left"
            figure.text(x / columns, (1 + top) / 2, text, ha=ha, va="center", size=9)


def latent_space(
    latents: Tensor,
    labels: Tensor | None,
    path: str | Path,
    title: str = "posterior means",
    class_names: Sequence[str] | None = None,
) -> None:
    """Latents (N, D) coloured by labels (N,), which are the numbers of ``class_names``, if there are any: with a legend
    for up to 20 of them, else with a colour bar. Beyond two dimensions, their two principal components."""
    from matplotlib import colormaps

    points, names = latents.double().cpu().numpy(), ("z1", "z2")
    if points.shape[1] > 2:
        points, shares = principal_components(points)
        title += f":\n2 of {latents.shape[1]} principal components, {shares.sum():.0%} of the variance"
        names = f"component 1 ({shares[0]:.0%})", f"component 2 ({shares[1]:.0%})"
    elif points.shape[1] == 1:
        points = np.column_stack([points, np.random.default_rng(0).normal(size=len(points))])
        names = "z1", "(spread at random)"
    with _figure(path, (6.4, 5.2)) as figure:
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=names[0], ylabel=names[1])
        axes.set_aspect("equal", adjustable="datalim")
        style: Any = {"s": 9, "alpha": 0.75, "linewidths": 0}
        if labels is None:
            axes.scatter(*points.T, color=DATA, **style)
            return
        different = labels.unique().tolist()
        if len(different) > 20:
            shown = axes.scatter(points[:, 0], points[:, 1], c=labels.cpu().numpy(), cmap="viridis", **style)
            figure.colorbar(shown, label="label")
            return
        cmap = colormaps["tab10" if len(different) <= 10 else "tab20"]
        for i, label in enumerate(different):
            name = class_names[label] if class_names else label
            axes.scatter(*points[(labels == label).cpu()].T, color=cmap(i), label=name, **style)
        legend: Any = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "markerscale": 2}
        axes.legend(title=None if class_names else "label", **legend)


def principal_components(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two principal components of points (N, D), (N, 2), and each one's share of the variance, (2,)."""
    centred = points - points.mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=len(points) < 2)
    singular = np.append(singular, 0.0)  # of a single point there is but one
    shares = singular**2 / max((singular**2).sum(), np.finfo(float).tiny)
    return centred @ axes[:2].T, shares[:2]


def curves(metrics: Sequence[dict[str, Any]], path: str | Path, unit: str = "nats per example") -> None:
    """Each loss term of each player over the steps, one colour a split; terms that one panel compares, one a term,
    with the training split as a line and the others dashed. ``unit`` is that of a single player's terms."""
    panels: dict[tuple[str, str], dict[tuple[str, str], list[tuple[int, float]]]] = {}
    for entry in metrics:
        if entry["split"] in SPLITS:
            for name, value in entry.items():
                if name not in ("step", "epoch", "split", "player", "lr", "examples_per_second"):
                    series = panels.setdefault((entry["player"], TOGETHER.get(name, name)), {})
                    series.setdefault((name, entry["split"]), []).append((entry["step"], value))
    several = len({player for player, _ in panels}) > 1
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with _figure(path, (4.2 * columns, 3.2 * rows)) as figure:
        for i, ((player, title), series) in enumerate(sorted(panels.items(), key=lambda panel: panel[0][0]), 1):
            axes = figure.add_subplot(rows, columns, i)
            title = title.replace("_", " ")
            axes.set(title=f"{player}: {title}" if several else title, xlabel="step")
            if (i - 1) % columns == 0 and not several:  # the objectives of a game have no unit in common
                axes.set_ylabel(unit)
            names = list(dict.fromkeys(name for name, _ in series))
            for (name, split), points in sorted(series.items(), key=lambda each: list(SPLITS).index(each[0][1])):
                steps, values = zip(*points, strict=True)
                style: dict[str, Any] = {"color": SPLITS[split], "label": split}
                if len(names) > 1:
                    style["color"], style["label"] = (DATA, MODEL)[names.index(name)], f"{name}, {split}"
                    style["ls"] = "-" if split == "train" else "--"
                axes.plot(steps, values, lw=1.4, marker="." if len(steps) < 60 else None, **style)
            axes.set_ylim(*_without_the_fall([v for points in series.values() for _, v in points]))
            if i == 1 or len(names) > 1:
                axes.legend()


def scatter(x: Tensor, samples: Tensor, path: str | Path, scaling: Any = None) -> None:
    """Points (N, 2) of the data beside samples (N, 2), on the same axes; in original units with a `Scaling`."""
    names = (scaling and scaling.names) or ("x1", "x2")
    both = _original_units(x, scaling), _original_units(samples, scaling)
    low, high = _box(both[0])  # stray samples must not shrink the data
    with _figure(path, (8.4, 4.2)) as figure:
        for i, (title, points, colour) in enumerate((("data", both[0], DATA), ("samples", both[1], MODEL)), 1):
            axes = figure.add_subplot(1, 2, i)
            axes.set(title=title, xlabel=names[0], ylabel=names[1])
            axes.scatter(points[:, 0], points[:, 1], s=4, alpha=0.5, color=colour, linewidths=0, rasterized=True)
            axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))


def density(
    log_prob: Callable[[Tensor], Tensor], x: Tensor, samples: Tensor, path: str | Path, scaling: Any = None
) -> None:
    """The density exp(log_prob(x)), (N, 2) -> (N,), over the box of the data, beside points of data and samples (N, 2).

    With a `Scaling` in original units, of the points and of the density, which is then divided by the two std.
    """
    names = (scaling and scaling.names) or ("x1", "x2")
    points, drawn = _original_units(x, scaling), _original_units(samples, scaling)
    low, high = _box(points)
    edges = np.linspace(low, high, GRID + 1)
    across, up = np.meshgrid(*(0.5 * (edges[1:] + edges[:-1])).T)  # (GRID, GRID): rows go up, columns across
    grid = torch.from_numpy(np.stack([across.ravel(), up.ravel()], 1))
    grid = (grid if scaling is None else scaling.apply(grid)).to(x)
    logs = torch.cat([log_prob(part) for part in grid.split(4096)]).double().cpu().numpy()
    values = np.exp(logs - (0 if scaling is None else np.log(scaling.std).sum())).reshape(GRID, GRID)
    with _figure(path, (12.6, 4.2)) as figure:
        panels = figure.subplots(1, 3, sharex=True, sharey=True)
        for axes, title in zip(panels, ("density", "data", "samples"), strict=True):
            axes.set(title=title, xlabel=names[0], xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        panels[0].set_ylabel(names[1])
        panels[0].grid(False)
        # The few brightest cells would press the rest into black.
        shown = panels[0].imshow(
            values, extent=(low[0], high[0], low[1], high[1]), origin="lower", aspect="auto", cmap="magma",
            vmin=0, vmax=np.nanquantile(values, 0.999),
        )  # fmt: skip
        figure.colorbar(shown, ax=panels[0])
        for axes, cloud, colour in zip(panels[1:], (points, drawn), (DATA, MODEL), strict=True):
            axes.scatter(cloud[:, 0], cloud[:, 1], s=4, alpha=0.5, color=colour, linewidths=0, rasterized=True)


def flow(trajectory: Sequence[Tensor], path: str | Path) -> None:
    """Points (N, 2) from the base over each step of a flow to the data, at most `PANELS` of them chosen evenly.

    A point has the colour of its angle in the base all the way, and is the darker, the further out it was there. Each
    panel has a scale of its own.
    """
    from matplotlib.colors import hsv_to_rgb

    last = len(trajectory) - 1
    chosen = evenly(list(range(last + 1)), PANELS)
    base = trajectory[0].double().cpu().numpy()
    hue = np.arctan2(base[:, 1], base[:, 0]) / (2 * np.pi) % 1
    rank = np.hypot(*base.T).argsort().argsort() / len(base)
    colours = hsv_to_rgb(np.stack([hue, 0.35 + 0.6 * rank, 0.95 - 0.35 * rank], 1))
    with _figure(path, (2.3 * len(chosen), 2.6)) as figure:
        for axes, k in zip(np.atleast_1d(figure.subplots(1, len(chosen))), chosen, strict=True):
            points = trajectory[k].double().cpu().numpy()
            low, high = np.quantile(points, (0.002, 0.998), axis=0)  # a few stray points must not shrink the rest
            middle, half = (low + high) / 2, 0.55 * (high - low).max() + 1e-9
            axes.scatter(points[:, 0], points[:, 1], s=3, c=colours, linewidths=0)
            axes.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
            axes.set_aspect("equal")
            axes.tick_params(labelsize=7)
            axes.set_title("base" if k == 0 else "data space" if k == last else f"after {k} of {last}", fontsize=10)


def table(x: Tensor, samples: Tensor, path: str | Path, scaling: Any = None, schema: Any = None) -> None:
    """Rows (N, D) of the data and samples: two columns of numbers as points, others as histograms."""
    if x.shape[1] == 2 and (schema is None or schema.real):
        scatter(x, samples, path, scaling)
    else:
        histograms(x, samples, path, scaling, schema)


def histograms(x: Tensor, samples: Tensor, path: str | Path, scaling: Any = None, schema: Any = None) -> None:
    """The first columns of a table (N, D), data and samples over each other; in original units with a `Scaling`, and
    with a `Schema` whole numbers in whole bins, categories by their words and dates as dates."""
    both = _original_units(x, scaling), _original_units(samples, scaling)
    count = min(COLUMNS, both[0].shape[1])
    names = (scaling and scaling.names) or [f"column {i + 1}" for i in range(count)]
    columns = min(3, count)
    with _figure(path, (3.6 * columns, 2.8 * math.ceil(count / columns))) as figure:
        for i in range(count):
            axes = figure.add_subplot(math.ceil(count / columns), columns, i + 1)
            column = schema and schema.columns[i]
            seconds = 86_400 if column and column.unit == "seconds" else 1  # dates are drawn in days
            shown = [values[:, i][~np.isnan(values[:, i])] / seconds for values in both]
            bins = _bins(shown[0], column)
            outside = ((shown[1] < bins[0]) | (shown[1] > bins[-1])).mean()
            for values, whole, colour, label in zip(shown, both, (DATA, MODEL), ("data", "samples"), strict=True):
                # Per example, so that samples outside the bins lower the histogram and do not sharpen it.
                weights = np.full(len(values), 1 / len(whole))
                wide = 0.8 if column and column.coded else 1.0
                axes.hist(values, list(bins), weights=weights, color=colour, alpha=0.55, label=label, rwidth=wide)
            axes.set(title=names[i], yticks=[])
            if column and column.coded:
                _words(axes, column.categories)
            elif column and column.kind == "date":
                from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

                axes.xaxis.set_major_locator(places := AutoDateLocator(minticks=2, maxticks=7))
                axes.xaxis.set_major_formatter(ConciseDateFormatter(places))
            if outside >= 0.005:  # of the data it is 0.002
                axes.set_xlabel(f"{outside:.1%} of the samples lie outside", color=MODEL, fontsize=8)
            if i == 0:
                axes.legend()
        if count < both[0].shape[1]:
            figure.suptitle(f"the first {count} of {both[0].shape[1]} columns", fontsize=9)


def _bins(values: np.ndarray, column: Any) -> np.ndarray:
    """Edges of some 40 bins, of whole numbers around whole ones; of a category one each."""
    if column and column.coded:
        return np.arange(len(column.categories) + 1) - 0.5
    low, high = np.quantile(values, (0.001, 0.999))
    if column and column.whole and column.unit != "seconds":
        return np.arange(np.floor(low), high + (step := max(1, math.ceil((high - low) / 40))) + 1, step) - 0.5
    return np.linspace(low, high if high > low else low + 1, 40)


def _words(axes: Any, words: Sequence[str]) -> None:
    """Name the places 0, 1, ... of an axis by words, as far as there is room."""
    if len(words) > 12:
        axes.set(xticks=[], xlabel=f"{len(words)} categories")
        return
    short = [word if len(word) <= 12 else f"{word[:11]}\u2026" for word in words]
    tilted: Any = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len("".join(short)) > 30 else {}
    axes.set_xticks(range(len(words)), short, **tilted)


def inline(file: Path, width: int | None = None) -> str:
    """A picture as HTML that holds it, at most as many CSS pixels wide, and no wider than where it stands."""
    kind = {".svg": "svg+xml"}.get(file.suffix, file.suffix[1:])
    most = "100%" if width is None else f"min(100%, {width}px)"
    content = base64.b64encode(file.read_bytes()).decode()
    return f'<img src="data:image/{kind};base64,{content}" alt="{file.stem}" style="max-width:{most}">'


def as_html(draw: Callable[..., None], *args: Any, suffix: str = "svg") -> str:
    """The picture that ``draw(*args, path)`` makes, as HTML that holds it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"picture.{suffix}")
        draw(*args, file)
        return inline(file)


def detection(
    roc: Sequence[Sequence[float]], precision_recall: Sequence[Sequence[float]], share: float, path: str | Path
) -> None:
    """ROC curve, (false, true) positive rates, and precision over recall, (recall, precision), beside those of chance:
    the diagonal, and the ``share`` of what is to be found."""
    with _figure(path, (8.4, 4.2)) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(*roc, color=MODEL, lw=1.6, label="scores")
        left.plot([0, 1], [0, 1], color=DATA, ls="--", lw=1.2, label="chance")
        left.set(title="ROC curve", xlabel="false-positive rate", ylabel="true-positive rate")
        right.plot(*precision_recall, color=MODEL, lw=1.6)
        right.axhline(share, color=DATA, ls="--", lw=1.2)
        right.set(title="precision and recall", xlabel="recall", ylabel="precision")
        for axes in (left, right):
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        left.legend(loc="lower right")


def heat_map(values: Any, rows: Sequence[str], columns: Sequence[str], path: str | Path) -> None:
    """Shares (R, C) in 0..1 as a table of cells, the darker the larger, with their values where there is room."""
    tall, wide = len(rows), len(columns)
    with _figure(path, (1.8 + 0.55 * wide, 1.1 + 0.45 * tall)) as figure:
        axes = figure.add_subplot()
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.grid(False)
        axes.set_yticks(range(tall), rows)
        axes.set_xticks(range(wide), columns, rotation=0 if wide <= 20 else 90)
        axes.set_title("share of a factor that a latent tells, I / H", fontsize=10)
        for i, j in np.ndindex(tall, wide if wide <= 20 else 0):
            style: Any = {"ha": "center", "va": "center", "size": 8, "color": "w" if values[i, j] > 0.6 else "k"}
            axes.text(j, i, f"{values[i, j]:.2f}", **style)


def evenly(items: list[Any], most: int) -> list[Any]:
    """The first, the last and others evenly between them, ``most`` at most."""
    last = len(items) - 1
    return [items[k] for k in np.linspace(0, last, min(most, last + 1)).round().astype(int)]


def _box(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest corner, (2,), of points (N, 2), with a margin."""
    low, high = points.min(0), points.max(0)
    margin = 0.1 * (high - low) + 1e-9
    return low - margin, high + margin


def _without_the_fall(values: list[float]) -> tuple[float | None, float | None]:
    """Limits that leave out the steep fall of the first steps, which would press the rest into a line."""
    ordered = np.sort(np.asarray(values))
    low, high = ordered[0], np.quantile(ordered, 0.95)
    if len(ordered) < 20 or ordered[-1] - low < 2 * (high - low):
        return None, None
    margin = 0.08 * (high - low) + 1e-9
    return float(low - margin), float(high + margin)


def _original_units(x: Tensor, scaling: Any) -> np.ndarray:
    return (x if scaling is None else scaling.restore(x)).double().cpu().numpy()


def _pixels(images: Tensor) -> np.ndarray:
    """(N, C, H, W) in [0, 1] as (N, H, W, C) of bytes. More than three channels: the first; two: the first."""
    images = images if images.shape[1] in (1, 3) else images[:, :1]
    return (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _save(pixels: np.ndarray, path: str | Path) -> None:
    """(H, W, C) of bytes as a PNG."""
    from PIL import Image

    with replacing(Path(path)) as file:
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, format="PNG")


def _filled(images: np.ndarray, columns: int) -> np.ndarray:
    """Places that are no images added until the last row is full: of the lines' colour, as black may be one."""
    return np.pad(images, ((0, -len(images) % columns), (0, 0), (0, 0), (0, 0)), constant_values=LINE)


def _tiled(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """(N, H, W, C) as one image of rows of ``columns``, enlarged to be seen, with dark lines between."""
    square = math.ceil(len(images) / math.isqrt(len(images)))
    columns = columns or min(square, square + 1, key=lambda count: -len(images) % count)
    images = _filled(images, columns)
    tall, wide, channels = images.shape[1:]
    scale = max(1, math.ceil(CELL / min(tall, wide)))
    images = images.repeat(scale, 1).repeat(scale, 2)
    line = max(1, min(tall, wide) * scale // 32)
    images = np.pad(images, ((0, 0), (0, line), (0, line), (0, 0)), constant_values=LINE)
    rows = images.reshape(-1, columns, *images.shape[1:]).swapaxes(1, 2)
    grid = rows.reshape(rows.shape[0] * rows.shape[1], -1, channels)
    return np.pad(grid, ((line, 0), (line, 0), (0, 0)), constant_values=LINE)


def _enlarged(grid: np.ndarray, columns: int) -> np.ndarray:
    """A grid of images as large as it is seen beside text: a pixel of its own is a block of pixels of the figure."""
    scale = max(1, round(BESIDE_TEXT / (grid.shape[1] / columns)))
    return grid.repeat(scale, 0).repeat(scale, 1)


def _axes_of(grid: np.ndarray, figure: "Figure", left: float = 0) -> "Axes":
    """Axes, in pixels of the grid, over the lower right end of a figure, which shows it pixel for pixel there."""
    tall, wide = grid.shape[:2]
    figure.figimage(grid.squeeze(), round(left * DPI), 0, cmap="gray", vmin=0, vmax=255)
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 0, 1 - left / width, tall / DPI / height), zorder=1)  # the image has 0
    axes.set(xlim=(0, wide), ylim=(tall, 0))
    axes.axis("off")
    return axes


@contextmanager
def _figure(
    path: str | Path, size: tuple[float, float], layout: Literal["constrained"] | None = "constrained"
) -> Iterator["Figure"]:
    """A figure that becomes the picture ``path``, made without pyplot and so without a display or global state."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import AutoLocator, MaxNLocator

    with matplotlib.rc_context(CONTEXT):
        figure = Figure(size, layout=layout)
        yield figure
        for axes in figure.axes:  # so that ticks do not run into each other
            ticks = max(2, int(2.2 * axes.get_position().width * size[0]))
            if axes.xaxis.get_major_locator().__class__ is AutoLocator:
                axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=(1, 2, 2.5, 5, 10)))
        with replacing(Path(path)) as file:
            more: Any = {"metadata": {"Date": None}} if file.suffix == ".svg" else {}
            figure.savefig(file, format=file.suffix[1:], **more)
