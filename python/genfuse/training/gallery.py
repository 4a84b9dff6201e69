"""The pictures of a trained model: which ones follows from the verbs that it has."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfuse import plots
from genfuse.data import Dataset, resized
from genfuse.models import (
    Decodes,
    DrawsLatents,
    Encodes,
    GenerativeModel,
    HasPosterior,
    HasTrajectory,
    Reconstructs,
)

PAIRS = 16  # of originals and reconstructions
ROWS, STEPS = 8, 10  # of interpolations, and of traversals of latent dimensions
CLASSES = 20  # that have a row of samples each, at most
PLANE = 16  # latents along each of two dimensions
MOMENTS = 9  # of a training, its start and its end among them


@torch.no_grad()
def draw(
    folder: str | Path,
    model: GenerativeModel,
    data: Dataset,
    metrics: list[dict[str, Any]],
    progress: dict[int, Tensor] | None = None,
) -> list[Path]:
    """Draw all that ``model`` and ``data`` allow into ``folder``; returns the paths. Both must be on one device.

    Images: samples.png, reconstructions.png with ``reconstruct``, interpolation.png with ``latents``, denoising.png of
    diffusion, and of VAEs traversal.png and .gif, along latent dimensions, and manifold.png if there are two. Tables:
    samples.png, two columns as points beside the data's, more as histograms over them. Two columns: density.png with
    ``log_prob`` and flow.png with ``trajectory``. latent.png with ``encode``, curves.png if there are ``metrics``,
    and progress.png of images and of two columns where ``progress`` has samples (N, *shape) of several steps. A
    conditional model is given labels drawn from the test split. Draws from a fixed seed, and leaves torch's global
    generators alone; the model should be in evaluation mode.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []

    def at(name: str) -> Path:
        drawn.append(folder / name)
        return drawn[-1]

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        # Not the first ones: the test split may be sorted by label.
        chosen = torch.randperm(len(data.splits["test"]))[: plots.POINTS].to(model.device)
        test = data.batch("test", chosen)
        generator = torch.Generator(model.device).manual_seed(0)
        labels = test.y if model.conditional else None
        if data.given:
            x = model.sample(PAIRS // 2, y=test.y[: PAIRS // 2], generator=generator)  # type: ignore[call-arg, index]
            restorations(test.y[: PAIRS // 2], x, test.x[: PAIRS // 2], at("samples.png"))  # type: ignore[index]
        elif data.is_clip:
            clips = model.sample(plots.CLIPS, generator=generator, **_given(labels, plots.CLIPS))
            plots.sample_grid(clips, at("samples.png"))
        elif data.is_image:
            if labels is None or data.condition:
                images = model.sample(plots.SAMPLES, generator=generator, **_given(labels, plots.SAMPLES))
                plots.sample_grid(images, at("samples.png"))
            else:  # a row of each class, by its name
                classes = model.drawn_labels[:CLASSES].to(model.device)
                each = classes.repeat_interleave(8)
                images = model.sample(len(each), generator=generator, **_given(each, len(each)))
                names = [data.class_names[i] if data.class_names else str(i) for i in classes.tolist()]
                plots.rows(images.split(8), names, at("samples.png"))
        elif len(data.shape) == 1:
            samples = model.sample(len(test.x), generator=generator, **_given(labels, len(test.x)))
            plots.table(test.x, samples, at("samples.png"), data.scaling, data.schema)
        # Given a context the density of all data is a mean over contexts, which takes minutes if each takes an ODE.
        if data.shape == (2,) and "log_prob" in model.likelihoods and not data.condition:
            plots.density(partial(_log_prob, model, labels), test.x, samples, at("density.png"), data.scaling)
        if data.shape == (2,) and isinstance(model, HasTrajectory):
            z = torch.randn(plots.POINTS, 2, generator=generator, device=model.device)
            plots.flow(model.trajectory(z, **_given(labels, plots.POINTS)), at("flow.png"))
        if (data.is_image or data.is_clip) and isinstance(model, Reconstructs):
            originals = test.x[: PAIRS if data.is_image else plots.CLIPS]
            given = _given(labels, len(originals))
            plots.reconstructions(originals, model.reconstruct(originals, **given), at("reconstructions.png"))
        if data.is_image and not data.given and isinstance(model, DrawsLatents):
            a, b = (model.latents(ROWS, generator=generator) for _ in range(2))
            between = model.interpolate_latents(a, b, STEPS, **_given(labels, ROWS))
            plots.sample_grid(between.transpose(0, 1).flatten(0, 1), at("interpolation.png"), STEPS)
        if data.is_image and "steps" in inspect.signature(getattr(model, "trajectory", len)).parameters:
            noise = torch.randn(ROWS, math.prod(data.shape), generator=generator, device=model.device)
            path = model.trajectory(noise, **_given(labels, ROWS))  # type: ignore[operator]
            seen = [(0.5 + noise / 6).view_as(path[-1]), *plots.evenly(path[1:], STEPS - 1)]
            plots.sample_grid(torch.stack(seen, 1).flatten(0, 1), at("denoising.png"), len(seen))
        if isinstance(model, Encodes):
            points, title = _latents(model, test.x, labels)
            y = None if data.condition else test.y
            plots.latent_space(points, y, at("latent.png"), title, data.class_names)
            if data.is_image and isinstance(model, HasPosterior) and isinstance(model, Decodes):
                _decoded(model, points, labels, at)
    if any(entry["split"] == "train" for entry in metrics):
        plots.curves(metrics, at("curves.png"), model.loss_unit)
    if progress and len(progress) > 1:
        kept = dict(plots.evenly(list(progress.items()), MOMENTS))
        if data.is_image:
            plots.rows(kept.values(), [f"step {step:,}" for step in kept], at("progress.png"))
        else:
            plots.points_over_time(kept, test.x, at("progress.png"), data.scaling)
    return drawn


def restorations(given: Tensor, made: Tensor, truth: Tensor, path: str | Path) -> None:
    """Rows of images that were given (N, c, h, w), enlarged by bicubic interpolation if they are smaller, what a model
    made of them (N, C, H, W), and what they were made of."""
    size, shown = (made.shape[2], made.shape[3]), {"given": given}
    if given.shape[2:] != size:
        shown = {"given": resized(given, size, "nearest"), "bicubic": resized(given, size, "bicubic")}
    shown = {name: x.expand_as(made) for name, x in shown.items()}
    plots.rows([*shown.values(), made, truth], [*shown, "model", "truth"], path)


def _decoded(model: Any, points: Tensor, labels: Tensor | None, at: Callable[[str], Path]) -> None:
    """What lies along the latent dimensions that vary most, and, if there are two, all over their plane."""
    spread, middle = points.std(0, correction=int(len(points) > 1)), points.mean(0)
    chosen = spread.argsort(descending=True)[:ROWS].sort().values
    z = points[0].repeat(len(chosen), STEPS, 1)
    steps = torch.linspace(-2.5, 2.5, STEPS, device=points.device)
    rows = torch.arange(len(chosen))
    z[rows, :, chosen] = middle[chosen, None] + spread[chosen, None] * steps
    label = labels if labels is None else labels[:1]
    images = model.decode(z.flatten(0, 1), **_given(label, z[..., 0].numel()))
    plots.rows(images.split(STEPS), [f"z{i + 1}" for i in chosen.tolist()], at("traversal.png"))
    clips = images.unflatten(0, (-1, STEPS))
    there_and_back = torch.cat([clips, clips[:, 1:-1].flip(1)], 1)
    plots.animation(there_and_back, at("traversal.gif"), columns=len(chosen))
    if len(middle) == 2:
        across, up = (points[:, i].quantile(torch.linspace(0.01, 0.99, PLANE).to(points)) for i in range(2))
        z = torch.cartesian_prod(up.flip(0), across).flip(1)
        plots.sample_grid(model.decode(z, **_given(label, len(z))), at("manifold.png"), PLANE)


def _given(labels: Tensor | None, n: int) -> dict[str, Any]:
    """What the verbs of a model take beside n examples: the first n labels, from the start again if there are fewer."""
    return {} if labels is None else {"y": labels[torch.arange(n, device=labels.device) % len(labels)]}


def _log_prob(model: Any, labels: Tensor | None, x: Tensor) -> Tensor:
    """log p(x), (N,), for x (N, ...); of a conditional model that of the mixture over its labels as often as given."""
    if labels is None:
        log_prob: Tensor = model.log_prob(x)
        return log_prob
    classes, counts = labels.unique(return_counts=True)
    each = [model.log_prob(x, y=label.expand(len(x))) for label in classes]
    return torch.logsumexp(torch.stack(each, 1) + (counts / len(labels)).log(), 1)


def _latents(model: Encodes, x: Tensor, y: Tensor | None) -> tuple[Tensor, str]:
    """What ``encode`` makes of x, (N, D), and what to call it."""
    parts = zip(x.split(500), repeat(None) if y is None else y.split(500), strict=False)
    latents = torch.cat([model.encode(part, **_given(given, len(part))) for part, given in parts]).flatten(1)
    return latents, "posterior means" if isinstance(model, HasPosterior) else "the test split, encoded"
