"""Pictures enlarged by a model that was trained for super-resolution."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfuse.data import load_data
from genfuse.data.images import SUFFIXES
from genfuse.errors import DataError, DataWarning, SettingsError
from genfuse.metrics import undisturbed


def upscale(
    model: Any, images: Tensor, *, steps: int | None = None, seed: int = 0, callback: Callable[..., Any] | None = None
) -> Tensor:
    """Images (N, C, h, w) in [0, 1], of any size, factor times as high and wide, (N, C, factor h, factor w).

    Large ones are seen in tiles (`genfuse.nn.in_tiles`). ``steps`` are those of a diffusion model's sampler, by default
    the model's; with 1 step of Heun's it shows the mean of what may be, which has the least squared error, and not one
    draw, which looks sharper. ``callback`` is called in each of them.

    Raises SettingsError for a model that was not trained for super-resolution, or for other channels.
    """
    channels = scale(model)[0]
    if images.dim() != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise SettingsError(f"images must be floats (N, {channels}, h, w); got {images.dtype} {tuple(images.shape)}")
    several = "steps" in inspect.signature(model.sample).parameters
    if steps is not None and not several:
        raise SettingsError(f"steps are of diffusion models, and a {type(model).__name__} takes none: leave them out")
    options: dict[str, Any] = {"steps": steps, "callback": callback} if several else {}
    generator = torch.Generator(model.device).manual_seed(seed)
    with torch.no_grad(), undisturbed(model):
        made: Tensor = model.sample(len(images), y=images.to(model.device), generator=generator, **options)
    return made


def scale(model: Any) -> tuple[int, int]:
    """Channels, and how many times as high and wide a model makes images. Raises SettingsError if it does not."""
    given, shape = getattr(model.config, "given", None), model.shape
    if not given or given[0] != shape[0] or given[1] >= shape[1]:
        raise SettingsError(
            f"this {model.plugin or type(model).__name__} enlarges no images: train one with --data.task "
            "super-resolution:4 (edm, another diffusion model or wgan-gp)"
        )
    return shape[0], shape[1] // given[1]


def pictures(path: Path) -> list[Path]:
    """A picture, or those of a folder, sorted. Raises DataError if there is none."""
    if not path.exists():
        raise DataError(f"there is no file or folder {path}")
    found = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not found or path.suffix.lower() not in (SUFFIXES if path.is_file() else ("", path.suffix.lower())):
        raise DataError(f"{path} is no picture and has none in it: names must end in {', '.join(SUFFIXES)}")
    return found


def read_picture(path: Path, channels: int) -> tuple[Tensor, str]:
    """A picture (1, channels, h, w) in [0, 1], grey or RGB, and its own mode. It is turned as its EXIF data says, and
    read as on white where it is transparent, of which a DataWarning tells. Raises DataError for a damaged one."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*are RGB, but grey", DataWarning)
        try:
            data = load_data(f"images:{path}", hold_out=False, mode="L" if channels == 1 else "RGB", stream="no")
        except DataError as error:
            raise DataError(str(error).partition("; --data")[0]) from error
    with Image.open(path) as picture:
        return data.batch("test", slice(None)).x, picture.mode
