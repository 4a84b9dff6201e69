"""A metric of samples."""

from genfuse.metrics import Samples


def spread_error(samples: Samples) -> dict[str, float]:
    """Mean relative error of the standard deviation of a cell, against held-out examples."""
    drawn, real = (x.flatten(1).double().std(0) for x in (samples.x, samples.reference))
    varying = real > 0  # the corners of images are always black
    return {"spread_error": ((drawn - real).abs() / real)[varying].mean().item()}


spread_error.better = "lower"
