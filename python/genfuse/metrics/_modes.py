"""Which modes of a known mixture samples reach."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from genfuse.metrics._distances import require
from genfuse.metrics._neighbours import nearest

if TYPE_CHECKING:
    from genfuse.data import Mixture


class ModeCoverage(NamedTuple):
    modes_covered: int
    high_quality: float  # share of the samples


def mode_coverage(samples: Tensor, mixture: "Mixture") -> ModeCoverage:
    """How many modes of a mixture samples (N, D) reach, and what share of them is near one.

    A sample is of high quality within 3 standard deviations of the nearest centre; a mode is covered where it is the
    nearest one of at least one such sample (VEEGAN, arXiv 1705.07761; PacGAN, arXiv 1712.04086). In two dimensions
    98.9% of the mixture itself is of high quality. Raises TooFewSamplesError for fewer samples than modes.
    """
    centres = torch.tensor(mixture.centres, dtype=torch.float64)
    require("mode coverage", len(samples), len(centres), "samples", ", one a mode")
    distances, index = nearest(samples.double().cpu(), centres)
    good = distances <= 3 * mixture.std
    return ModeCoverage(len(index[good].unique()), good.double().mean().item())
