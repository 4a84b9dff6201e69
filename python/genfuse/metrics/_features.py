"""Feature extractors by name: what the metrics of samples compare."""

import math
import re
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genfuse._files import cache, demand, read_tensors, write_tensors
from genfuse._version import __version__
from genfuse.data import Dataset
from genfuse.errors import DataError, SettingsError
from genfuse.models import check_range
from genfuse.nn import Columns, conv_encoder, mlp

FEATURES = ("auto", "columns", "pixels", "random-conv", "classifier", "inception")
WIDTH = 64  # features of the networks here, few enough for a covariance of a few hundred examples
BATCH = 500  # examples that pass through a network at a time
INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


@dataclass(frozen=True)
class Extractor:
    """Examples (N, *shape), as batches of the data set have them -> features (N, D)."""

    name: str
    about: str  # one line for those who read its numbers
    extract: Callable[[Tensor], Tensor]
    levels: int | None = None  # of discrete data, whose examples are in [0, 1]

    def __call__(self, x: Tensor) -> Tensor:
        """Raises DataError for examples that are not in the range of the data set."""
        check_range(x, self.levels)
        return self.of_samples(x)

    @torch.no_grad()
    def of_samples(self, x: Tensor) -> Tensor:
        """The features (N, D) of what a model drew, which may be out of the range."""
        features = torch.cat([self.extract(part.float()).flatten(1) for part in x.split(BATCH)])
        return features.cpu() if features.device.type == "mps" else features  # which has no float64


def extractor(
    name: str,
    data: Dataset,
    *,
    device: torch.device | str = "cpu",
    inception_weights: str | Path | None = None,
) -> Extractor:
    """The extractor ``name`` for examples of ``data``, with its network, if any, on ``device``.

    - ``columns``: the values themselves, of a table its standardized columns;
    - ``pixels``: the values of an image or a clip, in [0, 1];
    - ``random-conv``: 64 features of a convolution network with random weights, always the same ones, which has the
      frames of a clip as channels;
    - ``classifier``: the 64 features before the last layer of the network that `train_features` trained on ``data``;
    - ``inception``: what the TorchScript module in the file ``inception_weights`` makes of uint8 RGB images;
    - ``auto``: the classifier if there is one, else random-conv for images and clips, and columns for all else.

    Raises SettingsError for a name that is unknown or has no meaning for the data, for a classifier that is yet to be
    trained, and for a file of weights that is missing or not what is wanted.
    """
    if name not in FEATURES:
        raise SettingsError(f"features must be one of {', '.join(FEATURES)}; got {name!r}")
    if name == "auto":
        trained = data.classes is not None and classifier_path(data).is_file()
        name = "classifier" if trained else "random-conv" if data.is_image or data.is_clip else "columns"
    seen = data.is_image or (data.is_clip and name != "inception")
    if name in ("pixels", "random-conv", "inception") and not seen:
        raise SettingsError(
            f"features {name!r} are of images, but the data set {data.name!r} has examples of shape {data.shape}: "
            "use columns, or classifier if there are labels"
        )
    if name == "columns" and data.is_image:
        raise SettingsError(f"features 'columns' are of tables, but the data set {data.name!r} has images: use pixels")
    if inception_weights is not None and name != "inception":
        raise SettingsError(f"a file of inception weights goes with features 'inception', got {name!r}")
    extract: Callable[[Tensor], Tensor] = nn.Flatten()
    about = "raw pixels" if name == "pixels" else "the columns themselves" + (", standardized" if data.scaling else "")
    if name == "columns" and data.columns is not None:
        about = "the columns as networks see them: normal scores, and one-hot categories and missing cells"
        extract = Columns(data.columns).to(device).encode
    elif name == "random-conv":
        about = f"{WIDTH} features of a convolution network with random weights, not trained"
        extract = _random_network(data.shape).to(device)
    elif name == "classifier":
        network, accuracy = _load_classifier(data)
        about = f"{WIDTH} features of a classifier of {data.name}, held-out accuracy {accuracy:.2%}"
        extract = _each_channel(_without_logits(network).to(device), data)
    elif name == "inception":
        about, extract = f"TorchScript module {inception_weights}", _inception(inception_weights, data, device)
    return Extractor(name, about, extract, data.levels)


def classifier_path(data: Dataset) -> Path:
    """Where the classifier of a data set is kept: in ``$GENFUSE_CACHE/features``, by default of ~/.cache/genfuse.

    Its file is named by the content of the training split, so that data that has changed has another one. Stacked data
    has that of its channels, which is applied to each.
    """
    data = data.channels or data
    slug = re.sub(r"[^\w.-]+", "-", data.name)[-40:].strip("-")
    return cache("features") / f"{slug}-{data.fingerprint()}.safetensors"


def train_features(
    data: Dataset,
    *,
    steps: int = 2000,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
) -> tuple[Path, float]:
    """Train the classifier of ``data`` and store it; returns its file and its accuracy on the test split.

    A small convolution network for images and clips, an MLP for all else, trained on the training split by Adam with a
    learning rate that falls from 1e-3 to 0. The file is safetensors, with the facts of the training in its header.
    Torch's global generators are left as they were. Raises DataError for data without labels of two classes or more,
    and SettingsError if the file exists, unless ``overwrite``.
    """
    from genfuse.training.process import Progress

    data = (data.channels or data).to(device)
    if steps < 1 or batch_size < 1:
        raise SettingsError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    if bare := [part for part in ("train", "test") if data.splits[part].y is None]:
        raise DataError(
            f"data set {data.name!r}: a classifier needs labels, and there are none in its splits {', '.join(bare)}; "
            "use other features, such as random-conv for images or columns for tables"
        )
    if (data.classes or 0) < 2:
        raise DataError(f"data set {data.name!r}: a classifier needs at least 2 classes; got {data.classes}")
    path = classifier_path(data)
    if path.exists() and not overwrite:
        raise SettingsError(f"there is a classifier of {data.name!r} already, {path}: ask for overwrite to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)

    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices), Progress(steps, 0) as progress:
        torch.manual_seed(seed)
        network = _classifier(data.shape, data.classes or 0).to(device)
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        count, epoch = len(data.splits["train"]), 0
        order = torch.empty(0, dtype=torch.int64)
        for step in range(1, steps + 1):
            if not len(order):
                order, epoch = torch.randperm(count), epoch + 1
            rows, order = order[:batch_size], order[batch_size:]
            x, y = data.batch("train", rows)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()  # type: ignore[arg-type]
            optimizer.step()
            schedule.step()
            progress.step(step, epoch)
        with torch.no_grad():
            parts = data.batches("test", torch.arange(len(data.splits["test"])).split(BATCH))
            accuracy = torch.cat([network(x).argmax(1) == y for x, y in parts]).double().mean().item()
            _scale(network, data.batch("train", torch.randperm(count)[:2000]).x)
    facts = {
        "genfuse": __version__,
        "data": data.name,
        "shape": list(data.shape),
        "classes": data.classes,
        "fingerprint": data.fingerprint(),
        "accuracy": accuracy,
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
    }
    write_tensors(path, {key: value.cpu().contiguous() for key, value in network.state_dict().items()}, facts)
    return path, accuracy


def train_missing(name: str, data: Dataset, device: torch.device | str, say: Callable[[str], object]) -> None:
    """`train_features` where ``auto`` would take features of random weights for want of a classifier.

    By those, noise can be nearer to real images than images are that one can read.
    """
    labelled = (data.classes or 0) > 1 and all(data.splits[part].y is not None for part in ("train", "test"))
    if name == "auto" and (data.is_image or data.is_clip) and labelled and not classifier_path(data).is_file():
        say(f"training a classifier of {data.name}, by whose features samples are judged")
        passes = 200 * math.ceil(len(data.splits["train"]) / 128)  # what is few is learned by then
        few: Any = {"steps": passes} if passes < 2000 else {}
        say(f"its held-out accuracy: {train_features(data, device=device, **few)[1]:.2%}")


def _classifier(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Ends in an MLP, whose last layer makes the logits (N, classes) of the features (N, WIDTH)."""
    if len(shape) in (3, 4):
        return _convolutions(shape, (WIDTH,), classes)
    return nn.Sequential(nn.Flatten(), mlp([torch.Size(shape).numel(), 256, WIDTH, classes]))


def _without_logits(network: nn.Sequential) -> nn.Sequential:
    *stages, head = network.children()
    return nn.Sequential(*stages, *list(head.children())[:-1])


def _scale(network: nn.Sequential, x: Tensor) -> None:
    """Give the features of x a mean square of 1 and leave the logits: without it kernel distances run to thousands."""
    size = _without_logits(network)(x).square().mean().sqrt()
    *_, hidden, logits = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    for parameter in hidden.parameters():
        parameter.div_(size)
    logits.weight.mul_(size)


def _convolutions(shape: tuple[int, ...], hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Images (N, C, H, W), or clips (N, T, C, H, W) whose frames are channels -> (N, outputs). Has 32, 64, ... channels
    for as many halvings as leave a side of 4 to 7, of large images up to 5."""
    *planes, height, width = shape
    channels = [32 * 2**stage for stage in range(min(5, max(1, min(height, width).bit_length() - 2)))]
    network = conv_encoder((math.prod(planes), height, width), channels, hidden, outputs)
    return network if len(planes) == 1 else nn.Sequential(nn.Flatten(1, 2), *network)


def _each_channel(network: nn.Module, data: Dataset) -> Callable[[Tensor], Tensor]:
    """The network; of stacked data at each channel: (N, C, H, W) -> (N, C * features)."""
    return network if data.channels is None else lambda x: network(x.flatten(0, 1)[:, None]).view(len(x), -1)


@torch.no_grad()
def classify(x: Tensor, data: Dataset) -> Tensor:
    """The likeliest class (N,) of examples by the classifier that `train_features` made; of stacked data of each of its
    channels, (N, C). Raises SettingsError if there is none."""
    network = _each_channel(_load_classifier(data)[0].to(x.device), data)
    classes = (data.channels or data).classes or 0
    found = torch.cat([network(part.float()).unflatten(1, (-1, classes)).argmax(-1) for part in x.split(BATCH)])
    return found if data.channels else found[:, 0]


def _load_classifier(data: Dataset) -> tuple[nn.Sequential, float]:
    data = data.channels or data
    path = classifier_path(data)
    if not path.is_file():
        command = ["genfuse", "train-features", data.name]
        command += [] if data.binarize == "none" else ["--data.binarize", data.binarize]
        command += [] if data.seed == 0 else ["--data.seed", str(data.seed)]
        command += [word for key, value in data.options.items() for word in (f"--data.{key}", value)]
        raise SettingsError(
            f"there is no classifier of {data.name!r} ({path}): train one, by `{shlex.join(command)}` or by "
            "genfuse.metrics.train_features(data)"
        )
    weights, facts = read_tensors(path)
    demand(facts, {"accuracy": float}, path)
    network = _classifier(data.shape, data.classes or 0)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise SettingsError(f"{path} does not fit the data set {data.name!r}: train it again: {error}") from None
    return network.eval(), facts["accuracy"]


def _random_network(shape: tuple[int, ...]) -> nn.Module:
    """Weights N(0, 2 / fan-in), which keep the size of what passes through (arXiv 1502.01852); biases 0."""
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn only to be replaced
        network = _convolutions(shape, (), WIDTH)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, generator=generator)
            else:
                parameter.zero_()
    return network.eval().requires_grad_(False)


def _inception(path: str | Path | None, data: Dataset, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """The module of a file, called as the metrics of StyleGAN2-ADA call theirs: uint8 RGB in, features out."""
    wanted = (
        "a TorchScript InceptionV3 that takes uint8 RGB images (N, 3, H, W) of any size and returns features (N, D), "
        f"such as {INCEPTION}"
    )
    if path is None:
        raise SettingsError(f"features 'inception' need a file of weights, --inception-weights FILE: {wanted}")
    if not Path(path).is_file():
        raise SettingsError(f"there is no file {path}; wanted is {wanted}")
    if data.shape[0] not in (1, 3):
        raise SettingsError(f"features 'inception' are of grey or RGB images; those of {data.name!r} are {data.shape}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the format of the file is not ours to choose
            module = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise SettingsError(
            f"{path} is no TorchScript file: {str(error).splitlines()[0]}; wanted is {wanted}"
        ) from None
    takes = {argument.name for argument in module.forward.schema.arguments}
    options = {"return_features": True} if "return_features" in takes else {}

    def extract(x: Tensor) -> Tensor:
        pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return torch.cat([module(part, **options) for part in pixels.split(50)])

    return extract
