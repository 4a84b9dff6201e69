"""Run folders: what a training leaves on disk. `Run` reads one, `Recorder` writes one.

``config.json`` says what was trained on what and how, ``model.safetensors`` holds the weights, ``metrics.jsonl`` one
JSON object a line, and ``state.safetensors`` all that resuming needs. The last is one file on purpose: replacing it is
the commit, so a kill between two files cannot mix two steps.
"""

import dataclasses
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from genfuse import __version__, plugins
from genfuse._files import replacing, sync_folder
from genfuse.errors import RunError, SettingsError
from genfuse.models import GenerativeModel, configure, create

if TYPE_CHECKING:
    from genfuse.data import Dataset, Scaling
    from genfuse.training.trainer import Trainer

VERSION = 1
CONFIG, WEIGHTS, STATE, METRICS = "config.json", "model.safetensors", "state.safetensors", "metrics.jsonl"
PICTURES, TENSORBOARD, PROGRESS = "pictures", "tensorboard", "progress"

# What a resumed run may have otherwise than the run that it continues: none of these has a say in the weights.
FREE = {"epochs", "steps", "device", "devices", "checkpoint_every", "log_every", "pictures"}


class Run:
    """An existing run folder.

    Raises RunError where ``path`` is not a run folder, is half there, or is of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = _read_config(self.path)
        if not (self.path / WEIGHTS).is_file():
            raise RunError(f"the run folder {self.path} is half there: it has {CONFIG}, but no {WEIGHTS}")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def scaling(self) -> "Scaling | None":
        """For a table: the means and standard deviations that it was standardized by. Else None."""
        from genfuse.data import Scaling

        scaling = self.config["data"]["scaling"]
        return scaling and Scaling(**scaling)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of labels 0, 1, ..., where the data has them. Else None."""
        names = self.config["data"].get("class_names")
        return names and tuple(names)

    def model(self, device: str | torch.device = "cpu") -> GenerativeModel:
        """The trained model in evaluation mode, in float32. Raises PluginError where its plugin is not installed."""
        with torch.random.fork_rng(devices=[]):  # the first weights are drawn only to be replaced
            model = create(self.config["model"]["name"], **self.config["model"]["settings"])
        weights, _ = read_tensors(self.path / WEIGHTS)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise RunError(f"{self.path / WEIGHTS} does not fit the model that {CONFIG} names: {error}") from None
        return model.to(device).eval()

    def data(self, root: str | Path | None = None) -> "Dataset":
        """The data set that the run was trained on. Raises DataError if it is not found, RunError if it has changed."""
        from genfuse.data import load_data

        was = self.config["data"]
        data = load_data(was["name"], root=root, binarize=was["binarize"], seed=was["seed"], **was.get("options", {}))
        if data.fingerprint() != was["fingerprint"]:
            raise RunError(
                f"the data set {was['name']!r} is not what the run {self.path} was trained on: "
                f"its fingerprint was {was['fingerprint']} and is now {data.fingerprint()}"
            )
        return data

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in order. A killed run may have left half a line at the end: it is left out."""
        path = self.path / METRICS
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        entries = []
        for number, line in enumerate(lines[:-1], 1):  # what follows the last line break is not a whole line
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise RunError(f"{path}, line {number}: not JSON: {error}") from None
        return entries

    def progress(self) -> dict[int, Tensor]:
        """Samples (N, *shape) from the same noise at moments of the training, by the number of steps before them."""
        files = {int(file.stem): file for file in (self.path / PROGRESS).glob("*.npy")}
        return {step: torch.from_numpy(np.load(files[step])) for step in sorted(files)}

    def trainer(self, **changes: Any) -> "Trainer":
        """The trainer that continues this run, with some options changed: ``run.trainer(epochs=40)``."""
        from genfuse.training.trainer import Trainer

        return Trainer(**{**self.config["training"], "out": self.path, "resume": True, **changes})


def describe(model: GenerativeModel, data: "Dataset", training: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json. Raises SettingsError where `Run.model` could not rebuild the model from it."""
    name = model.plugin or plugin_of(type(model))
    settings = dataclasses.asdict(model.config)
    try:
        plain = json.loads(json.dumps(settings))
        same = configure(type(model), plain) == model.config
    except TypeError:
        same = False
    if not same:
        raise SettingsError(
            f"the settings of {type(model).__name__} do not survive being written as JSON, so the run could not be "
            f"loaded again; make them of numbers, strings, booleans, None and flat tuples of these: {settings}"
        )
    return {
        "version": VERSION,
        "genfuse": __version__,
        "model": {"name": name, "settings": plain},
        "data": {
            "name": data.name,
            "binarize": data.binarize,
            "seed": data.seed,
            "fingerprint": data.fingerprint(),
            "shape": list(data.shape),
            "scaling": data.scaling and dataclasses.asdict(data.scaling),
            "options": data.options,
            "class_names": data.class_names,
        },
        "training": training,
    }


def plugin_of(cls: type) -> str:
    """The name under which a class is registered. Its module is loaded already, so nothing is imported to find out."""
    for plugin in plugins.discover("models"):
        module, _, attribute = plugin.target.partition(":")
        if getattr(sys.modules.get(module), attribute, None) is cls:
            return plugins.typed(plugin)
    raise SettingsError(
        f"{cls.__module__}:{cls.__qualname__} is not registered as a model, so its run folder could not be loaded "
        'again: declare it under the entry point group "genfuse.models" in a package, or train without `out`'
    )


def claim(path: Path, resume: bool, overwrite: bool) -> None:
    """Raise RunError unless a training may write to ``path``. Nothing is written."""
    if resume:
        if not path.exists():
            raise RunError(f"there is no run folder {path} to resume")
        _read_config(path)
        if not (path / STATE).is_file():
            raise RunError(f"the run folder {path} cannot be resumed: it has no {STATE}")
    elif path.is_dir() and any(path.iterdir()):
        try:
            _read_config(path)
        except RunError as error:
            raise RunError(f"{path} is taken, and by something that will not be overwritten: {error}") from None
        if not overwrite:
            raise RunError(
                f"the run folder {path} exists: choose another one, or ask for --resume or --overwrite "
                "(in Python: resume=True, overwrite=True)"
            )
    elif path.exists() and not path.is_dir():
        raise RunError(f"{path} exists and is not a folder")


def check_same(path: Path, config: dict[str, Any]) -> None:
    """Raise RunError, naming every difference, unless ``config`` continues the run in ``path``."""
    from genfuse.training.trainer import Trainer

    was = _read_config(path)
    defaults = dataclasses.asdict(Trainer())  # of options that are younger than the run
    free = FREE if config["training"]["schedule"] == "constant" else FREE - {"epochs", "steps"}
    sections = {
        "model": lambda c: {"name": c["model"]["name"], **c["model"]["settings"]},
        "data": lambda c: {key: c["data"][key] for key in ("shape", "binarize", "fingerprint")},
        "training": lambda c: {k: v for k, v in {**defaults, **c["training"]}.items() if k not in free},
    }
    differences = []
    for section, settings_of in sections.items():
        old, new = settings_of(was), settings_of(config)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                differences.append(f"{section} {key}: was {old.get(key)!r}, now {new.get(key)!r}")
    if differences:
        raise RunError(f"the run {path} cannot be resumed with other settings: {'; '.join(differences)}")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, on the CPU, and what `write_tensors` was told about them."""
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["genfuse"])
            return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise RunError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON-able facts. The facts are one entry, as safetensors writes several in any order."""
    from safetensors.torch import save

    with replacing(path) as beside:
        beside.write_bytes(save(tensors, {"genfuse": json.dumps(facts)}))


@dataclass(frozen=True)
class Checkpoint:
    """What a training needs to go on from a step: the weights, other tensors (optimizers, generators), plain facts.

    ``best`` holds the weights that the run is to be left with, where these are not the last; else nothing.
    """

    weights: dict[str, Tensor]
    others: dict[str, Tensor]
    facts: dict[str, Any]
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def write(self, path: Path) -> None:
        # Copies, since safetensors refuses tensors that share memory, as tied weights do.
        weights, others, best = (
            {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
            for tensors in (self.weights, self.others, self.best)
        )
        prefixed = {f"{kind}.{key}": t for kind, of in (("model", weights), ("best", best)) for key, t in of.items()}
        write_tensors(path / STATE, {**prefixed, **others}, self.facts)
        write_tensors(path / WEIGHTS, best or weights, {"step": (self.facts["best"] if best else self.facts)["step"]})

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        tensors, facts = read_tensors(path / STATE)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "": {}}
        for name, tensor in tensors.items():
            kind, _, key = name.partition(".")
            part, key = (kind, key) if kind in parts else ("", name)
            parts[part][key] = tensor
        return cls(parts["model"], parts[""], facts, parts["best"])


def write_config(path: Path, config: dict[str, Any]) -> None:
    with replacing(path / CONFIG) as beside:
        beside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Recorder:
    """The writing side of a run folder."""

    def __init__(self, path: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = path
        self._metrics = open(path / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self._tensorboard = SummaryWriter(str(path / TENSORBOARD), purge_step=step + 1)

    @classmethod
    def begin(cls, path: Path, config: dict[str, Any], checkpoint: Checkpoint) -> "Recorder":
        """Make a new run folder with its first checkpoint. It appears whole; what was there before goes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.new")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        write_config(beside, config)
        checkpoint.write(beside)
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
        sync_folder(path.parent)
        return cls(path, checkpoint.facts["step"])

    @classmethod
    def continued(cls, path: Path, config: dict[str, Any], checkpoint: Checkpoint) -> "Recorder":
        """Continue a run from its checkpoint: what it logged after that step is forgotten."""
        step = checkpoint.facts["step"]
        checkpoint.write(path)  # a kill may have left the weights of the one before beside its state
        entries = [entry for entry in Run(path).metrics() if entry["step"] <= step]
        with replacing(path / METRICS) as beside:
            beside.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        write_config(path, config)
        return cls(path, step)

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and its numbers to TensorBoard."""
        self._metrics.write(json.dumps(entry) + "\n")
        self._metrics.flush()
        prefix = "/".join(entry[key] for key in ("split", "player") if key in entry)
        for key, value in entry.items():
            if key not in ("step", "epoch", "split", "player"):
                add = self._tensorboard.add_text if isinstance(value, str) else self._tensorboard.add_scalar
                add(f"{prefix}/{key}", value, entry["step"])

    def keep(self, step: int, samples: Tensor) -> None:
        """Write what the model drew after ``step`` steps; `Run.progress` reads it."""
        (self.path / PROGRESS).mkdir(exist_ok=True)
        with replacing(self.path / PROGRESS / f"{step:08}.npy") as beside, open(beside, "wb") as file:
            np.save(file, samples.float().cpu().numpy())

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, once all that was logged up to its step is safe."""
        os.fsync(self._metrics.fileno())
        self._tensorboard.flush()
        checkpoint.write(self.path)

    def close(self) -> None:
        self._metrics.close()
        self._tensorboard.close()


def _read_config(path: Path) -> dict[str, Any]:
    """config.json of a run folder. Raises RunError where there is none, or it is not ours."""
    file = path / CONFIG
    if not path.exists():
        raise RunError(f"there is no run folder {path}")
    if not file.is_file():
        raise RunError(f"{path} is not a run folder, or half of one: it has no {CONFIG}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        version = config["version"]
        if version == VERSION:
            _ = [config[key] for key in ("genfuse", "model", "data", "training")]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is not the {CONFIG} of a run: {type(error).__name__}: {error}") from None
    if version != VERSION:
        raise RunError(f"the run folder {path} is of version {version!r}; this genfuse {__version__} reads {VERSION}")
    return config
