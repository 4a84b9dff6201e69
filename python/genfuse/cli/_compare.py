"""``genfuse compare``: models that it trains, or runs that exist."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from genfuse._files import plain
from genfuse.cli._arguments import READ_AS_USUAL, DataOptions, find_device
from genfuse.cli._yaml import read_yaml
from genfuse.errors import SettingsError

BUDGET, SEEDS = "5m", 3


def compare(
    models: Positional[Annotated[tuple[str, ...], arg(metavar="MODEL|RUN ...", help_behavior_hint="")]],
    *,
    data: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    budget: Annotated[str | None, arg(metavar="TIME|Nexamples", help_behavior_hint=f"(default: {BUDGET})")] = None,
    seeds: Annotated[int | None, arg(metavar="N", help_behavior_hint=f"(default: {SEEDS})")] = None,
    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/compare"),
    set: Annotated[tuple[str, ...], arg(metavar="MODEL.SETTING=VALUE ...", help_behavior_hint="")] = (),
    batch_size: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 128)")] = None,
    schedule: Annotated[
        Literal["constant", "cosine"] | None, arg(metavar="constant|cosine", help_behavior_hint="(default: constant)")
    ] = None,
    features: Annotated[str, arg(metavar="NAME")] = "auto",
    n: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all, 10000 at most)")] = None,
    limit: Annotated[int, arg(metavar="N")] = 500,
    inception_weights: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    data_root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: $GENFUSE_DATA)")] = None,
    data_options: Annotated[DataOptions, arg(name="data")] = READ_AS_USUAL,
    device: str = "auto",
) -> int:
    """Train several models equally long on the same data, measure them alike, and put them into one table.

    DIR then holds report.html, a page that needs nothing but itself, with samples, loss curves and the table;
    table.md; comparison.json; and a run folder for each model and seed. Given again, the command goes on where it was,
    and can name more models or seeds. A model that fails is a row that says why.

    Where runs are named in place of models, nothing is trained: each is a row. They must be of the same data.

    example:
      genfuse compare vae gan wgan-gp realnvp --data digits --budget 30s --seeds 3 --out runs/compare

    Args:
        models: models, of `genfuse list models`, plugins too, or LABEL=MODEL, to have one in the table twice; or runs
        data: data set, of `genfuse list datasets`
        budget: of each training: time of its updates, as 90s, 5m or 1h, or examples, as 200000examples
        seeds: trainings of each model, with the seeds 0, 1, ...
        out: folder to make, or to go on with
        set: settings of models, as gan.penalty=r1 or "vae.hidden=[512, 512]"; of a LABEL, LABEL.SETTING=VALUE
        batch_size: examples per step
        schedule: learning rate over the steps, as of `genfuse train`
        features: what samples are compared by, as of `genfuse evaluate`
        n: samples to draw, and real examples to compare them with
        limit: test examples that are encoded, decoded and asked for their likelihood
        inception_weights: for --features inception: a TorchScript file
        data_root: folder with the data sets that are read from files
        device: auto, cpu, cuda, mps, or one of several: cuda:1
    """
    if not models:
        raise SettingsError("compare what? genfuse compare MODEL ... --data NAME, or genfuse compare RUN ...")
    if limit < 1:
        raise SettingsError(f"--limit must be at least 1; got {limit}")
    runs = [Path(each) for each in models if (Path(each) / "config.json").is_file()]
    if runs and len(runs) < len(models):
        others = ", ".join(each for each in models if Path(each) not in runs)
        raise SettingsError(f"{runs[0]} is a run and {others} is not: compare models or runs, not both")
    from genfuse.comparison import compare, compare_runs, show
    from genfuse.data import load_data
    from genfuse.training import Trainer

    where = str(find_device(device))
    usual = asdict(READ_AS_USUAL)
    reading = {key: value for key, value in asdict(data_options).items() if value != usual[key]}
    measuring: dict[str, Any] = {
        "out": out,
        "features": features,
        "n": n,
        "limit": limit,
        "inception_weights": inception_weights,
        "say": lambda line: print(plain(line), file=sys.stderr, flush=True),
    }
    if runs:
        of_training = {
            "--data": data, "--budget": budget, "--seeds": seeds, "--set": set or None, "--batch-size": batch_size,
            "--schedule": schedule, **{f"--data.{key}": value for key, value in reading.items()},
        }  # fmt: skip
        if given := [option for option, value in of_training.items() if value is not None]:
            raise SettingsError(f"{runs[0]} is a run, which is trained already: leave out {', '.join(given)}")
        result = compare_runs(runs, data_root=data_root, device=where, **measuring)
    elif data is None:
        raise SettingsError("which data? genfuse compare MODEL ... --data NAME; `genfuse list datasets` shows them")
    else:
        trainer = Trainer(
            batch_size=128 if batch_size is None else batch_size, schedule=schedule or "constant", device=where
        )
        settings = _settings(set)
        loaded = load_data(data, root=data_root, **asdict(data_options))
        try:
            result = compare(
                models,
                loaded,
                budget=BUDGET if budget is None else budget,
                seeds=SEEDS if seeds is None else seeds,
                settings=settings,
                trainer=trainer,
                **measuring,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"; the same command goes on with what is in {out}") from None
    show(result)
    for file in ("report.html", "table.md", "comparison.json"):
        print(plain(f"written: {out / file}"))
    return 0


def _settings(assignments: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """{label: {setting: value}}; values are read as YAML has them."""
    settings: dict[str, dict[str, Any]] = {}
    for each in assignments:
        where, equals, value = each.partition("=")
        label, dot, name = where.rpartition(".")
        try:
            parsed = read_yaml(value)
        except ValueError as error:
            raise SettingsError(f"--set {each}: the value is not YAML: {error}") from None
        if not (equals and dot and label and name):
            raise SettingsError(f"--set takes MODEL.SETTING=VALUE, as gan.penalty=r1; got {each!r}")
        settings.setdefault(label, {})[name.replace("-", "_")] = parsed
    return settings
