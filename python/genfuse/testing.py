"""The contract of plugins as a test suite for their authors.

from genfuse.testing import check_model
from my_package import MyModel

def test_the_contract():
    check_model(MyModel)
"""

import contextlib
import dataclasses
import io
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfuse import plugins
from genfuse.data import Dataset, Source, Split, load_data
from genfuse.errors import DataError, GenfuseError, SettingsError
from genfuse.models import FACTS, Batch, GenerativeModel, configure, create, unfit
from genfuse.training import Trainer
from genfuse.training.run import plugin_of

DATA = ("digits", "toy:moons")  # images of 17 levels, and real-valued points: what a model is tried on
NORMALIZED = 3  # dimensions up to which a density is held against samples
DRAWN = 2000  # samples for that


class ContractError(AssertionError):
    """A plugin breaks clauses of the contract. The message names each, and what was seen."""


def check_model(cls: type[GenerativeModel], *data: Dataset, **settings: Any) -> list[str]:
    """Hold a model class against the contract of `GenerativeModel`; returns the clauses that were checked.

    It is tried with ``settings`` on each of ``data``, by default on those of digits and toy:moons whose examples it
    takes. The class has to be installed as a plugin. It is trained for a few steps only, on the CPU, which takes
    seconds; torch's global generator is left as it was.

    Raises ContractError, which names every clause that is broken and what was seen, and SettingsError where the model
    takes none of the data.

    >>> check_model(MyModel, latent_dim=4)
    """
    if broken := _run(_PLUGIN, cls):
        raise ContractError(_told(cls, "", broken, len(_PLUGIN)))
    cases, refused = [], []
    for each in data or map(load_data, DATA):
        few = _shortened(each)
        try:
            config = configure(cls, settings, few)
            cls.from_config(config).check_data(few)
        except SettingsError as error:
            refused.append(f"{each.name}: {error}")
        except Exception as error:
            seen = {_REFUSES: f"{type(error).__name__}: {error}"}
            raise ContractError(_told(cls, f" on {each.name}", seen, len(_MODEL))) from error
        else:
            cases.append(_Case(cls, plugin_of(cls), config, few))
    if not cases or (data and refused):
        raise SettingsError(f"{cls.__name__} takes no data that it could be tried on: {'; '.join(refused)}")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        told = [
            _told(cls, f" on {case.data.name}", broken, len(_MODEL)) for case in cases if (broken := _run(_MODEL, case))
        ]
    if told:
        raise ContractError("\n".join(told))
    return [*_PLUGIN, *_MODEL]


def check_dataset(
    make: Callable[[Source], Dataset], argument: str | None = None, *, root: str | Path | None = None
) -> list[str]:
    """Hold a data set plugin against its contract; returns the clauses that were checked.

    ``argument`` is what a user would type after the ':', ``root`` what --data-root would be. The function has to be
    installed as a plugin. Raises ContractError, which names every clause that is broken and what was seen.

    >>> check_dataset(my_package.cats)
    """
    with torch.random.fork_rng(devices=[]):
        broken = _run(_DATASET, _DataCase(make, argument, None if root is None else Path(root)))
    if broken:
        raise ContractError(_told(make, "", broken, len(_DATASET)))
    return list(_DATASET)


_REFUSES = "what a model cannot take, a shape, data or settings, it refuses with a SettingsError when it is made"

Clauses = dict[str, Callable[[Any], None]]
_PLUGIN: Clauses = {}
_MODEL: Clauses = {}
_DATASET: Clauses = {}


class _BrokenError(Exception):
    """What was seen in place of what a clause asks for."""


def _clause(clauses: Clauses, text: str) -> Callable:
    def register(check: Callable[[Any], None]) -> Callable[[Any], None]:
        clauses[text] = check
        return check

    return register


def _run(clauses: Clauses, case: Any) -> dict[str, str]:
    """The clauses that are broken, and what was seen."""
    broken = {}
    for text, check in clauses.items():
        torch.manual_seed(0)
        try:
            check(case)
        except _BrokenError as seen:
            broken[text] = str(seen)
        except Exception as error:  # of the plugin: whatever it is, it is the author's to see
            broken[text] = f"{type(error).__name__}: {error}"
    return broken


def _told(what: Any, where: str, broken: dict[str, str], clauses: int) -> str:
    lines = [f"  - {text}\n    seen: {seen}" for text, seen in broken.items()]
    name = f"{what.__module__}:{what.__qualname__}"
    return "\n".join([f"{name} breaks {len(broken)} of {clauses} clauses of its contract{where}:", *lines])


def _shortened(data: Dataset) -> Dataset:
    def few(split: Split, n: int) -> Split:
        return Split(split.x[:n], None if split.y is None else split.y[:n])

    splits = {part: few(split, 64 if part == "train" else 32) for part, split in data.splits.items()}
    return dataclasses.replace(data, splits=splits)


@dataclass(frozen=True)
class _Case:
    """A model class with settings for some data."""

    cls: type[GenerativeModel]
    name: str
    config: Any
    data: Dataset

    def model(self, steps: int = 0, seed: int = 0) -> GenerativeModel:
        """A fresh model, the same for the same seed, after some steps of training."""
        torch.manual_seed(seed)
        model = self.cls(self.config)
        if steps:
            self.trainer(steps).fit(model, self.data)
        return model.train(not steps)

    def trainer(self, steps: int, **options: Any) -> Trainer:
        return Trainer(steps=steps, batch_size=16, device="cpu", pictures=False, **options)

    def batch(self, n: int = 16) -> Batch:
        return self.data.batch("train", slice(0, n))

    def labels(self, model: GenerativeModel, n: int) -> dict[str, Tensor]:
        """The argument ``y`` of verbs of a conditional model; none of any other."""
        y = self.data.splits["train"].y
        return {"y": y[:n].to(model.device)} if model.conditional and y is not None else {}

    def draw(self, model: GenerativeModel, n: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(model.device).manual_seed(seed)
        with torch.no_grad():
            return model.sample(n, generator=generator, **self.labels(model, n))


@_clause(_PLUGIN, "a model is a subclass of GenerativeModel for this plugin API, with the verb loss(batch, player)")
def _(cls: type) -> None:
    if wrong := unfit(cls):
        raise _BrokenError(f"it {wrong}")


@_clause(_PLUGIN, "`Config` is a frozen dataclass whose settings all have defaults")
def _(cls: Any) -> None:
    if not cls.Config.__dataclass_params__.frozen:
        raise _BrokenError("it can be changed: write @dataclass(frozen=True)")
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls.Config)
    if bare := [field.name for field in fields if field.default is missing and field.default_factory is missing]:
        raise _BrokenError(f"no default: {', '.join(bare)}")


@_clause(_PLUGIN, 'the class is installed as an entry point of the group "genfuse.models"')
def _(cls: type) -> None:
    plugin_of(cls)


@_clause(_MODEL, "settings are the same after a way through JSON, through a file and through the command line")
def _(case: _Case) -> None:
    from genfuse.cli.train import arguments_of, parse

    plain = json.loads(json.dumps(dataclasses.asdict(case.config)))
    if (again := configure(case.cls, plain)) != case.config:
        raise _BrokenError(f"{case.config} became {again} by JSON")
    own = {name: value for name, value in plain.items() if name not in FACTS}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "settings.json")
        file.write_text(json.dumps({"data": case.data.name, "model": own}), encoding="utf-8")
        arguments = arguments_of(case.name, file)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            typed = parse(case.name, arguments).model
    except SystemExit:
        raise _BrokenError(
            f"`genfuse train {case.name} {' '.join(arguments)}` is refused:\n{said.getvalue()}"
        ) from None
    if (again := configure(case.cls, typed, case.data)) != case.config:
        raise _BrokenError(f"{case.config} became {again} by the command line")


@_clause(_MODEL, "data of another shape is refused by check_data with a SettingsError")
def _(case: _Case) -> None:
    other = {part: Split(split.x.unsqueeze(1), split.y) for part, split in case.data.splits.items()}
    data = dataclasses.replace(case.data, splits=other)
    try:
        case.model().check_data(data)
    except SettingsError:
        return
    raise _BrokenError(
        f"a model of examples {case.data.shape} took examples {data.shape}: call super().check_data(data)"
    )


@_clause(_MODEL, "players have names of their own and share the parameters among them: each has one owner")
def _(case: _Case) -> None:
    model = case.model()
    players = model.players()
    names = [player.name for player in players]
    if not players or len(set(names)) < len(names):
        raise _BrokenError(f"players {names}")
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    owners: dict[int, list[str]] = {}
    for player in players:
        for parameter in player.parameters:
            owners.setdefault(id(parameter), []).append(player.name)
    if strangers := owners.keys() - known.keys():
        raise _BrokenError(f"{len(strangers)} tensors that players own are no parameters of the model")
    if shared := {known[key]: of for key, of in owners.items() if len(of) > 1}:
        raise _BrokenError(f"owned more than once: {shared}")
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if orphans := [known[key] for key in trained - owners.keys()]:
        raise _BrokenError(
            f"nobody owns {', '.join(sorted(orphans))}: if it is not to be trained, requires_grad must be False"
        )


@_clause(_MODEL, "loss(batch, player) is a finite scalar, beside a dict of finite scalars by name, for every player")
def _(case: _Case) -> None:
    model = case.model()
    for player in model.players():
        loss, terms = model.loss(case.batch(), player.name)
        for name, value in {"the loss": loss, **terms}.items():
            if not isinstance(value, Tensor) or value.numel() != 1 or value.ndim:
                got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise _BrokenError(f"{name} of {player.name!r} is {got}")
            if not value.isfinite():
                raise _BrokenError(f"{name} of {player.name!r} is {value.item()}")


@_clause(_MODEL, "the loss is a mean per example: a batch of more of the same has the same loss")
def _(case: _Case) -> None:
    model = case.model().eval()
    batch = case.batch()
    more = Batch(torch.cat([batch.x] * 4), None if batch.y is None else torch.cat([batch.y] * 4))
    for player in model.players():
        one, four = (
            torch.stack([model.loss(each, player.name)[0].detach().double() for _ in range(16)])
            for each in (batch, more)
        )
        noise = 6 * math.sqrt((one.var() + four.var()).item() / 16)
        if abs(four.mean() - one.mean()) > noise + 0.5 * abs(four.mean() - 4 * one.mean()):
            raise _BrokenError(
                f"{player.name!r}: {one.mean():.5g} for {len(batch.x)} examples, {four.mean():.5g} for these 4 times"
            )


@_clause(_MODEL, "a player's loss has a gradient by each of its parameters, and by its weights one that is not 0")
def _(case: _Case) -> None:
    model = case.model(steps=6).train()  # the first steps wake what starts at 0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for player in model.players():
        model.zero_grad()
        for start in range(0, 64, 16):
            model.loss(case.data.batch("train", slice(start, start + 16)), player.name)[0].backward()
        trained = [p for p in player.parameters if p.requires_grad]
        if cut := [names[id(p)] for p in trained if p.grad is None]:
            raise _BrokenError(f"none by {', '.join(cut)}, of {player.name!r}")
        # A loss may not change with a bias: with that of a Wasserstein critic's last layer it never does.
        if dead := [names[id(p)] for p in trained if p.ndim > 1 and not p.grad.any()]:  # type: ignore[union-attr]
            raise _BrokenError(f"0 everywhere after some steps of training, by {', '.join(dead)}, of {player.name!r}")


@_clause(_MODEL, "sample(n) is n finite examples (n, *shape); of discrete data in [0, 1]")
def _(case: _Case) -> None:
    model = case.model(steps=2)
    for n in (1, 5):
        x = case.draw(model, n)
        if x.shape != (n, *case.data.shape) or not x.is_floating_point():
            raise _BrokenError(f"sample({n}) is {x.dtype} {tuple(x.shape)}; examples are {case.data.shape}")
        if not x.isfinite().all():
            raise _BrokenError(f"sample({n}) has {int((~x.isfinite()).sum())} NaN or infinite values")
        if case.data.levels is not None and not 0 <= x.min() <= x.max() <= 1:
            raise _BrokenError(f"sample({n}) lies in [{x.min():.4g}, {x.max():.4g}]")


@_clause(
    _MODEL, "a generator of the same seed gives the same samples, another one others; the global one is left alone"
)
def _(case: _Case) -> None:
    model = case.model(steps=2)
    torch.manual_seed(0)
    first = case.draw(model, 4)
    if not torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0))):
        raise _BrokenError("sample(4, generator=...) drew from torch's global generator")
    again, other = case.draw(model, 4), case.draw(model, 4, seed=1)
    if not torch.equal(first, again):
        raise _BrokenError(f"two draws of one seed differ by up to {(first - again).abs().max():.4g}")
    if torch.equal(first, other):
        raise _BrokenError("draws of two seeds are the same")


@_clause(_MODEL, "a run folder gives the same model again: the same weights, the same samples")
def _(case: _Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = case.cls.from_config(case.config)
        run = case.trainer(2, out=Path(folder, "run")).fit(model, case.data)
        assert run is not None
        again = run.model()
    _same_state(model, again, "of the model that was loaded")
    if not torch.equal(case.draw(model.eval(), 4), case.draw(again, 4)):
        raise _BrokenError(
            "the weights are the same, the samples are not: some state is neither a parameter nor a buffer"
        )


@_clause(_MODEL, "a resumed run ends in the same weights, bit for bit, as one that was never stopped")
def _(case: _Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        straight, stopped = Path(folder, "straight"), Path(folder, "stopped")
        models = [self.model() for self in (case, case, case)]
        case.trainer(8, out=straight).fit(models[0], case.data)
        case.trainer(4, out=stopped).fit(models[1], case.data)
        case.trainer(8, out=stopped, resume=True).fit(models[2], case.data)
        _same_state(models[0], models[2], "after 4 steps and 4 resumed ones, against 8 steps")


def _same_state(model: GenerativeModel, other: GenerativeModel, where: str) -> None:
    state, of_other = model.state_dict(), other.state_dict()
    if state.keys() != of_other.keys():
        raise _BrokenError(f"only one has {', '.join(sorted(state.keys() ^ of_other.keys()))}, {where}")
    if different := [name for name in state if not torch.equal(state[name], of_other[name])]:
        raise _BrokenError(f"different {where}: {', '.join(different)}")


@_clause(_MODEL, "a model moves whole to another device: its tensors are parameters and buffers, and it works there")
def _(case: _Case) -> None:
    model = case.model(steps=2)
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor):
                raise _BrokenError(
                    f"{name + '.' if name else ''}{attribute} stays behind: register it by register_buffer"
                )
    if torch.cuda.is_available():
        model.cuda()
        batch = dataclasses.replace(case, data=case.data.to("cuda")).batch()
        for player in model.players():
            model.loss(batch, player.name)
        if case.draw(model, 2).device.type != "cuda":
            raise _BrokenError("sample(2) of a model on a GPU is not there")


@_clause(_MODEL, "each of `likelihoods` is finite nats (N,) of examples (N, *shape); reconstruct(x) is as x")
def _(case: _Case) -> None:
    model: Any = case.model(steps=2)
    x = case.batch(4).x
    given = case.labels(model, 4)
    with torch.no_grad():
        for verb in model.likelihoods:
            value = getattr(model, verb)(x, **given)
            if value.shape != (4,) or not value.isfinite().all():
                raise _BrokenError(f"{verb} of 4 examples is {tuple(value.shape)}: {value.flatten().tolist()[:8]}")
        if hasattr(model, "reconstruct") and (again := model.reconstruct(x, **given)).shape != x.shape:
            raise _BrokenError(f"reconstruct of x {tuple(x.shape)} is {tuple(again.shape)}")


@_clause(_MODEL, "log_prob is the density of the samples: of few dimensions, it integrates to 1 where they are")
def _(case: _Case) -> None:
    dimensions = math.prod(case.data.shape)
    model: Any = case.model(steps=2)
    if (
        case.data.levels is not None
        or dimensions > NORMALIZED
        or "log_prob" not in model.likelihoods
        or model.conditional
    ):
        return
    x = case.draw(model, DRAWN).flatten(1).double()
    centres, points = x[: DRAWN // 2], x[DRAWN // 2 :]
    # Any density q has E_p[q / p] = 1: here a kernel estimate of p, of one half of the samples, at the other half.
    width = centres.std(0) * len(centres) ** (-1 / (dimensions + 4))
    distances = torch.cdist(points / width, centres / width).square()
    log_q = (-0.5 * distances).logsumexp(1) - math.log(len(centres)) - (width * math.sqrt(2 * math.pi)).log().sum()
    with torch.no_grad():
        log_p = model.log_prob(points.float().view(-1, *case.data.shape)).double()
    ratio = (log_q - log_p).exp()
    mean, error = ratio.mean().item(), ratio.std().item() / math.sqrt(len(ratio))
    if not 1 / 1.5 - 5 * error < mean < 1.5 + 5 * error:
        raise _BrokenError(
            f"the density of {len(points)} samples is {mean:.3g} ± {error:.2g} times exp(log_prob): a constant, a "
            "log-determinant or a sign may be missing"
        )


@dataclass(frozen=True)
class _DataCase:
    """A data set plugin, as a user would ask for it."""

    make: Callable[[Source], Dataset]
    argument: str | None
    root: Path | None

    @property
    def name(self) -> str:
        for plugin in plugins.discover("datasets"):
            with contextlib.suppress(GenfuseError):
                if plugin.load() is self.make:
                    return plugins.typed(plugin)
        raise _BrokenError(
            f"{self.make.__module__}:{self.make.__qualname__} is not installed as an entry point of the group "
            '"genfuse.datasets"'
        )

    def load(self, seed: int = 0) -> Dataset:
        name = self.name if self.argument is None else f"{self.name}:{self.argument}"
        return load_data(name, root=self.root, seed=seed)


@_clause(_DATASET, 'it is installed under "genfuse.datasets", and returns a whole Dataset, which is read by its name')
def _(case: _DataCase) -> None:
    case.load()


@_clause(_DATASET, "the same seed gives the same data, in every split")
def _(case: _DataCase) -> None:
    first, again = case.load(), case.load()
    for part, split in first.splits.items():
        if not torch.equal(split.x, again.splits[part].x):
            raise _BrokenError(f"the {part} split differs from one time to the other: draw with the source's seed")


@_clause(_DATASET, "loading leaves torch's global generator alone")
def _(case: _DataCase) -> None:
    before = torch.random.get_rng_state()
    case.load()
    if not torch.equal(before, torch.random.get_rng_state()):
        raise _BrokenError("it drew from it: use torch.Generator().manual_seed(source.seed)")


@_clause(_DATASET, "what is held out is held out: most test examples are not in the training split")
def _(case: _DataCase) -> None:
    data = case.load()
    train, test = ({row.numpy().tobytes() for row in data.splits[part].x.cpu()} for part in ("train", "test"))
    if len(test & train) > 0.5 * len(test):
        raise _BrokenError(f"{len(test & train)} of {len(test)} different test examples are training examples too")


@_clause(_DATASET, "an argument that it does not understand is a DataError")
def _(case: _DataCase) -> None:
    odd = "no such thing, surely"
    try:
        load_data(f"{case.name}:{odd}", root=case.root)
    except DataError:
        return
    raise _BrokenError(f"{case.name}:{odd!s} was loaded: call source.no_argument() where there is nothing to give")


@_clause(_DATASET, "a model trains on it: two steps of a VAE have finite losses")
def _(case: _DataCase) -> None:
    data = case.load()
    model = create("vae", data, decoder="gaussian" if data.levels is None else "bernoulli", hidden=(16,), latent_dim=2)
    Trainer(steps=2, batch_size=16, device="cpu").fit(model, _shortened(data))
