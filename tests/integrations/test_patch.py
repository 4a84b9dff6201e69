"""Patching itself: what is replaced, what is put back, what is refused, what is counted."""

import importlib
import sys
import types

import pytest
import torch
from torch import nn

from genfuse import ops
from genfuse.integrations import _patch

TESTED = {"nflows": "0.14", "normflows": "1.7.3", "zuko": "1.6.0", "pythae": "0.1.2"}


@pytest.fixture(params=TESTED)
def peer(request):
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    module = importlib.import_module(f"genfuse.integrations.{request.param}")
    yield module
    module.unpatch()


def _name(peer):
    return peer.__name__.rpartition(".")[2]


def test_unpatched_every_function_and_method_is_the_one_that_it_was(peer, attributes):
    before = attributes(_name(peer))
    peer.patch()
    during = attributes(_name(peer))
    assert any(during[key] is not value for key, value in before.items())
    peer.unpatch()
    after = attributes(_name(peer))
    assert before.keys() == after.keys()
    assert all(after[key] is value for key, value in before.items())


def test_a_with_block_undoes_its_own_patch_and_no_other(peer, attributes):
    before = attributes(_name(peer))

    def is_patched():
        now = attributes(_name(peer))
        return any(now.get(key) is not value for key, value in before.items())

    with peer.patch():
        assert is_patched()
        with peer.patch():
            pass
        assert is_patched()
    assert not is_patched()
    peer.unpatch()
    assert not is_patched()
    with pytest.raises(KeyError), peer.patch():
        raise KeyError
    assert not is_patched()


def test_another_version_is_refused_by_name_and_nothing_is_replaced(peer, attributes, monkeypatch):
    before = attributes(_name(peer))
    monkeypatch.setattr(_patch, "version", lambda name: "9.9")
    with pytest.raises(RuntimeError, match=rf"{_name(peer)} 9\.9 is installed.*{TESTED[_name(peer)]}.*pip install"):
        peer.patch()
    after = attributes(_name(peer))
    assert all(after[key] is value for key, value in before.items())


@pytest.mark.parametrize("name", TESTED)
def test_a_library_that_is_missing_is_asked_for(name, monkeypatch):
    for module in [m for m in sys.modules if m.partition(".")[0] == name or m == f"genfuse.integrations.{name}"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name}, which is not installed: pip install {name}==" + TESTED[name]):
        importlib.import_module(f"genfuse.integrations.{name}")


@pytest.mark.parametrize("name", ["nflows.transforms.splines.rational_quadratic", "normflows.utils.splines"])
def test_functions_that_other_modules_imported_by_value_are_replaced_and_put_back(name, monkeypatch):
    library = name.partition(".")[0]
    pytest.importorskip(library, reason=f"{library} is not installed")
    peer, splines = importlib.import_module(f"genfuse.integrations.{library}"), importlib.import_module(name)
    theirs = splines.rational_quadratic_spline
    early, late = types.ModuleType("early"), types.ModuleType("late")
    monkeypatch.setitem(sys.modules, "early", early)
    monkeypatch.setitem(sys.modules, "late", late)
    early.rqs = theirs
    with peer.patch():
        late.rqs = splines.rational_quadratic_spline
        assert early.rqs is late.rqs is not theirs
        x, raw = torch.rand(5, 2), torch.randn(5, 2, 13)
        early.rqs(x, raw[..., :4], raw[..., 4:8], raw[..., 8:])
        assert peer.report().served == {"transforms.splines.rational_quadratic.rational_quadratic_spline": 1} or (
            peer.report().served == {"utils.splines.rational_quadratic_spline": 1}
        )
    assert early.rqs is late.rqs is theirs


def _densities(name):
    """A model of a library, and its log-density of some points."""
    if name == "nflows":
        from nflows import distributions, flows, transforms
        from nflows.nn.nets import ResidualNet

        def network(inputs, outputs):
            return ResidualNet(inputs, outputs, hidden_features=16)

        layers = []
        for i in range(3):
            mask = torch.arange(4) % 2 == i % 2
            layers += [
                transforms.PiecewiseRationalQuadraticCouplingTransform(mask, network, tails="linear", tail_bound=3.0),
                transforms.LULinear(4),
                transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(4, 16, tails="linear"),
            ]
        flow = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([4]))
        return flow, flow.log_prob
    if name == "normflows":
        import normflows as nf

        layers = []
        for i in range(2):
            layers += [
                nf.flows.CoupledRationalQuadraticSpline(4, 2, 16, reverse_mask=i % 2 == 1),
                nf.flows.LULinearPermute(4),
                nf.flows.MaskedAffineAutoregressive(4, 16),
            ]
        flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), layers)
        return flow, flow.log_prob
    if name == "zuko":
        import zuko

        flow = zuko.flows.NSF(4, transforms=3, hidden_features=(16, 16))
        return flow, lambda x: flow().log_prob(x)
    from pythae.models import VAE, VAEConfig

    model = VAE(VAEConfig(input_dim=(4,), latent_dim=2))
    return model, lambda x: -model({"data": x.sigmoid()}).loss


@pytest.mark.parametrize("name", TESTED)
def test_twenty_steps_of_training_have_the_losses_that_they_have_without_the_patch(name, dtype):
    pytest.importorskip(name, reason=f"{name} is not installed")
    peer = importlib.import_module(f"genfuse.integrations.{name}")
    x = torch.randn(64, 4)

    def losses():
        torch.manual_seed(0)
        model, log_prob = _densities(name)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        found = []
        for _ in range(20):
            loss = -log_prob(x).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    theirs = losses()
    with peer.patch():
        ours = losses()
        assert sum(peer.report().served.values()) >= 20
    assert theirs[-1] < theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-8 if dtype is torch.float64 else 1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("nflows", "rational_quadratic_spline"), ("normflows", "rational_quadratic_spline"),
        ("nflows", "mlp"), ("normflows", "mlp"), ("zuko", "mlp"),
        ("normflows", "autoregressive_inverse"), ("zuko", "rational_quadratic_spline"), ("pythae", "reparameterize_kl"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64], indirect=True, ids=["float64"])
@pytest.mark.parametrize("of", [0, 1], ids=["values", "log-determinants"])
def test_a_fault_of_an_operator_does_not_go_unseen(name, operator, of, same, monkeypatch):
    pytest.importorskip(name, reason=f"{name} is not installed")
    peer = importlib.import_module(f"genfuse.integrations.{name}")
    model, log_prob = _densities(name)
    x = torch.randn(16, 4)
    same(peer, lambda: log_prob(x), model)
    right = getattr(ops, operator)

    def wrong(*args, **kwargs):
        results = right(*args, **kwargs)
        if isinstance(results, torch.Tensor):
            return 1.01 * results
        return tuple(t * (1.01 if i == of else 1) for i, t in enumerate(results))

    monkeypatch.setattr(ops, operator, wrong)
    with pytest.raises(AssertionError, match="not close"):
        same(peer, lambda: log_prob(x), model)


def test_a_report_says_what_was_served_and_what_was_left_and_why():
    pytest.importorskip("nflows", reason="nflows is not installed")
    from nflows.transforms.splines import rational_quadratic as splines

    from genfuse.integrations import nflows as peer

    x, raw = torch.rand(5, 2), torch.randn(5, 2, 13)
    raw = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    with peer.patch():
        for _ in range(3):
            splines.rational_quadratic_spline(x, *raw)
        with pytest.raises(splines.InputOutsideDomain):
            splines.rational_quadratic_spline(x + 1, *raw)
    report, name = peer.report(), "transforms.splines.rational_quadratic.rational_quadratic_spline"
    assert report.served == {name: 3}
    assert report.left == {name: {"inputs outside of the box, or none": 1}}
    assert str(report).split("\n") == [
        f"        3 served  {name}", f"        1 left    {name}: inputs outside of the box, or none",
    ]  # fmt: skip
    with peer.patch():
        assert str(peer.report()) == "no calls"


def test_a_module_somebody_listens_to_is_left_to_the_peer():
    zuko = pytest.importorskip("zuko", reason="zuko is not installed")
    from genfuse.integrations import zuko as peer

    flow, calls = zuko.flows.MAF(3), []
    flow.transform.transforms[0].hyper[0].register_forward_hook(lambda *args: calls.append(1))
    with peer.patch():
        flow().sample((4,))
    assert len(calls) == 3
    assert peer.report().left["AutoregressiveTransform._inverse"] == {"the network has hooks": 1}


@pytest.fixture(
    params=[
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ]
)
def heard(request):
    """The modules that a hook of all modules was called for."""
    calls = []
    handle = request.param(lambda module, *args: calls.append(type(module)))
    yield calls
    handle.remove()


@pytest.mark.parametrize("name", TESTED)
def test_modules_that_somebody_listens_to_all_at_once_are_left_to_the_peer(name, heard):
    pytest.importorskip(name, reason=f"{name} is not installed")
    peer = importlib.import_module(f"genfuse.integrations.{name}")
    log_prob, x = _densities(name)[1], torch.randn(4, 4)
    with torch.no_grad():
        log_prob(x)
        theirs = list(heard)
        heard.clear()
        with peer.patch():
            log_prob(x)
            assert any("all modules have hooks" in reasons for reasons in peer.report().left.values())
    assert heard == theirs


def test_a_module_whose_forward_was_replaced_is_left_to_the_peer():
    zuko = pytest.importorskip("zuko", reason="zuko is not installed")
    from genfuse.integrations import zuko as peer

    flow, x = zuko.flows.NSF(3), torch.randn(4, 3)
    layer = flow.transform.transforms[0].hyper[0]
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)
    expected = flow().log_prob(x)
    with peer.patch():
        torch.testing.assert_close(flow().log_prob(x), expected)


def test_parts_of_one_tensor_are_it_and_others_are_put_together():
    whole = torch.randn(4, 5, 8).requires_grad_() * 1
    parts = whole.split([3, 4, 1], -1)
    assert _patch.joined(*parts).data_ptr() == whole.data_ptr()
    assert not _patch.joined(*(part.detach() for part in parts)).requires_grad
    for others in (parts[::-1], (parts[0], parts[1] + 0, parts[2]), (parts[0], parts[2])):
        torch.testing.assert_close(_patch.joined(*others), torch.cat(others, -1), rtol=0, atol=0)
    row = [torch.randn(1, 5, n).expand(4, 5, n) for n in (3, 4)]
    assert _patch.joined(*row).stride(0) == 0
    torch.testing.assert_close(_patch.joined(*row), torch.cat(row, -1), rtol=0, atol=0)
    for listen in (lambda part: part.register_hook(lambda g: g), lambda part: part.retain_grad()):
        parts = (whole * 1).split([3, 5], -1)
        listen(parts[1])
        assert _patch.joined(*parts).data_ptr() != parts[0].data_ptr()
    leaves = [part.requires_grad_() for part in whole.detach().split([3, 5], -1)]
    _patch.joined(*leaves).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
