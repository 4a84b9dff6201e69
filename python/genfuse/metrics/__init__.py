"""What is measured of a model."""

from genfuse.metrics._evaluate import evaluate as evaluate
