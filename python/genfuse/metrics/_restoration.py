"""How near what a model makes of a given image comes to the image that it was made of."""

import inspect
from typing import Any

import torch
from torch import Tensor

from genfuse.data import Dataset, resized
from genfuse.errors import SettingsError
from genfuse.metrics._distances import frechet_distance
from genfuse.metrics._evaluate import some, undisturbed
from genfuse.metrics._features import extractor
from genfuse.models import GenerativeModel, sample_in_parts

MOST = 1000  # test examples, unless asked for otherwise


def restoration(
    model: GenerativeModel, data: Dataset, *, features: str = "auto", n: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compare what ``model`` makes of the images that are given with ``n`` test examples, by default 1,000, with these:
    a dict of plain numbers by method: the model, of diffusion models its one-step mean too, and ``bicubic`` and
    ``lanczos`` as Pillow has them, or ``given`` if the images are not smaller. Of each, means over the examples of
    ``psnr`` in dB and ``ssim`` (torchmetrics), of which higher is better, and of ``feature_distance``, the squared
    distance of a feature (`extractor`: of the classifier of the data if there is one), of which lower is better, as of
    ``frechet_distance``, that of all features, if there are more examples than features. By seed, always the same.

    Raises SettingsError for data that gives no image or n out of range, and what `extractor` raises.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    model.check_data(data)
    most = len(data.splits["test"])
    count = min(most, MOST) if n is None else n
    if data.given is None or not 1 <= count <= most:
        raise SettingsError(
            f"restorations are of data that gives images, and n in 1..{most}; got {data.name!r} and {n}"
        )
    truth, y = data.batch("test", some(most, count, seed).to(data.splits["test"].x.device))
    assert y is not None
    extract = extractor(features, data.before or data, device=model.device)
    size, several = (truth.shape[2], truth.shape[3]), "steps" in inspect.signature(model.sample).parameters
    made = {how: resized(y, size, how) for how in ("bicubic", "lanczos")} if y.shape[2:] != size else {}
    made = made or {"given": y[:, : truth.shape[1]].expand_as(truth)}
    with torch.no_grad(), undisturbed(model):
        for name, options in {"model": {}, **({"model, one step": {"steps": 1}} if several else {})}.items():
            generator = torch.Generator(model.device).manual_seed(seed)
            parts = sample_in_parts(model, count, y.to(model.device), generator, **options)
            made[name] = torch.cat([part.cpu() for part in parts])
    seen = extract(truth.to(model.device)).cpu()

    def of(x: Tensor) -> dict[str, float]:
        error = (x - truth.cpu()).square().flatten(1).mean(1).clamp(min=1e-10)
        alike = structural_similarity_index_measure(x, truth.cpu(), data_range=1.0, reduction="none")
        own = extract.of_samples(x.to(model.device)).cpu()
        found = {"psnr": float((-10 * error.log10()).mean()), "ssim": float(torch.as_tensor(alike).mean()),
                 "feature_distance": float((own - seen).square().mean())}  # fmt: skip
        return {**found, "frechet_distance": frechet_distance(own, seen)} if count > seen.shape[1] else found

    methods = {name: of(x.cpu()) for name, x in made.items()}
    return {"task": data.task, "n": count, "features": extract.name, "about": extract.about, "methods": methods}
