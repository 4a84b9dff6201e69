"""Measure a model on its data by the verbs that it has."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from genfuse.data import Dataset
from genfuse.errors import SettingsError
from genfuse.models import GenerativeModel, HasPosterior

ACTIVE = 0.01  # a latent dimension is active where Var_x E[z | x] is above this: arXiv 1509.00519, section 5.2


@torch.no_grad()
def evaluate(
    model: GenerativeModel,
    data: Dataset,
    *,
    samples: int = 50,
    limit: int | None = None,
    seed: int = 0,
    splits: Sequence[str] = ("train", "validation", "test"),
) -> dict[str, dict[str, float | int | list[float]]]:
    """Measure ``model`` on those of ``splits`` that ``data`` has: a dict of plain numbers per split.

    ``examples`` is how many were used: all, or ``limit`` of each split, by chance and always the same. The rest are
    means over them, each given if the model has the verb for it:

    - what ``model.likelihoods`` names: ``log_prob`` (exact) and ``elbo`` in nats per example, ``bits_per_dim``; if that
      is nothing, ``elbo`` all the same, which is then no bound of a density, but what is trained;
    - ``log_prob_original_units``: of a table's rows before they were standardized, log p(x) - sum log std, which can be
      compared across scalings;
    - ``iwae_bound_K`` with K = ``samples``, nats per example;
    - ``reconstruction_error``: squared error of a reconstructed cell;
    - ``kl`` and ``kl_per_dimension``: KL(q(z | x) || p(z)) in nats, if ``posterior`` is a diagonal Gaussian, and the
      prior N(0, I), as it is of a model without an attribute ``prior`` that is something else;
    - ``active_units``: how many latent dimensions have Var_x E[z | x] above 0.01 (arXiv 1509.00519, section 5.2).

    A conditional model is given the labels. The same seed gives the same numbers; torch's global generators and the
    model's mode are left as they were. Memory does not grow with the number of examples. Raises SettingsError if
    samples or limit is below 1, and what ``model.check_data`` raises.
    """
    if samples < 1 or (limit is not None and limit < 1):
        raise SettingsError(f"samples and limit must be at least 1, got samples={samples} and limit={limit}")
    model.check_data(data)
    with undisturbed(model):
        return {
            name: _evaluate_split(model, data, name, samples, limit, seed) for name in splits if name in data.splits
        }


def some(count: int, most: int, seed: int) -> Tensor:
    """The indices, rising, of ``most`` of ``count`` examples by chance: the first ones may all be of one class."""
    if most >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values


@contextmanager
def undisturbed(model: GenerativeModel) -> Iterator[None]:
    """Evaluation mode, and afterwards the model's mode and torch's global generators as they were."""
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        model.train(training)


def _evaluate_split(
    model: GenerativeModel, data: Dataset, split: str, samples: int, limit: int | None, seed: int
) -> dict[str, float | int | list[float]]:
    examples = min(len(data.splits[split]), limit or math.inf)
    rows = max(1, min(500, 2**21 // math.prod(data.shape)))
    generator = torch.Generator(data.device).manual_seed(seed)
    chosen = some(len(data.splits[split]), int(examples), 0)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    sums: dict[str, Any] = defaultdict(float)
    for start in range(0, int(examples), rows):
        batch = data.batch(split, chosen[start : start + rows], generator)
        given = {"y": batch.y.to(model.device)} if model.conditional and batch.y is not None else {}
        for name, value in _measure(model, batch.x.to(model.device, dtype), given, samples, seed + start).items():
            sums[name] += value.double().sum(0).cpu()
    means = {name: value / examples for name, value in sums.items()}
    if data.scaling and "log_prob" in means:
        means["log_prob_original_units"] = means["log_prob"] - sum(map(math.log, data.scaling.std))

    result: dict[str, float | int | list[float]] = {"examples": int(examples)}
    mu, mu_squared = means.pop("_mu", None), means.pop("_mu_squared", None)
    result.update({name: value.tolist() for name, value in means.items()})
    if mu is not None:
        result["active_units"] = int((mu_squared - mu.square() > ACTIVE).sum())
    return result


def _measure(model: Any, x: Tensor, given: dict[str, Tensor], samples: int, seed: int) -> dict[str, Tensor]:
    """What is measured of each example: (N,), or (N, D) per latent dimension. ``given`` holds the labels, if any."""
    found = {}
    torch.manual_seed(seed)
    trained = ("elbo",) if hasattr(model, "elbo") and getattr(model, "columns", None) is None else ()
    for verb in model.likelihoods or trained:
        torch.manual_seed(seed)  # the same noise for each, so that bits per dimension are those of the ELBO
        found[verb] = getattr(model, verb)(x, **given)
    if hasattr(model, "iwae_bound"):
        found[f"iwae_bound_{samples}"] = model.iwae_bound(x, samples, **given)
    if hasattr(model, "reconstruct"):
        found["reconstruction_error"] = (model.reconstruct(x, **given) - x).square().nan_to_num().flatten(1).mean(1)
    if isinstance(model, HasPosterior):
        q = model.posterior(x, **given)
        if isinstance(q, Independent) and isinstance(q.base_dist, Normal):
            mu = q.mean
            found |= {"_mu": mu.double(), "_mu_squared": mu.double().square()}
            if getattr(model, "prior", None) is None:
                kl = kl_divergence(q.base_dist, Normal(torch.zeros_like(mu), 1.0))
                found |= {"kl": kl.sum(1), "kl_per_dimension": kl}
    return found
