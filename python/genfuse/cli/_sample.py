"""``genfuse sample``."""

import inspect
import math
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from genfuse._files import plain
from genfuse.cli._arguments import find_device, refuse_existing
from genfuse.errors import SettingsError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

    from genfuse.data import Schema
    from genfuse.models import GenerativeModel
    from genfuse.training import Run


def sample(
    run: Annotated[Path, arg(metavar="RUN")],
    /,
    *,
    out: Annotated[Path, arg(metavar="FILE")],
    n: int = 64,
    label: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: drawn for each example)")] = None,
    where: Annotated[str | None, arg(metavar="A=1,B>2", help_behavior_hint="")] = None,
    condition: Annotated[str | None, arg(metavar="A=1,B=2", help_behavior_hint="(default: test examples')")] = None,
    temperature: Annotated[float | None, arg(metavar="T", help_behavior_hint="(default: the model's)")] = None,
    sampler: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the model's)")] = None,
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the model's)")] = None,
    guidance: Annotated[float | None, arg(metavar="W", help_behavior_hint="(default: the model's)")] = None,
    seed: int = 0,
    data: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: where it was)")] = None,
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """Draw from the model of a run: a picture, or the numbers.

    A .png is a grid of images, clips with their frames in a row each, or points in 2 dimensions beside those of the
    data; of a run with --data.task, what is made of images of the test split, beside these. A .gif or .mp4 is clips. A
    .csv is the rows of a table, under the names of its columns: integers whole, categories as words, and what is
    missing empty. A .npy is the array (n, *shape); a .npz has it as `x`, the `names` of a table's columns, and what was
    given as `y`. Tables are in their original units; discrete data, such as images, is in [0, 1].

    example:
      genfuse sample runs/vae --n 64 --out grid.png
      genfuse sample runs/customers --n 1000 --where "churned=1,age>40" --out rows.csv

    Args:
        run: run folder
        out: file to write: .png, .csv, .npy or .npz; of clips .gif or .mp4, too
        n: number of examples
        label: conditional models: the label of all examples, a class's name or number
        where: tables: what rows must be, by =, !=, <, <=, > or >=; what the model is given is given, of the rest rows
            that are otherwise are drawn anew, up to 200,000 times
        condition: models of p(x | columns): a value of each of these columns, in their units, for all examples
        temperature: models that take one, such as flows: above 0; below 1 for samples nearer to the modes
        sampler: diffusion models: ancestral, ddim, heun, heun-stochastic, langevin or dpm-solver++
        steps: diffusion models: steps of the sampler
        guidance: conditional diffusion models: above 1 for samples more typical of their label
        seed: of the draws
        data: for points beside those of the data: the data set of the run, if it has moved, as csv:NEW/PATH
        device: auto, cpu, cuda, mps, or one of several: cuda:1
        overwrite: replace an existing file
    """
    if out.suffix not in (".png", ".csv", ".npy", ".npz", ".gif", ".mp4"):
        raise SettingsError(
            f"--out must end in .png, .npy or .npz; got {out}; of tables in .csv, too; of clips .gif, .mp4"
        )
    if n < 1:
        raise SettingsError(f"--n must be at least 1; got {n}")
    if temperature is not None and not 0 < temperature < math.inf:
        raise SettingsError(f"--temperature must be above 0 and finite; got {temperature}")
    refuse_existing(out, overwrite)

    import numpy as np
    import torch

    from genfuse import plots
    from genfuse._files import writing
    from genfuse.data import joined, names_in
    from genfuse.models import sample_in_parts
    from genfuse.nn import Columns
    from genfuse.training import Run
    from genfuse.training.gallery import restorations
    from genfuse.training.process import seed_of

    trained = Run(run)
    shape = tuple(trained.config["data"]["shape"])
    if out.suffix in (".gif", ".mp4") and len(shape) != 4:
        raise SettingsError(f"a {out.suffix} shows clips (T, C, H, W), but {run} has examples of shape {shape}")
    if out.suffix == ".png" and len(shape) not in (3, 4) and shape != (2,):
        raise SettingsError(
            f"a .png shows images or points in 2 dimensions, but {run} has examples of shape {shape}: "
            f"use --out {out.with_suffix('.npy')} or .npz"
        )
    if len(shape) != 1 and (out.suffix == ".csv" or where is not None):
        raise SettingsError(f"--where and a .csv are for tables, but {run} has examples of shape {shape}")
    rules = _rules(trained, where)
    model = trained.model(find_device(device))
    generator = torch.Generator(model.device).manual_seed(seed)
    given_options = {"temperature": temperature, "sampler": sampler, "steps": steps, "guidance": guidance}
    options = {name: value for name, value in given_options.items() if value is not None}
    for name in options:
        if name not in inspect.signature(model.sample).parameters:
            raise SettingsError(f"--{name}: the model of {run}, a {type(model).__name__}, takes none: leave it out")
    # Labels are of a generator of their own, so that the noise does not depend on how many there are.
    numbers = torch.Generator(model.device).manual_seed(seed_of(seed, 1))
    restored = None
    if trained.config["data"].get("options", {}).get("task"):
        if label is not None or condition is not None:
            raise SettingsError(f"--label, --condition: the model of {run} is given images alone: leave them out")
        test = trained.data(name=data)
        chosen = torch.randint(len(test.splits["test"]), (n,), generator=numbers, device=model.device)
        restored = test.batch("test", chosen.cpu())
        y: torch.Tensor | None = restored.y.to(model.device)  # type: ignore[union-attr]
    elif given_columns := names_in(trained.config["data"].get("options", {}).get("condition", "")):
        said = [rule for rule in rules if rule[0] in given_columns]
        if any(sign != "=" for _, sign, _ in said):
            raise SettingsError(f"--where: {', '.join(given_columns)} are given to the model, by =: got {where}")
        rules = [rule for rule in rules if rule not in said]
        if said and condition is None:
            condition = joined([f"{name}={value}" for name, _, value in said])
        if label is not None:
            raise SettingsError(f"--label: the model of {run} is given columns, no labels: use --condition")
        y = _contexts(trained, n, condition, data, numbers).to(model.device)
    elif condition is not None:
        raise SettingsError(f"--condition: the model of {run} was trained without --data.condition: leave it out")
    else:
        y = _labels(trained, model, n, label, numbers)
    if rules:
        x, y = _rejected(trained, model, n, y, generator, options, rules, where or "")
    else:
        x = torch.cat([part.cpu() for part in sample_in_parts(model, n, y, generator, **options)])
    out.parent.mkdir(parents=True, exist_ok=True)
    scaling = trained.scaling
    if out.suffix == ".png" and restored is not None and restored.y is not None:
        restorations(restored.y, x, restored.x, out)
    elif out.suffix in (".gif", ".mp4"):
        plots.animation(x, out)
    elif out.suffix == ".png" and len(shape) in (3, 4):
        plots.sample_grid(x, out)
    elif out.suffix == ".png":
        shown = trained.data(name=data).batch("test", slice(None))
        alike = None
        if shown.y is not None and y is not None and label is not None:
            alike = shown.y == y[0].cpu()
        elif shown.y is not None and y is not None and condition is not None:  # the tenth that is nearest
            off = (shown.y - y[0].cpu()).norm(dim=1)
            alike = off <= off.quantile(0.1)
        points = shown.x if alike is None or not alike.any() else shown.x[alike]
        plots.scatter(points[:: max(1, len(points) // n)], x, out, scaling)
    elif out.suffix == ".csv":
        frame, named = _rows(trained, x, y)
        with writing(out) as file:
            file.write(frame.to_csv(index=False, header=named).encode())
    else:
        array = (x if scaling is None else scaling.restore(x)).numpy()
        more: dict[str, Any] = {"names": np.array(scaling.names)} if scaling is not None and scaling.names else {}
        if y is not None:
            given = trained.condition_scaling
            if trained.condition_schema is not None:
                y = Columns(trained.condition_schema.specs()).decode(y.cpu())
            more["y"] = y.cpu().numpy() if given is None else given.restore(y.cpu()).numpy()
            if given is not None and given.names:
                more["y_names"] = np.array(given.names)
            if trained.class_names:
                more["class_names"] = np.array(trained.class_names)
        with writing(out) as file:
            if out.suffix == ".npy":
                np.save(file, array)
            else:
                np.savez(file, x=array, **more)
    print(plain(out))
    return 0


TRIES = 200_000  # rows that are drawn in search of those that --where asks for


def _rules(run: "Run", where: str | None) -> list[tuple[str, str, str]]:
    """Column, sign and value of each part of --where. Raises SettingsError for what is none of the table's."""
    from genfuse.data import names_in

    rules = []
    for each in names_in(where or ""):
        parts = re.fullmatch(r"(.+?)\s*(!=|<=|>=|=|<|>)\s*(.*)", each)
        if parts is None:
            raise SettingsError(f"--where must be COLUMN=VALUE, or by !=, <, <=, >, >=, joined by commas; got {each!r}")
        known = [*_names(run), *names_in(run.config["data"].get("options", {}).get("condition", ""))]
        if parts[1] not in known:
            raise SettingsError(f"--where: the table has no column {parts[1]}; it has: {', '.join(known)}")
        rules.append((parts[1], parts[2], parts[3]))
    return rules


def _names(run: "Run") -> tuple[str, ...]:
    if run.schema is not None:
        return run.schema.names
    return (run.scaling and run.scaling.names) or tuple(str(i + 1) for i in range(run.config["data"]["shape"][0]))


def _rows(run: "Run", x: "torch.Tensor", y: "torch.Tensor | None") -> "tuple[pd.DataFrame, bool]":
    """Examples as rows in original units, with what was given beside them, and whether their columns have names."""
    import pandas as pd

    from genfuse.data import Scaling, Schema, names_in
    from genfuse.nn import Columns

    def of(x: "torch.Tensor", schema: Schema | None, scaling: Scaling | None, names: Sequence[str]) -> pd.DataFrame:
        if schema is not None:
            return schema.texts(schema.decode(x))
        return pd.DataFrame((x if scaling is None else scaling.restore(x)).numpy(), columns=list(names))

    frame = of(x, run.schema, run.scaling, _names(run))
    if given := names_in(run.config["data"].get("options", {}).get("condition", "")):
        assert y is not None
        y = y.cpu() if run.condition_schema is None else Columns(run.condition_schema.specs()).decode(y.cpu())
        frame = pd.concat([frame, of(y, run.condition_schema, run.condition_scaling, given)], axis=1)
    elif y is not None:
        names = run.class_names
        frame = frame.assign(label=[names[i] if names else i for i in y.tolist()])
    headless = run.schema is None and not (run.scaling and run.scaling.names)
    return frame, not headless


def _rejected(
    run: "Run",
    model: "GenerativeModel",
    n: int,
    y: "torch.Tensor | None",
    generator: "torch.Generator",
    options: dict[str, Any],
    rules: list[tuple[str, str, str]],
    where: str,
) -> "tuple[torch.Tensor, torch.Tensor | None]":
    """The first n draws that are as the rules say, and what was given with them. Raises SettingsError for too few."""
    import torch

    from genfuse.models import sample_in_parts

    kept: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    drawn = found = 0
    while found < n and drawn < TRIES:
        given = None if y is None else y[torch.arange(drawn, drawn + 1024, device=y.device) % len(y)]
        part = torch.cat([each.cpu() for each in sample_in_parts(model, 1024, given, generator, **options)])
        frame, fits = _rows(run, part, given)[0], None
        for name, sign, value in rules:
            fit = _fits(frame[name], sign, value, run)
            fits = fit if fits is None else fits & fit
        rows = torch.from_numpy(fits)
        kept.append((part[rows], None if given is None else given.cpu()[rows]))
        drawn, found = drawn + 1024, found + int(rows.sum())
    if found < n:
        raise SettingsError(
            f"--where {where}: {found:,} of {drawn:,} rows drawn are so ({found / drawn:.2%}), and --n asks for {n:,}: "
            f"ask for fewer, or train a model that is given these columns, by --data.condition"
        )
    labels = None if y is None else torch.cat([given for _, given in kept if given is not None])[:n]
    return torch.cat([x for x, _ in kept])[:n], labels


def _fits(cells: "pd.Series", sign: str, value: str, run: "Run") -> "np.ndarray":
    """Which cells (N,) are as a rule says: numbers by size, dates by time, all else by text. What is missing fits !=
    alone. Raises SettingsError for a value that the column cannot have."""
    import numpy as np
    import pandas as pd

    compare = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt,
               ">=": operator.ge}[sign]  # fmt: skip
    gone = cells.isna().to_numpy()
    schemas = [schema for schema in (run.schema, run.condition_schema) if schema is not None]
    of_words = [column for schema in schemas for column in schema.columns if column.kind not in ("number", "integer")]
    for column in [column for column in of_words if column.name == cells.name]:
        wanted, unknown = column.parse(pd.Series([value]))
        if unknown.any() or math.isnan(wanted[0]):
            known = f"one of {', '.join(column.categories[:20])}" if column.categories else f"of the form {column.form}"
            raise SettingsError(f"--where: the column {cells.name} is a {column.kind}, {known}; got {value!r}")
        found = compare(column.parse(cells.astype(object).where(~gone, ""))[0], wanted[0])
        return np.where(gone, sign == "!=", found)
    if pd.api.types.is_numeric_dtype(cells) and not pd.api.types.is_bool_dtype(cells):
        try:
            found = compare(cells.to_numpy(float, na_value=math.nan), float(value))
        except ValueError:
            raise SettingsError(f"--where: {cells.name} is a column of numbers; got {value!r}") from None
    else:
        found = compare(cells.astype(str).str.lower().to_numpy(), value.lower())
    return np.where(gone, sign == "!=", found)


def _context_of_kinds(schema: "Schema", columns: list[str], condition: str) -> "torch.Tensor":
    """The context (1, C) of values as typed, for columns of several kinds."""
    import pandas as pd

    from genfuse.data import names_in
    from genfuse.errors import DataError
    from genfuse.nn import Columns

    typed = {name.strip(): value.strip() for name, _, value in (each.partition("=") for each in names_in(condition))}
    if typed.keys() != set(columns):
        raise SettingsError(f"--condition must be {','.join(f'{name}=VALUE' for name in columns)}; got {condition}")
    try:
        return Columns(schema.specs()).encode(schema.encode(pd.DataFrame([typed], dtype=object), "--condition"))
    except DataError as error:
        raise SettingsError(str(error)) from None


def _labels(
    run: "Run", model: "GenerativeModel", n: int, label: str | None, generator: "torch.Generator"
) -> "torch.Tensor | None":
    """The labels (n,) that a model is to be given: all the same, or drawn evenly; None if it takes none."""
    import torch

    if not model.conditional:
        if label is not None:
            raise SettingsError(
                f"--label: the model of {run.path}, a {type(model).__name__}, was trained without labels: leave it "
                "out, or sample from a conditional one"
            )
        return None
    labels = model.drawn_labels.to(model.device)
    if label is None:
        return labels[torch.randint(len(labels), (n,), generator=generator, device=model.device)]
    names = run.class_names or ()
    number = names.index(label) if label in names else int(label) if label.isdecimal() else -1
    # A number that is no name may only be meant as a label if no name is a number.
    if not 0 <= number < model.config.classes or (label not in names and any(name.isdecimal() for name in names)):
        known = ", ".join(names) if names else f"0..{model.config.classes - 1}"
        raise SettingsError(f"--label must be one of {known}; got {label}")
    if number not in labels:
        raise SettingsError(f"--label {label}: no training example of {run.path} has this label")
    return torch.full((n,), number, device=model.device)


def _contexts(
    run: "Run", n: int, condition: str | None, data: str | None, generator: "torch.Generator"
) -> "torch.Tensor":
    """The contexts (n, C) that a model is to be given: all as typed, or those of test examples drawn by chance."""
    import torch

    from genfuse.data import names_in

    if condition is None:
        y = run.data(name=data).splits["test"].y
        assert y is not None
        return y[torch.randint(len(y), (n,), generator=generator, device=generator.device).cpu()]
    columns = names_in(run.config["data"]["options"]["condition"])
    if run.condition_schema is not None:
        return _context_of_kinds(run.condition_schema, columns, condition).expand(n, -1)
    values: dict[str, float] = {}
    for each in names_in(condition):
        name, _, number = (part.strip() for part in each.rpartition("="))
        try:
            if name not in columns or name in values or not math.isfinite(value := float(number)):
                raise ValueError
        except ValueError:
            wanted = ",".join(f"{column}=NUMBER" for column in columns)
            raise SettingsError(f"--condition must be {wanted}, each once and finite; got {each!r}") from None
        values[name] = value
    if missing := [column for column in columns if column not in values]:
        raise SettingsError(f"--condition gives no value of {', '.join(missing)}: got {condition}")
    typed = [values[column] for column in columns]
    y = torch.tensor([typed])
    return (y if run.condition_scaling is None else run.condition_scaling.apply(y)).expand(n, -1)
