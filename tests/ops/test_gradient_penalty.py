"""The penalty of a critic: the chain of transposed layers beside double backward, and what it cannot take."""

import copy
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from genfuse.nn import Residual, WithContext
from genfuse.ops import _gradient_penalty as module
from genfuse.ops import gradient_penalty, input_gradient


def block(before, after):
    branch = [
        nn.ReLU(),
        nn.Conv2d(before, after, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(after, after, 3, padding=1),
    ]
    return Residual(
        nn.Sequential(*branch, nn.AvgPool2d(2)), nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(before, after, 1))
    )


CRITICS = {  # and the shape of an example
    "linear": (lambda: nn.Linear(5, 1), (5,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 7), nn.LeakyReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 1)), (5,)),
    "in place": (
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 7), nn.LeakyReLU(0.2, inplace=True), nn.Linear(7, 1)),
        (5,),
    ),
    "slopes": (
        lambda: nn.Sequential(
            nn.Linear(5, 7), nn.LeakyReLU(-0.3), nn.Linear(7, 7), nn.LeakyReLU(0.0), nn.Linear(7, 1)
        ),
        (5,),
    ),
    "nested": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.ReLU(inplace=True), nn.Sequential(nn.Linear(12, 8, bias=False), nn.ReLU()),
            nn.Dropout(0.0), nn.Identity(),
            nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(3, 1),
        ),
        (3, 4),
    ),
    "dcgan": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(4, 6, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True), nn.Flatten(), nn.Linear(24, 1),
        ),
        (2, 8, 8),
    ),
    "odd convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(2, 1), groups=2), nn.ReLU(),
            nn.Conv2d(6, 3, 3, padding="same"), nn.ReLU(), nn.Conv2d(3, 1, (3, 2), padding="valid"), nn.Flatten(),
            nn.LazyLinear(1),
        ),
        (4, 9, 8),
    ),
    "pools": (
        lambda: nn.Sequential(
            nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(1, 4, 2), nn.ReLU(), nn.AvgPool2d((2, 1), divisor_override=3), nn.Flatten(), nn.LazyLinear(1),
        ),
        (1, 8, 8),
    ),
    "one dimension": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, stride=2), nn.ReLU(), nn.AvgPool1d(2, padding=1), nn.Flatten(), nn.LazyLinear(1)
        ),
        (2, 9),
    ),
    "three dimensions": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 3, 3, stride=2, padding=1), nn.LeakyReLU(), nn.AvgPool3d(2), nn.Flatten(), nn.LazyLinear(1)
        ),
        (1, 5, 6, 7),
    ),
    "residual": (lambda: nn.Sequential(block(2, 3), block(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)), (2, 8, 8)),
    "spectral norm": (
        lambda: nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(5, 7)), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(7, 1))
        ),
        (5,),
    ),
}  # fmt: skip


def make(name, dtype=torch.float64, n=6):
    torch.manual_seed(0)
    build, shape = CRITICS[name]
    critic = build().to(dtype)
    x = torch.randn(n, *shape, dtype=dtype)
    critic(x.clone())  # lazy layers get their sizes
    return critic, x


def by_autograd(critic, x, *y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(critic(x * 1, *y).sum(), x, create_graph=True)[0]


def penalty_of(gradient, target=1.0):
    return (gradient.flatten(1).norm(dim=1) - target).square().mean()


def gradients(penalty, critic):
    return torch.autograd.grad(penalty, list(critic.parameters()), materialize_grads=True, allow_unused=True)


@pytest.fixture(autouse=True)
def no_notes(monkeypatch):
    monkeypatch.setattr(module, "_noted", set())


@pytest.mark.parametrize("name", CRITICS)
def test_the_chain_is_double_backward_to_rounding(name, caplog):
    critic, x = make(name)
    critic.eval()  # spectral normalisation holds still
    ours, truth = input_gradient(critic, x), by_autograd(critic, x)
    assert not caplog.records  # no fallback
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(penalty_of(ours), critic), gradients(penalty_of(truth), critic), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", CRITICS)
def test_it_leaves_examples_and_modes_alone(name):
    critic, x = make(name)
    before, grad_mode = x.clone(), torch.is_grad_enabled()
    gradient_penalty(critic, x, x + 1).backward()
    assert torch.equal(x, before)
    assert x.grad is None
    assert torch.is_grad_enabled() == grad_mode
    assert critic.training


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.LeakyReLU(-0.2), nn.ReLU(inplace=True)])
def test_both_agree_at_ties(activation):
    critic = nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 1)).double()
    with torch.no_grad():
        critic[0].bias.zero_()
        critic[0].weight[::2] = 0  # units that are 0 whatever x is
    x = torch.randn(5, 4, dtype=torch.float64)
    x[0] = 0
    ours, truth = input_gradient(critic, x), by_autograd(critic, x)
    assert torch.equal(ours, truth)
    for a, b in zip(gradients(penalty_of(ours), critic), gradients(penalty_of(truth), critic), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "critic",
    [
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)),
        nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 1)),
        nn.Sequential(nn.Linear(5, 6), nn.PReLU(), nn.Linear(6, 1)),
        nn.Sequential(nn.Linear(5, 6), nn.Softplus(), nn.Linear(6, 1)),
    ],
    ids=lambda critic: type(critic[1]).__name__,
)
def test_any_other_critic_is_differentiated_twice_and_noted_once(critic, caplog):
    critic = critic.double()
    x = torch.randn(4, 5, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, logger="genfuse"):
        ours = input_gradient(critic, x)
        input_gradient(critic, x)
    (record,) = caplog.records
    assert f"its {type(critic[1]).__name__} is no such layer" in record.getMessage()
    torch.testing.assert_close(ours, by_autograd(critic, x))
    for a, b in zip(
        gradients(penalty_of(ours), critic), gradients(penalty_of(by_autograd(critic, x)), critic), strict=True
    ):
        torch.testing.assert_close(a, b)


class Squared(nn.Linear):
    def forward(self, x):
        return super().forward(x**2)


class Own(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * x.sum(1, keepdim=True)


class Moved(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x**2, weight, bias)


def hooked():
    layer = nn.Linear(5, 1)
    layer.register_forward_hook(lambda layer, args, out: out**2)
    return layer


@pytest.mark.parametrize(
    ("critic", "shape"),
    [
        (Squared(5, 1), (5,)),
        (Own(nn.Linear(5, 1)), (5,)),
        (nn.Sequential(Moved(1, 2, 3), nn.Flatten(), nn.Linear(8, 1)), (1, 4, 4)),
        (hooked(), (5,)),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(32, 1)),
            (1, 4, 4),
        ),
        (nn.Sequential(nn.Conv2d(1, 2, 2, padding="same"), nn.Flatten(), nn.Linear(32, 1)), (1, 4, 4)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 1)), (1, 4, 4)),
    ],
    ids=["overridden", "own sequential", "own convolution", "hook", "circular", "uneven", "max pool"],
)
def test_a_layer_that_only_looks_known_is_not_taken_for_it(critic, shape, caplog):
    critic, x = critic.double(), torch.randn(4, *shape, dtype=torch.float64)
    torch.testing.assert_close(input_gradient(critic, x), by_autograd(critic, x))
    assert len(caplog.records) == 1


def test_a_function_is_a_critic_too():
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 5, dtype=torch.float64)
    gradient = input_gradient(lambda x: torch.sin(x) @ weight, x)
    torch.testing.assert_close(gradient, x.cos() * weight)
    assert gradient.requires_grad


def test_the_penalty_of_a_linear_critic_is_that_of_its_weight():
    critic = nn.Linear(3, 1).double()
    norm = critic.weight.norm().item()
    real, fake = torch.randn(2, 4, 3, dtype=torch.float64)
    assert gradient_penalty(critic, real, fake).item() == pytest.approx((norm - 1) ** 2)
    assert gradient_penalty(critic, real, fake, one_sided=True).item() == pytest.approx(max(norm - 1, 0) ** 2)
    assert gradient_penalty(critic, real, target=0.0, at="real").item() == pytest.approx(norm**2)
    assert gradient_penalty(critic, real, fake, reduction="none").shape == (4,)


def test_the_norm_is_that_of_each_example_and_not_of_the_batch():
    critic = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        critic[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        critic[0].bias.zero_()
        critic[2].weight.copy_(torch.tensor([[3.0, 4.0]]))
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)  # slopes 3 and -4, whose norm together is 5
    assert gradient_penalty(critic, x, at="real").item() == pytest.approx((2**2 + 3**2) / 2)


def test_points_lie_between_real_and_fake_examples_by_the_generator():
    critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    real, fake = torch.randn(2, 50, 2)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    one, same, other = (gradient_penalty(critic, real, fake, generator=seed) for seed in seeds)
    assert one == same != other
    seen = []
    gradient_penalty(lambda x: seen.append(x.detach()) or critic(x), real, fake)
    share = (seen[0] - fake) / (real - fake)
    torch.testing.assert_close(share[:, 0], share[:, 1], rtol=1e-3, atol=1e-3)  # one epsilon for an example
    assert 0 <= share.min() < 0.2
    assert 0.8 < share.max() <= 1


@pytest.mark.parametrize("planes", [False, True])
def test_a_critic_may_be_shown_labels(planes, caplog):
    torch.manual_seed(0)
    network = (
        nn.Sequential(nn.Conv2d(5, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1))
        if planes
        else nn.Sequential(nn.Linear(2 * 25 + 3, 6), nn.ReLU(), nn.Linear(6, 1))
    )
    critic = WithContext(network, planes).double()
    x, y = torch.randn(4, 2, 5, 5, dtype=torch.float64), F.one_hot(torch.arange(4) % 3, 3)
    torch.testing.assert_close(input_gradient(critic, x, y), by_autograd(critic, x, y), rtol=1e-12, atol=1e-12)
    assert not caplog.records
    gradient_penalty(critic, x, x + 1, y).backward()


def test_spectral_normalisation_takes_one_step_as_in_a_call():
    critic, x = make("spectral norm")
    before = copy.deepcopy(critic.state_dict())
    input_gradient(critic, x)
    once = copy.deepcopy(critic.state_dict())
    critic.load_state_dict(before)
    critic(x)
    u = "0.parametrizations.weight.0._u"
    assert torch.equal(once[u], critic.state_dict()[u])
    assert not torch.equal(once[u], before[u])


def test_float32_is_as_close_to_float64_as_double_backward_is():
    critic, x = make("dcgan", n=16)
    truth = gradients(penalty_of(by_autograd(critic, x)), critic)
    critic, x = critic.float(), x.float()

    def error(penalty):
        return max(float((a - b).abs().max()) for a, b in zip(gradients(penalty, critic), truth, strict=True))

    assert error(penalty_of(input_gradient(critic, x))) <= 2 * error(penalty_of(by_autograd(critic, x))) + 1e-6


@pytest.mark.parametrize("name", ["mlp", "dcgan", "residual"])
def test_it_works_under_autocast(name):
    critic, x = make(name, torch.float32)
    truth = gradient_penalty(critic, x, at="real")
    with torch.autocast("cpu", torch.bfloat16):
        penalty = gradient_penalty(critic, x, at="real")
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, truth, rtol=0.05, atol=0.02)
    penalty.backward()
    assert all(p.grad.isfinite().all() for p in critic.parameters() if p.grad is not None)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_is_what_it_is(backend):
    critic, x = make("dcgan")

    def step(x):
        return gradient_penalty(critic, x, at="real")

    eager, compiled = gradients(step(x), critic), gradients(torch.compile(step, backend=backend)(x), critic)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_no_examples_make_no_error():
    critic, _ = make("mlp")
    assert gradient_penalty(critic, torch.zeros(0, 5).double(), at="real", reduction="sum").item() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": "between"}, 'at must be "interpolated", "real" or "fake", got \'between\''),
        ({"fake": None}, 'fake must be given with at="interpolated", got None'),
        ({"fake": None, "at": "fake"}, 'fake must be given with at="fake", got None'),
        ({"fake": torch.zeros(4, 6)}, r"fake must have shape \(4, 5\), got \(4, 6\)"),
        ({"fake": torch.zeros(4, 5).double()}, "fake must have real's dtype torch.float32, got torch.float64"),
        (
            {"critic": nn.Linear(5, 2)},
            r"critic must return one number per example, \(4,\) or \(4, 1\), got shape \(4, 2\)",
        ),
        ({"critic": lambda x: x}, r"critic must return one number per example"),
        ({"target": -1.0}, "target must be a finite norm of at least 0, got -1.0"),
        ({"reduction": "max"}, 'reduction must be "mean", "sum" or "none", got \'max\''),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    given = {"critic": nn.Linear(5, 1), "real": torch.zeros(4, 5), "fake": torch.zeros(4, 5)}
    with pytest.raises(ValueError, match=message):
        gradient_penalty(**{**given, **arguments})


def test_squares_that_float16_cannot_hold_do_not_overflow():
    critic = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).half()
    with torch.no_grad():
        critic[0].weight.fill_(8.0)
        critic[2].weight.fill_(8.0)
    penalty = gradient_penalty(critic, torch.ones(2, 2).half(), at="real")
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx((192 * math.sqrt(2) - 1) ** 2, rel=1e-3)  # whose square is no float16
