"""How odd examples are by a model, which columns make them so, and how well that finds what is labelled odd."""

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genfuse.applications._examples import Examples, examples
from genfuse.errors import DataError, SettingsError
from genfuse.metrics import undisturbed
from genfuse.models import GenerativeModel, Reconstructs, sample_in_parts
from genfuse.training import Run

if TYPE_CHECKING:
    import pandas as pd

CANDIDATES = 16  # values that a column is tried with
NAMED = 3  # columns that are named for a row
NEAREST = 5  # draws that an example's distance is taken to


class Method(NamedTuple):
    """A way to score examples."""

    about: str
    fits: Callable[[Any], bool]  # whether a model can
    of: Callable[[Any, Tensor, dict[str, Any], int], Tensor]  # (model, x, {"y": y}, samples) -> (N,)


def _minus_likelihood(model: Any, x: Tensor, given: dict[str, Any], samples: int) -> Tensor:
    if hasattr(model, "iwae_bound"):
        return -model.iwae_bound(x, samples, **given)
    return -getattr(model, "log_prob" if "log_prob" in model.likelihoods else "elbo")(x, **given)


def _error(model: Any, x: Tensor, given: dict[str, Any]) -> Tensor:
    """The mean squared error of a reconstructed cell, (N,)."""
    return (model.reconstruct(x, **given) - x).square().flatten(1).nanmean(1)


def _has_likelihood(model: Any) -> bool:
    return bool(model.likelihoods) or (hasattr(model, "elbo") and not getattr(model, "columns", None))


def _has_relative(model: Any) -> bool:
    has_error = isinstance(model, Reconstructs) or hasattr(model, "denoising_error")
    return len(model.shape or ()) > 2 and (has_error or (_has_likelihood(model) and model.levels is not None))


def _relative(model: Any, x: Tensor, given: dict[str, Any], samples: int) -> Tensor:
    """What is odd of pictures, (N,), less what is of plain and of busy ones alike: an error as a share of the variance
    of the picture's cells, or the model's nats as a share of those of zlib, as complexity (arXiv 1909.11480)."""
    variance = x.flatten(1).var(1, correction=0).clamp(min=1e-6)
    if isinstance(model, Reconstructs):
        return _error(model, x, given) / variance
    if hasattr(model, "denoising_error"):
        return model.denoising_error(x, **given) / variance
    levels = (x * (model.levels - 1)).round().to(torch.int16 if model.levels > 256 else torch.uint8).cpu().numpy()
    sizes = [8 * math.log(2) * len(zlib.compress(each.tobytes(), 9)) for each in levels]
    return _minus_likelihood(model, x, given, samples) / x.new_tensor(sizes)


def _nearest(model: Any, x: Tensor, given: dict[str, Tensor], samples: int) -> Tensor:
    """Mean distances (N,) of examples to the nearest of what the model draws, the same draws at each call: 100 times
    ``samples`` for all, or where something is given ``samples`` for each. Of tables with columns of several kinds
    between rows as networks see them."""
    columns, generator = getattr(model, "columns", None), torch.Generator(model.device).manual_seed(0)

    def distances(x: Tensor, n: int, y: Tensor | None = None) -> Tensor:
        draws = torch.cat(list(sample_in_parts(model, n, y, generator))).to(x)
        a, b = (each.flatten(1) if columns is None else columns.encode(each) for each in (x, draws))
        return torch.cdist(a, b).topk(min(NEAREST, n), largest=False).values.mean(1)

    if not given:
        return distances(x, 100 * samples)
    each = zip(x.split(1), given["y"].split(1), strict=True)
    return torch.cat([distances(one, samples, y.repeat(samples, *[1] * (y.dim() - 1))) for one, y in each])


METHODS = {
    "relative": Method(
        "what a model misses of a picture, as a share of all that there is",
        _has_relative,
        _relative,
    ),
    "likelihood": Method(
        "-log p(x), or what bounds it from above, in nats",
        _has_likelihood,
        _minus_likelihood,
    ),
    "reconstruction": Method(
        "mean squared error of a reconstructed cell",
        lambda model: isinstance(model, Reconstructs),
        lambda model, x, given, _: _error(model, x, given),
    ),
    "denoising": Method(
        "mean squared error of what the denoiser predicts, of a cell",
        lambda model: hasattr(model, "denoising_error"),
        lambda model, x, given, _: model.denoising_error(x, **given),
    ),
    "nearest": Method(
        f"mean distance to the {NEAREST} nearest of what the generator draws",
        lambda model: hasattr(model, "realness"),
        _nearest,
    ),
    "critic": Method(
        "minus the critic's output, which is no density",
        lambda model: hasattr(model, "realness"),
        lambda model, x, given, _: -model.realness(x, **given),
    ),
}


def find_method(model: GenerativeModel, method: str = "auto") -> str:
    """The name of a method that scores by this model. Raises SettingsError if there is none, or not this one."""
    if method not in ("auto", *METHODS):
        raise SettingsError(f"method must be auto or one of {', '.join(METHODS)}; got {method!r}")
    fitting = [name for name, each in METHODS.items() if each.fits(model)]
    if not fitting or (method != "auto" and method not in fitting):
        raise SettingsError(
            f"a {type(model).__name__} has no {'score' if method == 'auto' else method} of examples; it has: "
            f"{', '.join(fitting) or 'none'}"
        )
    return fitting[0] if method == "auto" else method


@torch.no_grad()
def scores(
    model: GenerativeModel,
    x: Tensor,
    y: Tensor | None = None,
    *,
    method: str = "auto",
    samples: int = 50,
    seed: int = 0,
) -> Tensor:
    """How odd examples x (N, *shape) are, (N,) on the CPU: the higher, the odder.

    ``method`` is the first of `METHODS` that the model has, or one by name: ``relative``, of pictures; ``likelihood``,
    -log p(x) in nats, exact or bounded from above (by -`iwae_bound` with ``samples`` draws, or -``elbo``);
    ``reconstruction``; ``denoising``; of adversarial models ``nearest``, the distance to what the generator draws (as
    AnoGAN, arXiv 1703.05921, with draws in place of a search); or ``critic``, which tells real from generated examples
    and no density: where neither is, it may be anything. The same seed gives the same scores.

    Raises SettingsError for a method that the model does not have.
    """
    of = METHODS[find_method(model, method)].of
    rows = max(1, min(500, 2**21 // max(1, x[:1].numel())))
    found = []
    with undisturbed(model):
        for start in range(0, len(x), rows):
            torch.manual_seed(seed + start)
            given = {} if y is None else {"y": y[start : start + rows]}
            found.append(of(model, x[start : start + rows], given, samples).cpu())
    return torch.cat(found) if found else torch.empty(0)


def weights(model: GenerativeModel, x: Tensor, y: Tensor | None = None, *, seed: int = 0, **options: Any) -> Tensor:
    """How much of the score of rows x (N, D) each column has to answer for, (N, D), at least 0:

        weight_j(x) = s(x) - min_k s(x_1, ..., x_(j-1), v_kj, x_(j+1), ..., x_D)

    with s of `scores`, and v_1j, v_2j, ... the values of column j in 16 samples of the model: by how much the best
    of these usual values, in this column alone, makes the row less odd. Of a likelihood they are nats.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    some = None if y is None else y[torch.arange(CANDIDATES, device=y.device) % len(y)]
    with undisturbed(model):
        candidates = torch.cat(list(sample_in_parts(model, CANDIDATES, some, generator))).to(x)
    now = scores(model, x, y, seed=seed, **options)
    repeated = None if y is None else y.repeat(CANDIDATES, *[1] * (y.dim() - 1))
    best = []
    for column in range(x.shape[1]):
        changed = x.repeat(CANDIDATES, 1, 1)  # (K, N, D)
        changed[:, :, column] = candidates[:, None, column]
        best.append(scores(model, changed.flatten(0, 1), repeated, seed=seed, **options).view(CANDIDATES, -1).amin(0))
    return (now[:, None] - torch.stack(best, 1)).clamp(min=0)


def score(
    run: Run | str | Path | Examples, file: Any = None, *, explain: int = 100, method: str = "auto", samples: int = 50,
    seed: int = 0, **reading: Any,
) -> "pd.DataFrame":  # fmt: skip
    """Score the examples of ``file`` by the model of a run: ``row`` from 0, and ``score``, as `scores` makes them; of
    pictures ``file``, too.

    For a table, ``column_1``, ``weight_1`` and so on are the three columns that weigh most, by `weights`, in each of
    the ``explain`` oddest rows. ``reading`` is for `examples`.
    """
    import pandas as pd

    found = run if isinstance(run, Examples) else examples(run, file, **reading)
    x, y = found.batch
    options: dict[str, Any] = {"method": find_method(found.model, method), "samples": samples, "seed": seed}
    frame = pd.DataFrame({"row": np.arange(len(x)), "score": scores(found.model, x, y, **options).numpy()})
    if files := found.data.splits[found.split].files:
        frame.insert(1, "file", files)
    can_sample = type(found.model).sample is not GenerativeModel.sample
    if len(found.data.shape) == 1 and explain > 0 and can_sample:
        odd = torch.from_numpy(np.argsort(-frame["score"].to_numpy(), kind="stable")[:explain].copy())
        of = weights(found.model, x[odd], None if y is None else y[odd], **options)
        heaviest = of.topk(min(NAMED, of.shape[1]), dim=1)
        names = np.array(found.names, dtype=object)
        for place in range(heaviest.indices.shape[1]):
            frame.loc[odd.numpy(), f"column_{place + 1}"] = names[heaviest.indices[:, place].numpy()]
            frame.loc[odd.numpy(), f"weight_{place + 1}"] = heaviest.values[:, place].numpy()
    return frame


def detection(scores: Any, labels: Any, *, fpr: float = 0.05) -> dict[str, Any]:
    """How well scores (N,) find the examples of label 1 among those of label 0: plain numbers.

    ``auroc``, the chance that one of label 1 has the higher score; ``average_precision``, beside ``share``, which it is
    for scores by chance; and the lowest ``threshold`` at which at most ``fpr`` of label 0 reach it, with the
    ``false_positive_rate``, ``true_positive_rate`` and ``precision`` of calling odd what does. ``roc`` and
    ``precision_recall`` are the curves.

    Raises DataError for labels that are not 0 and 1, of which there must be both, and scores that are not finite;
    SettingsError for an ``fpr`` outside of [0, 1].
    """
    from sklearn import metrics

    if not 0 <= fpr <= 1:
        raise SettingsError(f"the false-positive rate must be in 0..1; got {fpr}")
    values, odd = np.asarray(scores, np.float64), np.asarray(labels)
    if values.shape != odd.shape or values.ndim != 1:
        raise DataError(f"each example needs one label: got {values.shape} scores and {odd.shape} labels")
    if odd.dtype.kind not in "biuf" or not np.isin(odd, (0, 1)).all():
        others = [each for each in np.unique(odd).tolist() if each not in (0, 1)]
        raise DataError(f"labels must be 0, or 1 for what is to be found; got {', '.join(map(str, others[:5]))}")
    if len(np.unique(odd)) < 2:
        raise DataError(f"all {len(odd)} labels are {odd[0] if len(odd) else 'missing'}: both 0 and 1 are needed")
    if bad := int((~np.isfinite(values)).sum()):
        raise DataError(f"{bad} of {len(values)} scores are NaN or infinite")
    false, true, thresholds = metrics.roc_curve(odd, values, drop_intermediate=False)
    precision, recall, _ = metrics.precision_recall_curve(odd, values)
    at = int(np.flatnonzero(false <= fpr)[-1])
    caught = values >= thresholds[at]
    return {
        "examples": len(odd),
        "share": float(odd.mean()),
        "auroc": float(metrics.roc_auc_score(odd, values)),
        "average_precision": float(metrics.average_precision_score(odd, values)),
        "threshold": float(thresholds[at]) if at else None,
        "false_positive_rate": float(false[at]),
        "true_positive_rate": float(true[at]),
        "precision": float(odd[caught].mean()) if caught.any() else None,
        "roc": [false.tolist(), true.tolist()],
        "precision_recall": [recall.tolist(), precision.tolist()],
    }
