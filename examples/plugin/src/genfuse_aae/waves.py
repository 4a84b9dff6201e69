"""A data set: sine waves of random phase, frequency and amplitude, with noise."""

import math

import torch

from genfuse.data import Dataset, Source, Split
from genfuse.errors import DataError


def waves(source: Source) -> Dataset:
    """5,000 real-valued waves (LENGTH,), of which 1,000 are held out: `waves` of a LENGTH of 16, or `waves:LENGTH`.

    Raises DataError for a LENGTH that is no number above 1.
    """
    argument = source.argument or "16"
    if not (argument.isdecimal() and int(argument) > 1):
        raise DataError(f"data set {source.name!r}: a wave has a length of 2 or more, as waves:32; got {argument!r}")
    length, count = int(argument), 5000
    generator = torch.Generator().manual_seed(source.seed)  # of the user's --data.seed, and no other
    phase, turns, amplitude = torch.rand(3, count, 1, generator=generator)
    angles = 2 * math.pi * (phase + (0.5 + turns) * torch.linspace(0, 1, length))
    x = (0.5 + amplitude) * angles.sin() + 0.05 * torch.randn(count, length, generator=generator)
    return Dataset(source.name, {part: Split(x[rows]) for part, rows in source.hold_out(count).items()})
