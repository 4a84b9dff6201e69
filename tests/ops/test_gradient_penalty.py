"""The penalty of a critic: the chain of transposed operations beside double backward, and what it cannot take."""

import copy
import logging
import math
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from benchmarks.gans import R3GANDown, r3gan_critic
from genfuse import ops
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
    "pools to one cell": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, 1), nn.Flatten(0),
        ),
        (1, 8, 8),
    ),
    "one dimension": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, stride=2), nn.ReLU(), nn.AvgPool1d(2, padding=1), nn.MaxPool1d(2),
            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.LazyLinear(1),
        ),
        (2, 9),
    ),
    "three dimensions": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 3, 3, stride=2, padding=1), nn.LeakyReLU(), nn.AvgPool3d(2), nn.MaxPool3d((1, 1, 2)),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.LazyLinear(1),
        ),
        (1, 5, 6, 9),
    ),
    "residual": (lambda: nn.Sequential(block(2, 3), block(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)), (2, 8, 8)),
    "identity shortcut": (
        lambda: nn.Sequential(
            Residual(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.AvgPool2d(3, 1, 1))), nn.Flatten(),
            nn.Linear(32, 1),
        ),
        (2, 4, 4),
    ),
    "spectral norm": (
        lambda: nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(5, 7)), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(7, 1))
        ),
        (5,),
    ),
    "hooks of normalised weights": (
        lambda: nn.Sequential(
            nn.utils.spectral_norm(nn.Conv1d(2, 3, 2)), nn.ReLU(), nn.Flatten(),
            nn.utils.weight_norm(nn.Linear(9, 1)),
        ),
        (2, 4),
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


def check(critic, x, *y):
    """Value and gradients are those of double backward."""
    ours, truth = input_gradient(critic, x, *y), by_autograd(critic, x, *y)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    if isinstance(critic, nn.Module):
        for a, b in zip(gradients(penalty_of(ours), critic), gradients(penalty_of(truth), critic), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.fixture(autouse=True)
def no_notes(monkeypatch):
    monkeypatch.setattr(module, "_noted", set())
    monkeypatch.setattr(module, "_located", set())


@pytest.mark.parametrize("name", CRITICS)
def test_the_chain_is_double_backward_to_rounding(name, caplog):
    critic, x = make(name)
    check(critic.eval(), x)  # in which spectral normalisation holds still
    assert not caplog.records  # no fallback


class Calls(nn.Module):
    """A critic around an operation, which gets the output of a linear layer, (N, 2, 6, 6), and may have a weight."""

    def __init__(self, operation, *weight):
        super().__init__()
        self.first, self.operation = nn.Linear(8, 72), operation
        self.weight = nn.Parameter(torch.randn(weight)) if weight else None
        self.last = nn.LazyLinear(1, bias=False)

    def forward(self, x):
        h = self.first(x).view(-1, 2, 6, 6)
        h = self.operation(h) if self.weight is None else self.operation(h, self.weight)
        return self.last(h.flatten(1)).squeeze(1)


OPERATIONS = {  # functions, and the shape of a weight
    "relu": (F.relu,),
    "relu_": (lambda h: F.relu_(h * 1),),
    "relu_ of a view": (lambda h: F.relu_(h),),
    "leaky_relu": (lambda h: F.leaky_relu(h, 0.2),),
    "leaky_relu_": (lambda h: F.leaky_relu_(h + 1, 0.2),),
    "relu6": (F.relu6,),
    "hardtanh_": (lambda h: F.hardtanh_(h * 2),),
    "threshold": (lambda h: F.threshold(h, 0.1, 0.3),),
    "prelu": (F.prelu, 2),
    "prelu, one slope": (F.prelu, 1),
    "clamp": (lambda h: h.clamp(-0.5, 0.5),),
    "clamp_": (lambda h: (h * 1).clamp_(max=0.3),),
    "clamp_min": (lambda h: h.clamp_min(0.0),),
    "abs": (torch.abs,),
    "where": (lambda h: torch.where(h > 0, h, -3 * h),),
    "mask": (lambda h: h * (h > 0),),
    "max": (lambda h: h.max(1)[0],),
    "dropped": (lambda h: h.masked_fill(h < 0, 0.5),),
    "gain": (lambda h, w: h * w, 1),
    "gains": (lambda h, w: w * h, 2, 1, 1),
    "shift": (lambda h, w: h - w, 2, 1, 6),
    "quotient": (lambda h, w: h / w.exp(), 2, 1, 6),
    "constants": (lambda h: 3 - (-h) / 4 + 2,),
    "broadcast": (lambda h, w: h[:, :1] * w, 3, 6, 6),
    "in place": (lambda h: h.clone().mul_(2).add_(h),),
    "matmul": (torch.matmul, 6, 5),
    "matmul from the left": (lambda h, w: w @ h, 5, 6),
    "matrix and vector": (torch.matmul, 6),
    "batched": (lambda h, w: torch.bmm(h[:, 0], w.expand(len(h), 6, 4)), 6, 4),
    "baddbmm": (lambda h, w: torch.baddbmm(h[:, 1], h[:, 0], w.expand(len(h), 6, 6), beta=2, alpha=3), 6, 6),
    "addmm": (lambda h, w: torch.addmm(h[:, 0, 0], h[:, 1, 1], w, beta=0.5, alpha=2), 6, 6),
    "einsum": (lambda h, w: torch.einsum("nchw,hk->nckw", h, w), 6, 3),
    "linear": (F.linear, 4, 6),
    "bilinear in a constant": (lambda h, w: F.linear(h, w * w.sum()), 3, 6),
    "conv1d": (lambda h, w: F.conv1d(h[:, 0], w, stride=2, dilation=2, padding=3), 3, 6, 3),
    "conv2d": (lambda h, w: F.conv2d(h, w, stride=(2, 3), padding=(1, 0)), 3, 2, 3, 2),
    "grouped": (lambda h, w: F.conv2d(h, w, groups=2, padding=1), 4, 1, 3, 3),
    "padded to the same": (lambda h, w: F.conv2d(h, w, padding="same"), 3, 2, 2, 4),
    "conv3d": (lambda h, w: F.conv3d(h[:, None], w, stride=(1, 2, 2), dilation=(1, 2, 1)), 3, 1, 2, 2, 3),
    "conv_transpose1d": (lambda h, w: F.conv_transpose1d(h[:, 0], w, stride=2, padding=1), 6, 3, 3),
    "conv_transpose2d": (
        lambda h, w: F.conv_transpose2d(h, w, stride=(2, 3), padding=1, output_padding=(1, 2)),
        2,
        3,
        4,
        3,
    ),
    "grouped conv_transpose2d": (
        lambda h, w: F.conv_transpose2d(h, w, stride=1, dilation=2, output_padding=1, groups=2),
        2,
        2,
        2,
        2,
    ),
    "conv_transpose3d": (lambda h, w: F.conv_transpose3d(h[:, None], w, stride=2), 1, 2, 2, 3, 2),
    "avg_pool": (lambda h: F.avg_pool2d(h, 3, 2, 1, ceil_mode=True),),
    "avg_pool3d": (lambda h: F.avg_pool3d(h, 2),),
    "max_pool": (lambda h: F.max_pool2d(h, 3, 2, 1),),
    "max_pool1d": (lambda h: F.max_pool1d(h[:, 0], 2),),
    "max_pool3d": (lambda h: F.max_pool3d(h, 2),),
    "adaptive": (lambda h: F.adaptive_avg_pool2d(h, (4, 3)),),
    "adaptive in 3": (lambda h: F.adaptive_avg_pool3d(h, (1, 4, 3)),),
    "area": (lambda h: F.interpolate(h, 4, mode="area"),),
    "adaptive max": (lambda h: F.adaptive_max_pool2d(h, 4),),
    "adaptive max in 3": (lambda h: F.adaptive_max_pool3d(h, 2),),
    "adaptive max in 1": (lambda h: F.adaptive_max_pool1d(h[:, 0], 4),),
    "nearest": (lambda h: F.interpolate(h, scale_factor=2),),
    "smaller": (lambda h: F.interpolate(h, scale_factor=0.5),),
    "bilinear": (lambda h: F.interpolate(h, scale_factor=2, mode="bilinear"),),
    "aligned": (lambda h: F.interpolate(h, 9, mode="bilinear", align_corners=True),),
    "antialiased": (lambda h: F.interpolate(h, 4, mode="bilinear", antialias=True),),
    "bicubic": (lambda h: F.interpolate(h, 8, mode="bicubic"),),
    "blur": (
        lambda h: F.conv2d(F.pad(h, (1, 1, 1, 1), "reflect"), torch.ones(2, 1, 3, 3).to(h) / 9, stride=2, groups=2),
    ),
    "zeros around": (lambda h: F.pad(h, (1, 2, 0, -1)),),
    "reflect": (lambda h: F.pad(h, (2, 1, 1, 2), "reflect"),),
    "replicate": (lambda h: F.pad(h, (2, 1, 1, 2), "replicate"),),
    "circular": (lambda h: F.pad(h, (2, 1, 1, 2), "circular"),),
    "reflect in 1": (lambda h: F.pad(h[:, 0], (2, 1), "reflect"),),
    "replicate in 3": (lambda h: F.pad(h, (1,) * 6, "replicate"),),
    "pixel_shuffle": (lambda h: F.pixel_shuffle(h.repeat(1, 2, 1, 1), 2),),
    "pixel_unshuffle": (lambda h: F.pixel_unshuffle(h, 2),),
    "unfold": (lambda h: F.unfold(h, 3, padding=1),),
    "fold": (lambda h: F.fold(F.unfold(h, 2), 6, 2),),
    "slices": (lambda h: h[:, :, 1:, ::2],),
    "index": (lambda h: h[:, [1, 0, 1], :, 2],),
    "select": (lambda h: h[:, 0, -1],),
    "permute": (lambda h: h.permute(0, 3, 1, 2).reshape(len(h), -1)[:, 5:],),
    "transpose": (lambda h: h.mT.contiguous(),),
    "squeeze": (lambda h: h[:, :1].squeeze(1).unsqueeze(-1).expand(-1, -1, -1, 3),),
    "flip": (lambda h: h.flip(2).roll(1, 3),),
    "split": (lambda h: torch.cat([h.split(4, 2)[1], h.chunk(3, 2)[0]], 2),),
    "unbind": (lambda h: torch.stack([part * k for k, part in enumerate(h.unbind(3))], 1),),
    "sums": (lambda h: h.sum((2, 3)) + h.mean((2, 3), keepdim=True).flatten(1),),
    "cumsum": (lambda h: h.cumsum(2),),
    "cat": (lambda h: torch.cat([h, h.relu()], 1),),
    "lerp": (lambda h: torch.lerp(h, h.relu(), 0.3),),
    "learned lerp": (lambda h, w: torch.lerp(h, h.relu(), w), 2, 1, 6),
    "addcmul": (lambda h, w: torch.addcmul(h[:, :1], h, w, value=2), 2, 6, 1),
    "addcmul from the left": (lambda h, w: torch.addcmul(w, w, h), 2, 1, 6),
    "cross": (lambda h, w: torch.linalg.cross(h.view(-1, 24, 3), w.expand(len(h), 24, 3)), 24, 3),
    "gather": (lambda h: h.gather(2, torch.tensor([3, 1, 1, 0]).view(1, 1, 4, 1).expand(len(h), 2, 4, 6)),),
    "index_add": (lambda h: h.index_add(1, torch.tensor([1, 1]), h * 2, alpha=3),),
    "residual": (lambda h, w: 0.7 * h + F.conv2d(F.relu(h), w, padding=1) * 0.7, 2, 2, 3, 3),
    "written slice": (lambda h: h.clone().index_fill_(1, torch.tensor([0]), 0.0) + 1,),
    "slice in place": (lambda h: sliced(h.clone()),),
    "to and fro": (lambda h: h.to(torch.float64).type_as(h),),
}


def sliced(h):
    h[:, 0] *= 2
    h[:, 1, 2:].relu_()
    return h


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_piecewise_linear_operation_is_double_backward_to_rounding(name, caplog):
    torch.manual_seed(0)
    operation, *weight = OPERATIONS[name]
    critic, x = Calls(operation, *weight).double(), torch.randn(5, 8, dtype=torch.float64)
    critic(x)
    check(critic, x)
    assert not caplog.records


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
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)
    for a, b in zip(gradients(penalty_of(ours), critic), gradients(penalty_of(truth), critic), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Custom(nn.Module):
    def forward(self, x):
        return Square.apply(x)


class Product(nn.Module):
    def forward(self, x):
        return x * x.roll(1, 1)


class Attention(nn.Module):
    def forward(self, x):
        x = x[:, None]
        return F.scaled_dot_product_attention(x, x, x)[:, 0]


class Spread(nn.Module):
    """The standard deviation over the batch, as StyleGAN's critic has it."""

    def forward(self, x):
        return torch.cat([x[:, 1:], x.std(0).mean().expand(len(x), 1)], 1)


@pytest.mark.parametrize(
    ("layer", "operation", "advice"),
    [
        (nn.Tanh(), "Tanh", "such as ReLU or LeakyReLU"),
        (nn.Sigmoid(), "Sigmoid", "such as ReLU or LeakyReLU"),
        (nn.Softplus(), "Softplus", "such as ReLU or LeakyReLU"),
        (nn.GELU(), "Gelu", "such as ReLU or LeakyReLU"),
        (nn.SiLU(), "Silu", "such as ReLU or LeakyReLU"),
        (nn.ELU(), "Elu", "such as ReLU or LeakyReLU"),
        (nn.LayerNorm(6), "NativeLayerNorm", "leave it out, or normalise the weights instead"),
        (nn.GroupNorm(2, 6), "NativeGroupNorm", "leave it out, or normalise the weights instead"),
        (nn.BatchNorm1d(6), "NativeBatchNorm", "leave it out, or normalise the weights instead"),
        (nn.Softmax(1), "Softmax", "leave attention out"),
        (Product(), "Mul", "one of its two factors must not depend on x"),
        (Attention(), "", "leave attention out"),
        (Spread(), "Std", "a piecewise linear operation"),
        (Custom(), "Square", "a piecewise linear operation of PyTorch"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_any_other_critic_is_differentiated_twice_and_noted_once(layer, operation, advice, caplog):
    critic = nn.Sequential(nn.Linear(5, 6), nn.Sequential(layer, nn.ReLU()), nn.Linear(6, 1)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, logger="genfuse"):
        ours = input_gradient(critic, x)
        input_gradient(critic, x)
    (record,) = caplog.records
    assert "gradient_penalty differentiates Sequential twice" in record.getMessage()
    assert f"{operation} in 1.0 ({type(layer).__name__}): " in record.getMessage()
    assert advice in record.getMessage()
    torch.testing.assert_close(ours, by_autograd(critic, x))
    for a, b in zip(
        gradients(penalty_of(ours), critic), gradients(penalty_of(by_autograd(critic, x)), critic), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_all_that_is_in_the_way_is_named_at_once(caplog):
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU())
            self.last = nn.Linear(6, 1)

        def forward(self, x):
            return self.last(torch.sigmoid(self.main(x)))

    input_gradient(Critic(), torch.randn(4, 5))
    assert "NativeLayerNorm in main.1 (LayerNorm): leave it out" in caplog.text
    assert "Sigmoid in its forward: use a piecewise linear operation" in caplog.text


def test_a_function_that_is_differentiated_twice_is_named(caplog):
    def score(x):
        return x.square().sum(1)

    torch.testing.assert_close(input_gradient(score, x := torch.randn(4, 5)), 2 * x)
    assert "differentiates score twice" in caplog.text
    assert "Pow: use a piecewise linear operation" in caplog.text


def test_batch_norm_is_said_to_couple_the_examples(caplog):
    critic = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 1))
    input_gradient(critic, torch.randn(4, 5))
    assert "its batch norm couples the examples" in caplog.text


def test_batch_norm_by_earlier_averages_is_linear(caplog):
    critic = nn.Sequential(
        nn.Conv1d(2, 6, 3),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.BatchNorm1d(18, affine=False),
        nn.Linear(18, 1),
    )
    critic = critic.double()
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    critic(x)
    check(critic.eval(), x)
    assert not caplog.records


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


def hooked_before():
    layer = nn.Linear(5, 1)
    layer.register_forward_pre_hook(lambda layer, args: (args[0] ** 2,))
    return layer


def changed():
    layer = nn.Linear(5, 1)
    layer.forward = lambda x: F.linear(x, layer.weight) ** 2
    return layer


@pytest.mark.parametrize(
    ("critic", "shape"),
    [
        (Squared(5, 1), (5,)),
        (Own(nn.Linear(5, 1)), (5,)),
        (nn.Sequential(Moved(1, 2, 3), nn.Flatten(), nn.Linear(8, 1)), (1, 4, 4)),
        (hooked(), (5,)),
        (hooked_before(), (5,)),
        (changed(), (5,)),
    ],
    ids=["overridden", "own sequential", "own convolution", "hook", "hook before", "instance"],
)
def test_a_layer_that_only_looks_linear_is_not_taken_for_it(critic, shape, caplog):
    critic, x = critic.double(), torch.randn(4, *shape, dtype=torch.float64)
    check(critic, x)
    assert len(caplog.records) == 1


class Caogang(nn.Module):
    """As in caogang/wgan-gp: flat images, convolutions, and a view before the last layer."""

    def __init__(self, width=3):
        super().__init__()
        layers = []
        for before, after in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 5, stride=2, padding=2), nn.ReLU(True)]
        self.main, self.last, self.features = nn.Sequential(*layers), nn.Linear(16 * 4 * width, 1), 16 * 4 * width

    def forward(self, x):
        out = self.main(x.view(-1, 1, 28, 28))
        return self.last(out.view(-1, self.features)).view(-1)


class Eriklindernoren(nn.Module):
    """As in eriklindernoren/PyTorch-GAN's wgan_gp: images to vectors by a view."""

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(36, 12), nn.LeakyReLU(0.2, inplace=True), nn.Linear(12, 8), nn.LeakyReLU(0.2, inplace=True)]
        self.model = nn.Sequential(*layers, nn.Linear(8, 1))

    def forward(self, img):
        img_flat = img.view(img.shape[0], -1)
        return self.model(img_flat)


class Functional(nn.Module):
    """A residual critic that calls functions, with one block used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.same = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.wider, self.short = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1, bias=False)
        self.last = nn.Linear(6, 1)

    def forward(self, x):
        h = self.first(x)
        for _ in range(2):
            h = h + 0.1 * self.same(F.relu(h, inplace=False))
        h = F.avg_pool2d(self.wider(F.relu(h)), 2) + self.short(F.interpolate(h, scale_factor=0.5, mode="bilinear"))
        return self.last(F.relu_(h).sum((2, 3)))


class Projection(nn.Module):
    """Labels as a map beside the image, and by an inner product with the features (arXiv 1802.05637)."""

    def __init__(self):
        super().__init__()
        self.map, self.inner = nn.Embedding(4, 36), nn.Embedding(4, 5)
        self.conv = parametrizations.weight_norm(nn.Conv2d(2, 5, 3, stride=2))
        self.last = parametrizations.spectral_norm(nn.Linear(5, 1))

    def forward(self, x, y):
        h = torch.cat([x, self.map(y).view(-1, 1, 6, 6)], 1)
        h = F.leaky_relu(self.conv(h), 0.2).mean((2, 3))
        return self.last(h) + (h * self.inner(y)).sum(1, keepdim=True)


class BilinearDown(R3GANDown):
    def forward(self, x):
        return self.mix(F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False, antialias=True))


class PooledDown(R3GANDown):
    def forward(self, x):
        return F.avg_pool2d(self.mix(x), 2)


def small_r3gan(down=R3GANDown):
    return r3gan_critic((4, 8), group=4, down=down)


@pytest.mark.parametrize(
    ("critic", "shape", "labels"),
    [
        (Caogang, (784,), False),
        (Eriklindernoren, (1, 6, 6), False),
        (Functional, (3, 8, 8), False),
        (Projection, (1, 6, 6), True),
        (small_r3gan, (3, 8, 8), False),
        (partial(small_r3gan, BilinearDown), (3, 8, 8), False),
        (partial(small_r3gan, PooledDown), (3, 8, 8), False),
    ],
)
def test_critics_with_a_forward_of_their_own_are_double_backward_to_rounding(critic, shape, labels, caplog):
    torch.manual_seed(0)
    critic, x = critic().double().eval(), torch.randn(6, *shape, dtype=torch.float64)
    y = [torch.arange(6) % 4] * labels
    check(critic, x, *y)
    gradient_penalty(critic, x, x + 1, *y).backward()
    for frozen in [*critic.parameters()][1::2]:
        frozen.requires_grad_(False)
    trained = nn.ParameterList(p for p in critic.parameters() if p.requires_grad)
    wanted = gradients(penalty_of(by_autograd(critic, x, *y)), trained)
    for a, b in zip(gradients(penalty_of(input_gradient(critic, x, *y)), trained), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert not caplog.records


def test_scores_and_gradient_of_one_call_are_those_of_two_and_so_are_their_gradients():
    torch.manual_seed(0)
    critic, x = small_r3gan().double(), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    calls = []
    critic.register_forward_hook(lambda *_: calls.append(1))
    scores, gradient = ops.scores_and_gradient(critic, x)
    assert len(calls) == 1
    found = gradients(F.softplus(scores).mean() + penalty_of(gradient, 0.0), critic)
    wanted = gradients(F.softplus(critic(x)).mean() + penalty_of(by_autograd(critic, x), 0.0), critic)
    torch.testing.assert_close(scores, critic(x))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        without = ops.scores_and_gradient(critic, x)
    assert not any(each.requires_grad for each in without)
    torch.testing.assert_close(without, (scores.detach(), gradient.detach()))


class BiasedFunction(torch.autograd.Function):
    """(x + b) by leaky ReLU with a gain, as the kernels of StyleGAN and R3GAN have it."""

    @staticmethod
    def forward(ctx, x, bias):
        y = F.leaky_relu(x + bias, 0.2) * math.sqrt(2)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        g = torch.where(y > 0, g, 0.2 * g) * math.sqrt(2)
        return g, g.sum(0)


class ByFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bias, self.last = nn.Linear(5, 7), nn.Parameter(torch.randn(7)), nn.Linear(7, 1)

    def forward(self, x):
        return self.last(BiasedFunction.apply(self.first(x), self.bias))


@pytest.mark.parametrize("declared", [True, False])
def test_a_function_that_says_it_is_piecewise_linear_is_a_link_of_the_chain(declared, caplog, monkeypatch):
    monkeypatch.setattr(BiasedFunction, "piecewise_linear", declared, raising=False)
    torch.manual_seed(0)
    check(ByFunction().double(), torch.randn(6, 5, dtype=torch.float64))
    assert len(caplog.records) == (not declared)


def test_a_critic_may_branch_on_what_it_sees_and_be_a_function(caplog):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

        def forward(self, x, *, depth):
            for layer in self.layers[: depth if x.sum() > 0 else 1]:
                x = F.relu(layer(x)) + x
            return x.sum(1)

    critic = Branching().double()
    for sign in (1, -1):
        check(critic_of := lambda x: critic(x, depth=3), x := sign * torch.rand(4, 5).double())
        for a, b in zip(
            gradients(penalty_of(input_gradient(critic_of, x)), critic),
            gradients(penalty_of(by_autograd(critic_of, x)), critic),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert not caplog.records


def test_what_is_written_into_a_view_may_be_anything(caplog):
    critic = Calls(lambda h: logistic(h.clone())).double()
    critic(x := torch.randn(5, 8, dtype=torch.float64))
    check(critic, x)
    assert not caplog.records


def logistic(h):
    h[:, 0].tanh_()
    return h


def test_layers_may_be_computed_again_in_the_backward_pass(caplog):
    critic = Calls(lambda h: checkpoint(lambda h: F.leaky_relu(h * 2), h, use_reentrant=False)).double()
    critic(x := torch.randn(5, 8, dtype=torch.float64))
    check(critic, x)
    assert not caplog.records


def test_functions_work_under_autocast(caplog):
    torch.manual_seed(0)
    critic, x = small_r3gan(), torch.randn(6, 3, 8, 8)
    truth = gradients(penalty_of(by_autograd(critic, x)), critic)
    with torch.autocast("cpu", torch.bfloat16):
        gradient = input_gradient(critic, x)
    assert gradient.dtype == x.dtype
    for ours, wanted in zip(gradients(penalty_of(gradient), critic), truth, strict=True):
        assert (ours - wanted).norm() <= 0.2 * wanted.norm()
    assert not caplog.records


def test_it_keeps_no_graph_of_the_examples():
    """Nothing that the critic has computed from x is reached from the gradient, nor alive."""
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append(weakref.ref(x.untyped_storage()))
            return x

    critic = nn.Sequential(nn.Linear(5, 7), Watched(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 1))
    gradient = input_gradient(critic, torch.randn(4, 5))
    nodes, found = [gradient.grad_fn], set()
    while nodes:
        node = nodes.pop()
        found.add(type(node).__name__)
        nodes += [before for before, _ in node.next_functions if before is not None]
    assert found == {"MmBackward0", "ThresholdBackwardBackward0", "AccumulateGrad"}
    assert seen[0]() is None


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.Tanh()], ids=["chain", "twice"])
def test_it_works_in_inference_mode(activation):
    critic, x = nn.Sequential(nn.Linear(5, 4), activation, nn.Linear(4, 1)), torch.randn(6, 5)
    with torch.inference_mode():
        gradient = input_gradient(critic, x + 0)
    torch.testing.assert_close(gradient, by_autograd(critic, x).detach())


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2, inplace=True), nn.Softplus()])
def test_transforms_of_torch_func_have_its_derivatives(activation):
    torch.manual_seed(0)
    critic, x = nn.Sequential(nn.Linear(5, 4), activation, nn.Linear(4, 1)).double(), torch.randn(6, 5).double()
    parameters = dict(critic.named_parameters())

    def penalty(parameters, x):
        return penalty_of(input_gradient(lambda x: torch.func.functional_call(critic, parameters, (x,)), x))

    ours = torch.func.grad(penalty)(parameters, x)
    truth = gradients(penalty_of(by_autograd(critic, x)), critic)
    for a, b in zip(ours.values(), truth, strict=True):
        torch.testing.assert_close(a, b)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}  # an ensemble
    both = torch.func.vmap(penalty, (0, None))(stacked, x)
    torch.testing.assert_close(both[0], penalty(parameters, x))
    torch.testing.assert_close(both[1], penalty({name: 2 * p for name, p in parameters.items()}, x))


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


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Softplus()], ids=["chain", "twice"])
@pytest.mark.parametrize("normalised", [parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"])
def test_spectral_normalisation_takes_one_step_as_in_a_call(normalised, activation):
    critic = nn.Sequential(normalised(nn.Linear(5, 7)), activation, nn.Linear(7, 1)).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    called, before = copy.deepcopy(critic), copy.deepcopy(critic.state_dict())
    input_gradient(critic, x)
    called(x)
    after = critic.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert all(torch.equal(after[name], value) for name, value in called.state_dict().items())


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), nn.Dropout(0.5, inplace=True), nn.Dropout2d(0.5)], ids=str)
def test_dropout_draws_as_in_a_call(dropout, caplog):
    critic = nn.Sequential(nn.Conv2d(1, 4, 2), dropout, nn.ReLU(), nn.Flatten(), nn.Linear(36, 1)).double()
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    torch.manual_seed(1)
    ours = input_gradient(critic, x)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, by_autograd(critic, x), rtol=1e-12, atol=1e-14)
    assert torch.equal(drawn, torch.rand(1))
    assert not caplog.records


def test_float32_is_as_close_to_float64_as_double_backward_is():
    critic, x = make("dcgan", n=16)
    truth = gradients(penalty_of(by_autograd(critic, x)), critic)
    critic, x = critic.float(), x.float()

    def error(penalty):
        return max(float((a - b).abs().max()) for a, b in zip(gradients(penalty, critic), truth, strict=True))

    assert error(penalty_of(input_gradient(critic, x))) <= 2 * error(penalty_of(by_autograd(critic, x))) + 1e-6


@pytest.mark.parametrize("name", ["mlp", "dcgan", "residual", "identity shortcut"])
def test_it_works_under_autocast(name):
    critic, x = make(name, torch.float32)

    def step():
        return gradient_penalty(critic, x, at="real") + critic(x.clone()).square().mean()

    truth = step()
    with torch.autocast("cpu", torch.bfloat16):
        loss = step()  # in which the critic must not meet weights that were cast without gradients
        assert input_gradient(critic, x).dtype == x.dtype
    torch.testing.assert_close(loss, truth, rtol=0.05, atol=0.02)
    for ours, wanted in zip(gradients(loss, critic), gradients(truth, critic), strict=True):
        assert (ours - wanted).norm() <= 0.2 * wanted.norm()


@pytest.mark.parametrize("name", ["dcgan", "residual"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_is_what_it_is(backend, name):
    critic, x = make(name)

    def step(x):
        return gradient_penalty(critic, x, at="real")

    compiled = torch.compile(step, backend=backend, fullgraph=True)(x)
    for a, b in zip(gradients(compiled, critic), gradients(step(x), critic), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Softplus()], ids=["chain", "twice"])
def test_what_cannot_be_differentiated_twice_by_a_compiler_is_not_compiled(activation):
    critic, x = nn.Sequential(nn.Linear(5, 4), activation, nn.Linear(4, 1)).double(), torch.randn(6, 5).double()
    truth = gradients(penalty_of(by_autograd(critic, x)), critic)
    whole = torch.compile(lambda x: gradient_penalty(critic, x, at="real"), backend="aot_eager")
    inner = torch.compile(critic, backend="aot_eager")
    for penalty in (whole(x), gradient_penalty(inner, x, at="real")):
        for a, b in zip(gradients(penalty, critic), truth, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Softplus()], ids=["chain", "twice"])
def test_without_gradients_it_keeps_no_graph(activation):
    critic = nn.Sequential(nn.Linear(5, 4), activation, nn.Linear(4, 1))
    with torch.no_grad():
        gradient = input_gradient(critic, x := torch.randn(6, 5))
    assert not gradient.requires_grad
    torch.testing.assert_close(gradient, by_autograd(critic, x).detach())


class Penalised(nn.Module):
    """A model with its loss, as the training loop gives it to DistributedDataParallel."""

    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)).double()

    def forward(self, x):
        return self.critic(x).mean() + gradient_penalty(self.critic, x, at="real")


def _rank(rank, store, x):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Penalised()
    shared = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # the second call fails where the first did not reach all parameters
        shared.zero_grad()
        shared(x[rank::2]).backward()
    torch.manual_seed(0)
    alone = Penalised()
    alone(x).backward()
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path):
    x = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    torch.multiprocessing.spawn(_rank, (tmp_path / "store", x), nprocs=2)


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
        (
            {"critic": nn.Conv2d(1, 1, 2), "real": torch.zeros(4, 1, 3, 3), "at": "real"},
            r"one number per example, \(4,\) or \(4, 1\), got shape \(4, 1, 2, 2\)",
        ),
        ({"critic": lambda x: x.detach().sum(1)}, "critic must depend on x, got an output without gradients"),
        ({"critic": lambda x: nn.Linear(5, 1)(x.detach())}, "critic must depend on x, got an output that does not"),
        ({"context": torch.zeros(3)}, r"context must have a row for each of the 4 examples, got \(3,\)"),
        ({"context": torch.zeros(4)}, r"context must be None for a critic that takes none, Linear, got shape \(4,\)"),
        ({"real": torch.zeros(4, 5).long(), "at": "real"}, "real must be float32, .* got torch.int64"),
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


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="PyTorch 2.6 does not tell that it exports")
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_is_told_that_it_has_no_gradients_within_a_program(strict):
    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.critic = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))

        def forward(self, x):
            return gradient_penalty(self.critic, x, at="real")

    with pytest.raises(Exception, match="has no gradients within a program"):
        torch.export.export(Penalty(), (torch.randn(5, 3),), strict=strict)


def complex_linear(layer, x):
    return torch.view_as_real(layer(torch.view_as_complex(x.view(len(x), -1, 2)))).flatten(1)


def complex_addmm(weight, x):
    x = torch.view_as_complex(x.view(len(x), -1, 2))
    return torch.view_as_real(torch.addmm(weight[:1], x, weight, alpha=1 + 2j, beta=2j)).flatten(1)


def real_by_complex(weight, x):
    return (x[:, :3, None] * weight[:3]).real.flatten(1)


@pytest.mark.parametrize("operation", [complex_linear, complex_addmm, real_by_complex])
def test_complex_weights_are_conjugated(operation, caplog):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, dtype=torch.complex128)
    weight = layer if operation is complex_linear else layer.weight

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return F.relu(operation(weight, x)).sum(1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(Critic(), torch.randn(6, 8, dtype=torch.float64))
    assert not caplog.records


def test_the_absolute_value_of_complex_numbers_is_not_piecewise_linear(caplog):
    torch.manual_seed(0)

    class Critic(nn.Linear):
        def forward(self, x):
            return torch.view_as_complex(super().forward(x).view(-1, 4, 2)).abs().sum(1)

    check(Critic(8, 8).double(), torch.randn(6, 8, dtype=torch.float64))
    assert "In its way: Abs" in caplog.text


@pytest.mark.parametrize("columns", [1, 5])
def test_what_is_added_to_a_product_may_be_broadcast(columns, caplog):
    torch.manual_seed(0)

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(columns, 6))

        def forward(self, x):
            return F.relu(torch.addmm(x[:, :1], x, self.weight, beta=0.5)).sum(1)

    check(Critic().double(), torch.randn(6, columns, dtype=torch.float64))
    assert not caplog.records


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.InstanceNorm2d(3, affine=True, track_running_stats=True)])
@pytest.mark.parametrize("inside", [False, True])
def test_earlier_averages_may_be_wider_than_what_they_normalise(norm, inside):
    torch.manual_seed(0)
    critic = nn.Sequential(
        nn.Conv2d(1, 3, 3), norm, nn.LeakyReLU(0.2), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 1)
    )
    x = torch.randn(5, 1, 8, 8)
    wanted = gradients(gradient_penalty(critic.eval(), x, at="real"), critic)

    def under_autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return critic(x)

    if inside:
        penalty = gradient_penalty(under_autocast, x, at="real")
    else:
        with torch.autocast("cpu", torch.bfloat16):
            penalty = gradient_penalty(critic, x, at="real")
    for ours, exact in zip(gradients(penalty, critic), wanted, strict=True):
        assert (ours - exact).norm() <= 0.1 * exact.norm() + 1e-3


class Leaky(torch.autograd.Function):
    piecewise_linear = True

    @staticmethod
    def forward(ctx, slope, constant, x, name):
        ctx.save_for_backward(x)
        ctx.slope = slope
        return torch.where(x > 0, x, slope * x) + constant

    @staticmethod
    def backward(ctx, g):
        return None, None, torch.where(ctx.saved_tensors[0] > 0, g, ctx.slope * g), None


class Both(torch.autograd.Function):
    piecewise_linear = True

    @staticmethod
    def forward(ctx, x):
        return 2 * x, 3 * x

    @staticmethod
    def backward(ctx, first, second):
        return 2 * first + 3 * second


class _Node(Square):
    """Of the name of a Function of genfuse."""


@pytest.mark.parametrize(
    ("operation", "linear"),
    [
        (lambda h: Leaky.apply(0.2, torch.ones(4, dtype=h.dtype), h, "leaky"), True),
        (lambda h: Both.apply(h)[0], True),
        (lambda h: Both.apply(h)[1], True),
        (_Node.apply, False),
    ],
)
def test_functions_may_have_settings_results_that_nobody_uses_and_any_name(operation, linear, caplog):
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(5, 4), Applied(operation), nn.Linear(4, 1)).double()
    check(critic, torch.randn(6, 5, dtype=torch.float64))
    assert (not caplog.records) == linear


class Applied(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x):
        return self.operation(x)


def test_a_scripted_layer_is_called_as_it_is_and_no_hooks_stay():
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(5, 4), nn.ReLU()).double())
    critic = nn.Sequential(scripted, nn.Linear(4, 1).double())
    x = torch.randn(6, 5, dtype=torch.float64)
    for _ in range(2):
        check(critic, x)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in critic.modules())


class CompiledInside(nn.Module):
    def __init__(self, net, whole):
        super().__init__()
        self.net = torch.compile(net, backend="aot_eager") if whole else net
        self.call = self.net if whole else torch.compile(net.forward, backend="aot_eager")

    def forward(self, x):
        return self.call(x)


@pytest.mark.parametrize("how", ["function", "in place", "method", "part"])
def test_a_critic_that_is_compiled_anyhow_is_called_as_it_was_before(how):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)).double(), torch.randn(6, 5).double()
    wanted = gradients(penalty_of(by_autograd(net, x)), net)
    if how == "function":
        critic = torch.compile(lambda x: net(x), backend="aot_eager")
    elif how == "in place":
        (critic := net).compile(backend="aot_eager")
    else:
        critic = CompiledInside(net, how == "part")
    for a, b in zip(gradients(gradient_penalty(critic, x, at="real"), net), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "critic",
    [
        lambda net, x: net(x).mean(1, keepdim=True).masked_fill(torch.arange(8) % 3 == 0, 0.0).sum(1),
        lambda net, x: net(x)[:, :1].masked_fill(torch.arange(8) % 3 == 0, 0.0).sum(1),
        lambda net, x: net(x).relu().sum(1, dtype=torch.float32),
        lambda net, x: F.batch_norm(h := net(x), 0 * net.bias.detach(), h.detach()[0].abs() + 1, weight=h.mean(0)).sum(
            1
        ),
    ],
    ids=["masked_fill that broadcasts", "masked_fill of one column", "a sum in another dtype", "batch norm's weight"],
)
def test_operations_that_broadcast_convert_or_take_x_twice(critic):
    torch.manual_seed(0)
    net = nn.Linear(5, 8).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(input_gradient(partial(critic, net), x), by_autograd(partial(critic, net), x))


def test_hooks_on_a_compiled_critic_run():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(6, 5)
    compiled = torch.compile(net, backend="eager")
    compiled.register_forward_hook(lambda module, inputs, output: 3 * output)
    torch.testing.assert_close(input_gradient(compiled, x), 3 * input_gradient(net, x))


def test_batch_norm_in_training_breaks_the_graph_of_a_compiled_step():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)).double()
    x = torch.randn(6, 5).double()
    found = torch.compile(lambda: gradient_penalty(critic, x, at="real"), backend="eager")()
    torch.testing.assert_close(found, penalty_of(by_autograd(critic, x)))


def test_a_critic_that_returns_no_tensor_is_refused():
    with pytest.raises(ValueError, match="critic must return a tensor of one number per example, got tuple"):
        gradient_penalty(lambda x: (x.sum(1), x), torch.randn(6, 5), at="real")
