"""The contract of plugins: all built-in ones keep it, and each clause notices what it is there for."""

import re
import sys

import pytest
import torch
from distributions import write_distribution

import genfuse
from genfuse import plugins
from genfuse.errors import SettingsError
from genfuse.testing import ContractError, check_dataset, check_model, model_clauses

DENOISER = {"channels": (8, 8), "hidden": (32,)}
CHEAP = {
    "ddpm": {"timesteps": 50, **DENOISER},
    "score": {"sigmas": 20, **DENOISER},
    "edm": DENOISER,
    "flow-matching": DENOISER,
    "glow": {"steps": 2, "channels": (8,), "hidden": (16,)},
}

BELL = """
import math
from dataclasses import dataclass
import torch
from torch import nn
from genfuse.data import Dataset, Split
from genfuse.errors import SettingsError
from genfuse.models import GenerativeModel, Player, adam

@dataclass(frozen=True)
class Config:
    shape: tuple[int, ...] = (2,)
    width: float = 1.0

class Bell(GenerativeModel):
    Config = Config

    def __init__(self, config):
        super().__init__(config)
        self.mean = nn.Parameter(torch.zeros(1, *config.shape))
        self.log_std = nn.Parameter(torch.zeros(1, *config.shape))

    def check_data(self, data):
        super().check_data(data)
        if data.levels is not None:
            raise SettingsError("it is for real numbers")

    def log_prob(self, x):
        z = (x - self.mean) / self.log_std.exp()
        return -(0.5 * z**2 + self.log_std + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def loss(self, batch, player):
        loss = -self.log_prob(batch.x).mean()
        return loss, {"nll": loss}

    def sample(self, n, *, generator=None):
        z = torch.randn(n, *self.config.shape, generator=generator, device=self.device)
        return (self.mean + self.log_std.exp() * z).detach()

def rows(source):
    source.no_argument()
    generator = torch.Generator().manual_seed(source.seed)
    x = torch.randn(100, 2, generator=generator)
    return Dataset(source.name, {"train": Split(x[:80]), "test": Split(x[80:])})
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(source, kind, name): what ``name`` is in a module of that source, which a distribution brings."""
    monkeypatch.delenv("GENFUSE_DISABLE_PLUGINS", raising=False)

    def install(source: str, kind: str = "models", name: str = "Mine"):
        write_distribution(tmp_path / "acme", "acme", kind, {"mine": f"acme_mine:{name}"}, {"acme_mine": source})
        monkeypatch.syspath_prepend(str(tmp_path / "acme"))
        plugins.discover.cache_clear()
        return plugins.load(kind, "mine")

    yield install
    plugins.discover.cache_clear()
    sys.modules.pop("acme_mine", None)


@pytest.mark.parametrize("name", [p.name for p in plugins.discover("models") if p.distribution == "genfuse"])
def test_every_built_in_model_keeps_the_contract(name, monkeypatch):
    monkeypatch.setattr("genfuse.models.score.ScoreModel.sampler", ("langevin", 60))  # of 200 steps
    clauses = check_model(genfuse.models.load(name), **CHEAP.get(name, {}))
    assert len(clauses) >= 15


@pytest.mark.parametrize("name", ["gan", "realnvp", "edm"])
def test_conditional_models_keep_it_too(name):
    check_model(genfuse.models.load(name), conditional=True, **CHEAP.get(name, {}))


@pytest.mark.parametrize(("name", "argument"), [("digits", None), ("toy", "moons"), ("toy", "eight-gaussians")])
def test_built_in_data_sets_keep_the_contract(name, argument):
    check_dataset(plugins.load("datasets", name), argument)


def test_a_small_model_of_another_package_keeps_it(installed):
    before = torch.random.get_rng_state()
    check_model(installed(BELL, name="Bell"))
    assert torch.equal(before, torch.random.get_rng_state())


BROKEN = {
    "settings all have defaults": """
@dataclass
class Config:
    shape: tuple[int, ...] = (2,)
class Mine(Bell):
    Config = Config
""",
    "a way through JSON": """
@dataclass(frozen=True)
class Config:
    shape: tuple[int, ...] = (2,)
    pairs: tuple[tuple[int, int], ...] = ((1, 2),)
class Mine(Bell):
    Config = Config
""",
    "data of another shape is refused": """
class Mine(Bell):
    def check_data(self, data): pass
""",
    "each has one owner.*'mean': \\['a', 'b'\\]": """
class Mine(Bell):
    def players(self):
        return [Player("a", [self.mean], adam()), Player("b", [self.mean, self.log_std], adam())]
""",
    "each has one owner.*nobody owns log_std": """
class Mine(Bell):
    def players(self):
        return [Player("a", [self.mean], adam())]
""",
    "is a finite scalar.*a tensor \\(16,\\)": """
class Mine(Bell):
    def loss(self, batch, player):
        return -self.log_prob(batch.x), {}
""",
    "is a finite scalar.*is nan": """
class Mine(Bell):
    def loss(self, batch, player):
        loss, terms = super().loss(batch, player)
        return loss, {"ratio": loss * math.nan}
""",
    "a mean per example": """
class Mine(Bell):
    def loss(self, batch, player):
        return -self.log_prob(batch.x).sum(), {}
""",
    "has a gradient by each.*none by unused": """
class Mine(Bell):
    def __init__(self, config):
        super().__init__(config)
        self.unused = nn.Parameter(torch.zeros(3))
""",
    "has a gradient by each.*0 everywhere.*by matrix": """
class Mine(Bell):
    def __init__(self, config):
        super().__init__(config)
        self.matrix = nn.Parameter(torch.ones(2, 2))
    def loss(self, batch, player):
        loss, terms = super().loss(batch, player)
        return loss + 0 * self.matrix.sum(), terms
""",
    "finite examples.*sample\\(1\\) is torch.float32 \\(1, 3\\)": """
class Mine(Bell):
    def sample(self, n, *, generator=None):
        return torch.randn(n, 3, generator=generator)
""",
    "the same samples, another one others.*global generator": """
class Mine(Bell):
    def sample(self, n, *, generator=None):
        return self.mean.detach() + torch.randn(n, *self.config.shape)
""",
    "gives the same model again.*neither a parameter nor a buffer": """
class Mine(Bell):
    steps = 0
    def after_step(self, player): self.steps += 1
    def sample(self, n, *, generator=None): return super().sample(n, generator=generator) + self.steps
""",
    "a resumed run ends in the same weights.*mean": """
class Mine(Bell):
    steps = 0
    def after_step(self, player): self.steps += 1
    def loss(self, batch, player):
        loss, terms = super().loss(batch, player)
        return loss * (1 + self.steps % 3), terms
""",
    "a loop that never calls after_step ends in the same state.*different after 3 updates.*: steps": """
class Mine(Bell):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("steps", torch.zeros(()))
    def after_step(self, player): self.steps += 1
""",
    "a copy, by copy.deepcopy or pickle, draws the same samples.*lambda": """
class Mine(Bell):
    def __init__(self, config):
        super().__init__(config)
        self.power = lambda: 1
""",
    "moves whole.*offset stays behind": """
class Mine(Bell):
    def __init__(self, config):
        super().__init__(config)
        self.offset = torch.zeros(2)
""",
    "finite nats.*log_prob of 4 examples is \\(4, 2\\)": """
class Mine(Bell):
    def log_prob(self, x):
        return -(0.5 * x**2 + self.mean + self.log_std)
    def loss(self, batch, player):
        return -self.log_prob(batch.x).mean(), {}
""",
    "density of the samples.*6.\\d+ . .*a constant": """
class Mine(Bell):
    def log_prob(self, x):
        return super().log_prob(x) - math.log(2 * math.pi)
""",
}


@pytest.mark.parametrize("said", BROKEN, ids=lambda said: re.sub(r"\W+", "-", said)[:40])
def test_a_model_that_breaks_a_clause_is_told_which_one_and_what_was_seen(installed, said):
    with pytest.raises(ContractError) as caught:
        check_model(installed(BELL + BROKEN[said]))
    assert re.search(said, str(caught.value).replace("\n", " ")), caught.value
    assert "acme_mine:Mine breaks" in str(caught.value)


def test_samples_beyond_the_range_of_discrete_data_are_seen(installed):
    with pytest.raises(ContractError, match=r"on digits:[\s\S]*sample\(\d\) lies in \[-"):
        check_model(installed(BELL + "class Mine(Bell):\n    def check_data(self, data): pass"))


def test_a_model_that_fails_on_a_shape_is_told_to_refuse_it(installed):
    source = BELL + "class Mine(Bell):\n    def __init__(self, config): raise IndexError('tuple index out of range')"
    with pytest.raises(ContractError, match=r"it refuses with a SettingsError[\s\S]*seen: IndexError: tuple index out"):
        check_model(installed(source))


def test_a_class_that_is_not_installed_is_told_so():
    class Mine(genfuse.models.load("vae")):
        pass

    with pytest.raises(ContractError, match=r'entry point of the group "genfuse.models"[\s\S]*not registered'):
        check_model(Mine)


def test_settings_that_fit_no_data_are_an_error_that_says_why():
    with pytest.raises(SettingsError, match="GAN takes no data that it could be tried on: digits: latent"):
        check_model(genfuse.models.load("gan"), latent_dim=0)


BROKEN_DATA = {
    "returns a whole Dataset.*must return a genfuse.data.Dataset": "def mine(source): return 3",
    "the same seed gives the same data.*train split differs": """
def mine(source):
    source.no_argument()
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(torch.seed() % 2**31))
    return Dataset(source.name, {"train": Split(x[:80]), "test": Split(x[80:])})
""",
    "global generator alone": """
def mine(source):
    source.no_argument()
    torch.manual_seed(source.seed)
    x = torch.randn(100, 2)
    return Dataset(source.name, {"train": Split(x[:80]), "test": Split(x[80:])})
""",
    "held out is held out.*80 of 80": """
def mine(source):
    source.no_argument()
    data = rows(source)
    return Dataset(source.name, {"train": data.splits["train"], "test": data.splits["train"]})
""",
    "factors, if there are any, vary.*height has one value": """
def mine(source):
    source.no_argument()
    import dataclasses
    splits = {part: dataclasses.replace(split, factors=torch.zeros(len(split), 1, dtype=torch.int64))
              for part, split in rows(source).splits.items()}
    return Dataset(source.name, splits, factors={"height": (0.0, 1.0)})
""",
    "an argument that it does not understand": """
def mine(source):
    import dataclasses
    return rows(dataclasses.replace(source, argument=None))
""",
}


@pytest.mark.parametrize("said", BROKEN_DATA, ids=lambda said: re.sub(r"\W+", "-", said)[:40])
def test_a_data_set_that_breaks_a_clause_is_told_which_one(installed, said):
    with pytest.raises(ContractError) as caught:
        check_dataset(installed(BELL + BROKEN_DATA[said], "datasets", "mine"))
    assert re.search(said, str(caught.value).replace("\n", " ")), caught.value


def test_the_data_set_of_another_package_keeps_it(installed):
    assert check_dataset(installed(BELL, "datasets", "rows"))


@pytest.mark.parametrize("clause", model_clauses(genfuse.models.load("realnvp"), layers=2, hidden=(8,)))
def test_each_clause_is_a_test_of_its_own(clause):
    clause()


def test_a_known_exception_is_expected_to_fail_and_must(installed):
    broken = installed(BELL + BROKEN["data of another shape is refused"])
    moons = genfuse.load_data("toy:moons")
    clauses = {each.id: each for each in model_clauses(broken, moons, exceptions={"other-data": "takes any"})}
    assert {"api", "toy:moons-loss", "toy:moons-other-data", "toy:moons-own-loop"} <= clauses.keys()
    [mark] = clauses["toy:moons-other-data"].marks
    assert (mark.kwargs["reason"], mark.kwargs["strict"]) == ("takes any", True)
    with pytest.raises(ContractError, match="breaks 1 of 1 clauses of its contract on toy:moons"):
        clauses["toy:moons-other-data"].values[0]()
    clauses["toy:moons-loss"].values[0]()
    assert "data of another shape" not in " ".join(check_model(broken, moons, exceptions={"other-data": "takes any"}))
    with pytest.raises(SettingsError, match="there is no clause 'odd'"):
        check_model(broken, exceptions={"odd": ""})
