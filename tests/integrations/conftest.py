"""What all peers are held to: results and gradients as without the patch, in both dtypes."""

import pytest
import torch
from torch import nn

from genfuse.integrations import _networks

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the largest value, and at least of 1


@pytest.fixture(params=TOLERANCE, ids=["float64", "float32"])
def dtype(request):
    """Of all tensors and models that a test makes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def _results(run, wrt):
    """What a call returns and its gradients in these, or the error that it raises."""
    torch.manual_seed(1)
    try:
        given = run()
    except Exception as error:
        return type(error), str(error)
    outputs = given if isinstance(given, tuple) else (given,)
    draw = torch.Generator().manual_seed(2)
    loss = sum((t * torch.randn(t.shape, generator=draw)).sum() for t in outputs)
    gradients = torch.autograd.grad(loss, wrt, allow_unused=True) if wrt and loss.requires_grad else [None] * len(wrt)
    nothing = (torch.zeros_like(t) if g is None else g for t, g in zip(wrt, gradients, strict=True))
    return [t.detach() for t in (*outputs, *nothing)]


@pytest.fixture
def same(dtype, monkeypatch):
    """`same(peer, run, *what)`: hold what `run` returns, and its gradients in tensors and models, against the patched
    peer's, or the errors of both; how many calls were served and left is the report that it returns. Masked networks
    have their units as they are, and then sorted."""

    def check(peer, run, *what, raises=False):
        wrt = [p for each in what for p in (each.parameters() if isinstance(each, nn.Module) else [each])]
        theirs = _results(run, wrt)
        with peer.patch():
            ours = _results(run, wrt)
            report = peer.report()
            monkeypatch.setattr(_networks, "ROWS", 1)
            sorted_ = _results(run, wrt)
            monkeypatch.undo()
        assert isinstance(theirs, tuple) == raises, theirs
        if raises:
            assert ours == theirs == sorted_
            return report
        assert len(ours) == len(theirs) == len(sorted_)
        for our, their in zip((*ours, *sorted_), (*theirs, *theirs), strict=True):
            assert our.shape == their.shape
            assert our.dtype is their.dtype
            bound = TOLERANCE[dtype] * max(1.0, float(their.abs().max())) if their.numel() else 0
            torch.testing.assert_close(our, their, atol=bound, rtol=0, equal_nan=True)
        return report

    return check


def _attributes(library):
    """Every function and class of a library's modules, and what these classes have, by where it is found."""
    import sys

    found = {}
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] == library:
            for key, value in [*vars(module).items()]:
                found[name, key] = value
                if isinstance(value, type) and value.__module__.partition(".")[0] == library:
                    found |= {(name, key, attribute): each for attribute, each in vars(value).items()}
    return found


@pytest.fixture
def attributes():
    return _attributes
