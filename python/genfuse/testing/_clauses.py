"""The contracts of models and data sets, clause by clause."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfuse import models, plugins
from genfuse.cli.train import arguments_of, parse
from genfuse.data import Batch, Dataset, Source, Split, load_data
from genfuse.errors import DataError, GenfuseError, SettingsError
from genfuse.models import GenerativeModel
from genfuse.training import Run, Trainer
from genfuse.training.run import plugin_of


class BrokenError(Exception):
    """What was seen in place of what a clause asks for."""


Clauses = dict[str, tuple[str, Callable[[Any], None]]]  # by name: what it asks for, and the check


def clause(clauses: Clauses, name: str, text: str) -> Callable:
    """Register a check under a name; it raises BrokenError, or whatever a plugin raises."""

    def register(check: Callable[[Any], None]) -> Callable[[Any], None]:
        clauses[name] = text, check
        return check

    return register


def seen(check: Callable[[Any], None], case: Any) -> str | None:
    """What was seen, if a clause is broken."""
    torch.manual_seed(0)
    try:
        check(case)
    except BrokenError as error:
        return str(error)
    except Exception as error:  # of the plugin: whatever it is, it is the author's to see
        return f"{type(error).__name__}: {error}"
    return None


def told(what: Any, where: str, broken: dict[str, str], clauses: int) -> str:
    """The message of a ContractError on the data ``where``, if on any, of {the text of a clause: what was seen}."""
    lines = [f"  - {text}\n    seen: {found}" for text, found in broken.items()]
    name, where = f"{what.__module__}:{what.__qualname__}", where and f" on {where}"
    return "\n".join([f"{name} breaks {len(broken)} of {clauses} clauses of its contract{where}:", *lines])


PLUGIN: Clauses = {}  # of a class
MODEL: Clauses = {}  # of a `ModelCase`
DATASET: Clauses = {}  # of a `DataCase`
NORMALIZED = 3  # dimensions up to which a density is held against samples
DRAWN = 2000  # samples for that


def shortened(data: Dataset) -> Dataset:
    splits = {part: split.some(slice(64 if part == "train" else 32)) for part, split in data.splits.items()}
    return dataclasses.replace(data, splits=splits)


@dataclass(frozen=True)
class ModelCase:
    """A model class with settings for some data."""

    cls: type[GenerativeModel]
    name: str
    config: Any
    data: Dataset

    def model(self, steps: int = 0, seed: int = 0) -> GenerativeModel:
        """A fresh model, the same for the same seed, after some steps of training."""
        torch.manual_seed(seed)
        model = self.cls.from_config(self.config)
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


@clause(
    PLUGIN, "api", "a model is a subclass of GenerativeModel for this plugin API, with the verb loss(batch, player)"
)
def _api(cls: type) -> None:
    if wrong := models.unfit(cls):
        raise BrokenError(f"it {wrong}")


@clause(PLUGIN, "config", "`Config` is a frozen dataclass whose settings all have defaults")
def _config(cls: Any) -> None:
    if not cls.Config.__dataclass_params__.frozen:
        raise BrokenError("it can be changed: write @dataclass(frozen=True)")
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls.Config)
    if bare := [field.name for field in fields if field.default is missing and field.default_factory is missing]:
        raise BrokenError(f"no default: {', '.join(bare)}")


@clause(PLUGIN, "installed", 'the class is installed as an entry point of the group "genfuse.models"')
def _installed(cls: type) -> None:
    plugin_of(cls)


@clause(MODEL, "settings", "settings are the same after a way through JSON, a file and the command line")
def _settings(case: ModelCase) -> None:
    plain = json.loads(json.dumps(dataclasses.asdict(case.config)))
    if (again := models.configure(case.cls, plain)) != case.config:
        raise BrokenError(f"{case.config} became {again} by JSON")
    own = {name: value for name, value in plain.items() if name not in models.FACTS}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "settings.json")
        file.write_text(json.dumps({"data": case.data.name, "model": own}), encoding="utf-8")
        arguments = arguments_of(case.name, file)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            typed = parse(case.name, arguments).model
    except SystemExit:
        raise BrokenError(f"`genfuse train {case.name} {' '.join(arguments)}` is refused:\n{said.getvalue()}") from None
    if (again := models.configure(case.cls, typed, case.data)) != case.config:
        raise BrokenError(f"{case.config} became {again} by the command line")


@clause(MODEL, "other-data", "data of another shape is refused by check_data with a SettingsError")
def _other_data(case: ModelCase) -> None:
    other = {part: Split(split.x.unsqueeze(1), split.y) for part, split in case.data.splits.items()}
    data = dataclasses.replace(case.data, splits=other)
    try:
        case.model().check_data(data)
    except SettingsError:
        return
    raise BrokenError(
        f"a model of examples {case.data.shape} took examples {data.shape}: call super().check_data(data)"
    )


@clause(MODEL, "players", "players have names of their own and share the parameters among them: each has one owner")
def _players(case: ModelCase) -> None:
    model = case.model()
    players = model.players()
    names = [player.name for player in players]
    if not players or len(set(names)) < len(names):
        raise BrokenError(f"players {names}")
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    owners: dict[int, list[str]] = {}
    for player in players:
        for parameter in player.parameters:
            owners.setdefault(id(parameter), []).append(player.name)
    if strangers := owners.keys() - known.keys():
        raise BrokenError(f"{len(strangers)} tensors that players own are no parameters of the model")
    if shared := {known[key]: of for key, of in owners.items() if len(of) > 1}:
        raise BrokenError(f"owned more than once: {shared}")
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if orphans := [known[key] for key in trained - owners.keys()]:
        raise BrokenError(
            f"nobody owns {', '.join(sorted(orphans))}: if it is not to be trained, requires_grad must be False"
        )


@clause(
    MODEL, "loss", "loss(batch, player) is a finite scalar, beside a dict of finite scalars by name, for every player"
)
def _loss(case: ModelCase) -> None:
    model = case.model()
    for player in model.players():
        loss, terms = model.loss(case.batch(), player.name)
        for name, value in {"the loss": loss, **terms}.items():
            if not isinstance(value, Tensor) or value.numel() != 1 or value.ndim:
                got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise BrokenError(f"{name} of {player.name!r} is {got}")
            if not value.isfinite():
                raise BrokenError(f"{name} of {player.name!r} is {value.item()}")


@clause(MODEL, "mean-loss", "the loss is a mean per example: a batch of more of the same has the same loss")
def _mean_loss(case: ModelCase) -> None:
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
            raise BrokenError(
                f"{player.name!r}: {one.mean():.5g} for {len(batch.x)} examples, {four.mean():.5g} for these 4 times"
            )


@clause(
    MODEL, "gradients", "a player's loss has a gradient by each of its parameters, and by its weights one that is not 0"
)
def _gradients(case: ModelCase) -> None:
    model = case.model(steps=6).train()  # the first steps wake what starts at 0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for player in model.players():
        model.zero_grad()
        for start in range(0, 64, 16):
            model.loss(case.data.batch("train", slice(start, start + 16)), player.name)[0].backward()
        trained = [p for p in player.parameters if p.requires_grad]
        if cut := [names[id(p)] for p in trained if p.grad is None]:
            raise BrokenError(f"none by {', '.join(cut)}, of {player.name!r}")
        # A loss may not change with a bias: with that of a Wasserstein critic's last layer it never does.
        if dead := [names[id(p)] for p in trained if p.ndim > 1 and not p.grad.any()]:  # type: ignore[union-attr]
            raise BrokenError(f"0 everywhere after some steps of training, by {', '.join(dead)}, of {player.name!r}")


@clause(MODEL, "samples", "sample(n) is n finite examples (n, *shape); of discrete data in [0, 1]")
def _samples(case: ModelCase) -> None:
    model = case.model(steps=2)
    for n in (1, 5):
        x = case.draw(model, n)
        if x.shape != (n, *case.data.shape) or not x.is_floating_point():
            raise BrokenError(f"sample({n}) is {x.dtype} {tuple(x.shape)}; examples are {case.data.shape}")
        if not x.isfinite().all():
            raise BrokenError(f"sample({n}) has {int((~x.isfinite()).sum())} NaN or infinite values")
        if case.data.levels is not None and not 0 <= x.min() <= x.max() <= 1:
            raise BrokenError(f"sample({n}) lies in [{x.min():.4g}, {x.max():.4g}]")


@clause(
    MODEL,
    "generator",
    "a generator of the same seed gives the same samples, another one others; the global one is left alone",
)
def _generator(case: ModelCase) -> None:
    model = case.model(steps=2)
    torch.manual_seed(0)
    first = case.draw(model, 4)
    if not torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0))):
        raise BrokenError("sample(4, generator=...) drew from torch's global generator")
    again, other = case.draw(model, 4), case.draw(model, 4, seed=1)
    if not torch.equal(first, again):
        raise BrokenError(f"two draws of one seed differ by up to {(first - again).abs().max():.4g}")
    if torch.equal(first, other):
        raise BrokenError("draws of two seeds are the same")


@clause(MODEL, "run-folder", "a run folder gives the same model again: the same weights, the same samples")
def _run_folder(case: ModelCase) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = case.cls.from_config(case.config)
        run = case.trainer(2, out=Path(folder, "run")).fit(model, case.data)
        assert isinstance(run, Run)
        again = run.model()
    _same_state(model, again, "of the model that was loaded")
    if not torch.equal(case.draw(model.eval(), 4), case.draw(again, 4)):
        raise BrokenError(
            "the weights are the same, the samples are not: some state is neither a parameter nor a buffer"
        )


@clause(MODEL, "resume", "a resumed run ends in the same weights, bit for bit, as one that was never stopped")
def _resume(case: ModelCase) -> None:
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
        raise BrokenError(f"only one has {', '.join(sorted(state.keys() ^ of_other.keys()))}, {where}")
    if different := [name for name in state if not torch.equal(state[name], of_other[name])]:
        raise BrokenError(f"different {where}: {', '.join(different)}")


@clause(
    MODEL,
    "own-loop",
    "a loop that never calls after_step ends in the same state: loss calls settle() first, if it matters",
)
def _own_loop(case: ModelCase) -> None:
    def trained(told: bool) -> GenerativeModel:
        model = case.model().train()
        torch.manual_seed(0)
        optimizers = {player.name: player.optimizer(player.parameters) for player in model.players()}
        for start in (0, 16, 32):
            for name, optimizer in optimizers.items():
                model.zero_grad()
                model.loss(case.data.batch("train", slice(start, start + 16)), name)[0].backward()
                optimizer.step()
                if told:
                    model.stepped(name)
        case.draw(model.eval(), 2)  # which has to show the last update too
        return model

    _same_state(trained(True), trained(False), "after 3 updates of each player in a loop with and without after_step")


@clause(MODEL, "copies", "a copy, by copy.deepcopy or pickle, draws the same samples")
def _copies(case: ModelCase) -> None:
    model = case.model(steps=2)
    drawn = case.draw(model, 2)
    for how, again in {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}.items():
        if not torch.equal(drawn, case.draw(again, 2)):
            raise BrokenError(f"a {how} of the model draws other samples")


@clause(
    MODEL, "device", "a model moves whole to another device: its tensors are parameters and buffers, and it works there"
)
def _device(case: ModelCase) -> None:
    model = case.model(steps=2)
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor):
                raise BrokenError(
                    f"{name + '.' if name else ''}{attribute} stays behind: register it by register_buffer"
                )
    if torch.cuda.is_available():
        model.cuda()
        batch = dataclasses.replace(case, data=case.data.to("cuda")).batch()
        for player in model.players():
            model.loss(batch, player.name)
        if case.draw(model, 2).device.type != "cuda":
            raise BrokenError("sample(2) of a model on a GPU is not there")


@clause(
    MODEL,
    "verbs",
    "each of `likelihoods` is finite nats (N,) of x (N, *shape); encode(x) is (N, D), decode and reconstruct are as x",
)
def _verbs(case: ModelCase) -> None:
    model: Any = case.model(steps=2)
    x = case.batch(4).x
    given = case.labels(model, 4)
    with torch.no_grad():
        for verb in model.likelihoods:
            value = getattr(model, verb)(x, **given)
            if value.shape != (4,) or not value.isfinite().all():
                raise BrokenError(f"{verb} of 4 examples is {tuple(value.shape)}: {value.flatten().tolist()[:8]}")
        if isinstance(model, models.Reconstructs) and (again := model.reconstruct(x, **given)).shape != x.shape:
            raise BrokenError(f"reconstruct of x {tuple(x.shape)} is {tuple(again.shape)}")
        if isinstance(model, models.Encodes):
            z = model.encode(x, **given)
            if not isinstance(z, Tensor) or z.dim() != 2 or len(z) != 4:
                raise BrokenError(f"encode of 4 examples is {tuple(z.shape) if isinstance(z, Tensor) else type(z)}")
            if isinstance(model, models.Decodes) and (again := model.decode(z, **given)).shape != x.shape:
                raise BrokenError(f"decode of encode(x), x {tuple(x.shape)}, is {tuple(again.shape)}")
        if isinstance(model, models.DrawsLatents):
            a, b = model.latents(4), model.latents(4)
            if (between := model.interpolate_latents(a, b, 3, **given)).shape != (3, *x.shape):
                raise BrokenError(f"interpolate_latents of 4 pairs in 3 steps is {tuple(between.shape)}")


@clause(
    MODEL, "density", "log_prob is the density of the samples: of few dimensions, it integrates to 1 where they are"
)
def _density(case: ModelCase) -> None:
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
        raise BrokenError(
            f"the density of {len(points)} samples is {mean:.3g} ± {error:.2g} times exp(log_prob): a constant, a "
            "log-determinant or a sign may be missing"
        )


@dataclass(frozen=True)
class DataCase:
    """A data set plugin, as a user would ask for it."""

    make: Callable[[Source], Dataset]
    argument: str | None
    root: str | Path | None

    @property
    def name(self) -> str:
        for plugin in plugins.discover("datasets"):
            with contextlib.suppress(GenfuseError):
                if plugin.load() is self.make:
                    return plugins.typed(plugin)
        raise BrokenError(
            f"{self.make.__module__}:{self.make.__qualname__} is not installed as an entry point of the group "
            '"genfuse.datasets"'
        )

    def load(self, seed: int = 0) -> Dataset:
        name = self.name if self.argument is None else f"{self.name}:{self.argument}"
        return load_data(name, root=self.root, seed=seed)


@clause(
    DATASET, "whole", 'it is installed under "genfuse.datasets", and returns a whole Dataset, which is read by its name'
)
def _whole(case: DataCase) -> None:
    case.load()


@clause(DATASET, "seed", "the same seed gives the same data, in every split")
def _seed(case: DataCase) -> None:
    first, again = case.load(), case.load()
    for part, split in first.splits.items():
        if not torch.equal(split.x, again.splits[part].x):
            raise BrokenError(f"the {part} split differs from one time to the other: draw with the source's seed")


@clause(DATASET, "global-generator", "loading leaves torch's global generator alone")
def _global_generator(case: DataCase) -> None:
    before = torch.random.get_rng_state()
    case.load()
    if not torch.equal(before, torch.random.get_rng_state()):
        raise BrokenError("it drew from it: use torch.Generator().manual_seed(source.seed)")


@clause(DATASET, "held-out", "what is held out is held out: most test examples are not in the training split")
def _held_out(case: DataCase) -> None:
    data = case.load()
    train, test = ({row.numpy().tobytes() for row in data.splits[part].x.cpu()} for part in ("train", "test"))
    if len(test & train) > 0.5 * len(test):
        raise BrokenError(f"{len(test & train)} of {len(test)} different test examples are training examples too")


@clause(DATASET, "argument", "an argument that it does not understand is a DataError")
def _argument(case: DataCase) -> None:
    odd = "no such thing, surely"
    try:
        load_data(f"{case.name}:{odd}", root=case.root)
    except DataError:
        return
    raise BrokenError(f"{case.name}:{odd!s} was loaded: call source.no_argument() where there is nothing to give")


@clause(DATASET, "factors", "factors, if there are any, vary among the training examples")
def _factors(case: DataCase) -> None:
    data = case.load()
    seen = data.splits["train"].factors
    if still := [name for i, name in enumerate(data.factors or ()) if len(seen[:, i].unique()) < 2]:  # type: ignore[index]
        raise BrokenError(f"{', '.join(still)} has one value in all training examples, so that no code can tell of it")


@clause(DATASET, "trains", "a model trains on it: two steps of a VAE have finite losses")
def _trains(case: DataCase) -> None:
    data = case.load()
    model = models.create(
        "vae", data, decoder="gaussian" if data.levels is None else "bernoulli", hidden=(16,), latent_dim=2
    )
    Trainer(steps=2, batch_size=16, device="cpu").fit(model, shortened(data))
