"""The log-likelihood of binary examples at the ends of its range; what all operators are held to is elsewhere."""

import math

import pytest
import torch

from genfuse import ops


@pytest.mark.parametrize("implementation", ["native", "reference"], indirect=True)
@pytest.mark.parametrize(
    ("logit", "x", "expected"),
    [
        (math.inf, 0.5, math.inf),
        (math.inf, 0.0, math.inf),
        (1e30, 1.0, 0.0),
        (-1e30, 0.0, 0.0),
        (100.0, 0.25, 75.0),
        (-100.0, 0.25, 25.0),
    ],
)
def test_logits_far_from_0_cost_what_they_are_wrong_by(logit, x, expected, implementation):
    for columns in (1, 40):
        found = ops.bernoulli_nll(torch.full((1, columns), logit), torch.full((1, columns), x))
        torch.testing.assert_close(found, torch.tensor([columns * expected]))
