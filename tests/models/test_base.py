"""What all models share: own training loops, copies, the loss as `forward`."""

import copy
import pickle
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

import genfuse
from genfuse.errors import DataError, SettingsError
from genfuse.models import Batch, GenerativeModel, ModelConfig, Player, adam


@dataclass(frozen=True)
class CounterConfig(ModelConfig):
    shape: tuple[int, ...] = (2,)
    levels: int | None = None


class Counter(GenerativeModel):
    """Two players; it counts their updates."""

    Config = CounterConfig

    def __init__(self, config):
        super().__init__(config)
        self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)
        self.register_buffer("counts", torch.zeros(2))

    def players(self):
        return [Player("a", self.a.parameters(), adam()), Player("b", self.b.parameters(), adam())]

    def loss(self, batch, player):
        self.settle()
        return getattr(self, player)(batch.x).square().mean(), {}

    def after_step(self, player):
        self.counts["ab".index(player)] += 1


X = torch.ones(4, 2)


def step(model, player, optimizer):
    for _ in range(2):  # gradients of two batches are added up
        model(X, player=player).backward()
    optimizer.step()
    optimizer.zero_grad()


class ByData(torch.optim.Optimizer):
    """One that autograd does not see, as many of other packages are."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for weight in self.param_groups[0]["params"]:
            weight.data.sub_(self.param_groups[0]["lr"] * weight.grad)


FUSED = partial(torch.optim.Adam, fused=True)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, FUSED, ByData])
def test_an_own_loop_counts_each_update_of_each_player_once(make):
    torch.manual_seed(0)
    model = Counter(CounterConfig())
    optimizers = {player: make(getattr(model, player).parameters(), lr=0.01) for player in "ab"}
    for player in "aababbb":
        step(model, player, optimizers[player])
    model.settle()
    model.settle()
    assert model.counts.tolist() == [3, 4]


def test_what_the_trainer_counts_is_not_counted_again():
    model = Counter(CounterConfig())
    optimizer = torch.optim.SGD(model.a.parameters(), 0.1)
    step(model, "a", optimizer)
    model.stepped("a")
    model.settle()
    assert model.counts.tolist() == [1, 0]


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.double(),
        lambda model: model.load_state_dict(model.state_dict()) and model,
    ],
)
def test_copying_moving_and_loading_weights_is_no_update(copied):
    model = Counter(CounterConfig())
    step(model, "a", torch.optim.SGD(model.a.parameters(), 0.1))
    model.settle()
    other = copied(model)
    other.settle()
    assert other.counts.tolist() == [1, 0]
    with torch.no_grad():
        other.a.weight.add_(1)
    other.settle()
    assert other.counts.tolist() == [2, 0]


@pytest.mark.parametrize("replace", ["layer", "weight"])
def test_updates_of_what_was_put_in_the_place_of_a_layer_or_a_weight_are_counted(replace):
    model = Counter(CounterConfig())
    step(model, "a", torch.optim.SGD(model.a.parameters(), 0.1))
    model.settle()
    if replace == "layer":
        model.a = nn.Linear(2, 1)
    else:
        model.a.bias = nn.Parameter(torch.ones(1))
    model.settle()
    assert model.counts.tolist() == [1, 0]
    step(model, "a", torch.optim.SGD([model.a.bias], 0.1))
    model.settle()
    assert model.counts.tolist() == [2, 0]


@pytest.mark.parametrize("lent", [torch.clone, lambda weight: nn.Parameter(weight.detach().clone())])
def test_weights_that_are_lent_for_one_call_are_not_those_whose_updates_count(lent):
    model = Counter(CounterConfig())
    weights = {name: lent(weight) for name, weight in model.named_parameters()}
    torch.func.functional_call(model, weights, (X,), {"player": "a"})
    optimizers = {player: torch.optim.SGD(getattr(model, player).parameters(), 0.1) for player in "ab"}
    for player in "aab":
        step(model, player, optimizers[player])
        if lent is torch.clone:  # between an update and its notice
            torch.func.functional_call(model, weights, (X,), {"player": "a"})
    model.settle()
    assert model.counts.tolist() == [2, 1]


GAUSSIAN = {"decoder": "gaussian"}
MODELS = ["vae", "gan", "wgan", "wgan-gp", "planar", "realnvp", "maf", "nsf", "nsf-ar", "glow", "ddpm", "edm", "score",
          "flow-matching"]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_called_model_is_its_loss_and_copies_are_alike(name):
    settings = {"decoder": "gaussian"} if name == "vae" else {}
    model = genfuse.create(name, shape=(2,), levels=None, **settings)
    x = torch.randn(8, 2)
    first = model.players()[0].name
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(0)
        loss = other(x)
        torch.manual_seed(0)
        assert loss.shape == ()
        assert torch.equal(loss, model.loss(Batch(x), first)[0])


def test_a_player_that_is_not_there_is_refused_by_name():
    gan, vae = (genfuse.create(name, shape=(2,), levels=None, **s) for name, s in (("gan", {}), ("vae", GAUSSIAN)))
    assert not torch.equal(gan(X, player="generator"), gan(X))
    for model, player, known in (
        (gan, "critic", "discriminator, generator"),
        (genfuse.create("wgan", shape=(2,), levels=None), "discriminator", "critic, generator"),
        (vae, "generator", "model"),
    ):
        with pytest.raises(SettingsError, match=f"no player '{player}'; it has: {known}"):
            model(X, player=player)
    with pytest.raises(SettingsError, match="no player 'critic'"):
        gan.loss(Batch(X), "critic")


@pytest.mark.parametrize("name", MODELS)
def test_a_context_that_nothing_takes_is_refused(name):
    model = genfuse.create(name, shape=(2,), levels=None, **(GAUSSIAN if name == "vae" else {}))
    with pytest.raises(SettingsError, match=r"was given a context y \(4, 3\) and is not conditional.*embedding="):
        model.loss(Batch(X, torch.zeros(4, 3)), model.players()[0].name)
    for y in (torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)):
        with pytest.raises(SettingsError, match="not conditional"):
            model(X, y)
    model.loss(Batch(X, torch.zeros(4, dtype=torch.long)), model.players()[0].name)  # a data set's labels do no harm


@pytest.mark.parametrize("name", MODELS)
def test_a_number_of_samples_and_a_dtype_that_do_not_fit_are_named(name):
    model = genfuse.create(name, shape=(2,), levels=None, **(GAUSSIAN if name == "vae" else {})).eval()
    for n in (-1, 2.5, "3", None):
        with pytest.raises(SettingsError, match=f"n must be how many examples.*; got {n!r}"):
            model.sample(n)
    assert model.sample(0).shape == (0, 2)
    for verb in {"log_prob", "encode", "reconstruct"} & set(dir(model)):
        with pytest.raises(DataError, match=r"x must be torch\.float32, .*; got torch\.float64"):
            getattr(model, verb)(X.double())
        getattr(model.double(), verb)(X.double())
        model.float()


@pytest.mark.parametrize("name", ["realnvp", "maf", "nsf", "nsf-ar", "glow", "ddpm", "edm"])
def test_a_row_with_what_is_no_number_spoils_no_other(name):
    model = genfuse.create(name, shape=(2,), levels=None).eval()
    x = torch.randn(4, 2)
    expected = model.log_prob(x)
    x[1, 0] = float("nan")
    found = model.log_prob(x)
    assert found.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(found[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["realnvp", "maf", "nsf", "nsf-ar", "glow"])
def test_flows_of_16_bits_sample_and_encode(name):
    torch.manual_seed(0)
    model = genfuse.create(name, shape=(2,), levels=None).eval()
    z = torch.randn(4, 2)
    expected = model.decode(z)
    half = model.bfloat16()
    torch.testing.assert_close(half.decode(z.bfloat16()).float(), expected, rtol=0.1, atol=0.1)
    assert half.log_prob(expected.bfloat16()).isfinite().all()
