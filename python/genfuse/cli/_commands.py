"""All commands but ``train`` by name, and those that are about this installation. tyro makes their options and help of
signature and docstring."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from genfuse import plugins
from genfuse._files import occupied, plain, write_text
from genfuse.cli._apply import compress, decompress, encode, export, interpolate, reconstruct, score, upscale
from genfuse.cli._compare import compare
from genfuse.cli._evaluate import evaluate, train_features
from genfuse.cli._families import FAMILIES
from genfuse.cli._sample import sample
from genfuse.errors import GenfuseError, RunError, SettingsError

SLOW = 1.0  # seconds that the import of a plugin takes, beside those of torch and genfuse

Kind = Literal["models", "datasets", "metrics", "all"]


def list_(kind: Kind = "all", /) -> int:
    """Show the models, data sets and metrics that are installed, and what each is or which package it comes from.

    This reads metadata and imports no plugin; `genfuse plugins` imports them all and shows what fails.

    example:
      genfuse list models

    Args:
        kind: what to show
    """
    print(plain("\n\n".join("\n".join(plugins.table(group, FAMILIES[group])) for group in _groups(kind))))
    return 0


def plugins_(kind: Kind = "all", /) -> int:
    """Import every plugin, and show its state: whether it works, and if not, the error.

    A plugin is a model, data set or metric of any installed package, ours included. A broken one disturbs nothing but
    the command that uses it. Where a name is claimed by several packages, DISTRIBUTION:NAME is shown: type that.

    example:
      genfuse plugins models

    Args:
        kind: what to show
    """
    from genfuse.doctor import describe

    states = list(describe(*_groups(kind)))
    rows = []
    for plugin, seconds, error in states:
        state = "BROKEN" if error else "ok" if seconds < SLOW else f"ok, but its import takes {seconds:.1f} s"
        kind_of = plugins.KINDS[plugin.kind]
        rows.append((plugins.typed(plugin), kind_of, plugin.distribution, plugin.version, plugin.target, state))
    heads = ("name", "kind", "distribution", "version", "target", "state")
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row, (_, _, error) in zip((heads, *rows), [(None, 0, None), *states], strict=True):
        print(plain("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()))
        if error is not None:
            print(plain(f"    {error}"))
    broken = sum(error is not None for _, _, error in states)
    print(f"{len(states)} plugins of {len({row[2] for row in rows})} distributions, {broken} broken")
    return 0


def _groups(kind: Kind) -> tuple[str, ...]:
    return tuple(plugins.KINDS) if kind == "all" else (kind,)


def new_plugin(
    name: Annotated[str, arg(metavar="NAME")],
    /,
    *,
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: NAME)")] = None,
) -> int:
    """Write a package with a model of your own, which installs, trains and passes its test as it is.

    The model, a small variational autoencoder, is there to be changed.

    example:
      genfuse new-plugin my-model

    Args:
        name: what users will type, and the name of the package: lower-case letters, digits and -
        out: folder to make
    """
    import importlib.util
    import keyword
    import shutil

    out = Path(name) if out is None else out
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise SettingsError(
            f"a plugin's name is of lower-case letters, digits and single -, with a letter first; got {name!r}"
        )
    if taken := [str(plugin) for plugin in plugins.discover("models") if plugin.name == name]:
        raise SettingsError(f"the name {name!r} is taken, by the {' and the '.join(taken)}: choose another one")
    module = name.replace("-", "_")
    if keyword.iskeyword(module) or importlib.util.find_spec(module) is not None:
        raise SettingsError(f"a package {name!r} would hide the module {module!r} that is there: choose another name")
    if occupied(out):
        raise RunError(f"{out} exists: name another folder by --out")
    names = {"my-model": name, "my_model": module, "MyModel": "".join(map(str.capitalize, name.split("-")))}

    def renamed(text: str) -> str:
        return re.sub("|".join(names), lambda found: names[found.group()], text)

    written: list[Path] = []
    made, template = not out.exists(), Path(__file__).parent / "template"
    try:
        for source in sorted(path for path in template.rglob("*") if path.is_file() and path.suffix != ".pyc"):
            file = out / renamed(str(source.relative_to(template)))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, renamed(source.read_text(encoding="utf-8")))
            written.append(file)
    except BaseException:  # half a package is in the way of a whole one
        for part in [out] if made else [*out.iterdir()]:
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        raise
    for file in written:
        print(plain(f"written: {file}"))
    folder = shlex.quote(str(out))
    print(f"next: pip install --editable {folder}\n      genfuse train {name} --data digits\n      pytest {folder}")
    return 0


def data(
    action: Literal["describe"],
    file: Annotated[str, arg(metavar="DATA")],
    /,
    *,
    header: Annotated[Literal["auto", "yes", "no"], arg(aliases=["--data.header"])] = "auto",
    delimiter: Annotated[str, arg(aliases=["--data.delimiter"])] = ",",
    decimal: Annotated[str, arg(aliases=["--data.decimal"])] = ".",
    columns: Annotated[str, arg(metavar="A,B", aliases=["--data.columns"], help_behavior_hint="(default: all)")] = "",
    drop: Annotated[str, arg(metavar="A,B", aliases=["--data.drop"], help_behavior_hint="")] = "",
    types: Annotated[str, arg(metavar="A=KIND", aliases=["--data.types"], help_behavior_hint="")] = "",
    size: Annotated[str, arg(metavar="H,W", aliases=["--data.size"], help_behavior_hint="")] = "",
    fit: Annotated[Literal["crop", "pad", "stretch"], arg(aliases=["--data.fit"])] = "crop",
    mode: Annotated[Literal["", "auto", "L", "RGB"], arg(aliases=["--data.mode"])] = "",
    damaged: Annotated[Literal["refuse", "skip"], arg(aliases=["--data.damaged"])] = "refuse",
    data_root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: $GENFUSE_DATA)")] = None,
) -> int:
    """Show what data is taken for: of a table its columns, as numbers, integers, categories, booleans, dates or left
    out; of a folder of pictures their sizes and modes, and those that are damaged; of all else its shape and values.

    `genfuse train` takes the same options as --data.types and so on, to have it otherwise; so does this command.

    example:
      genfuse data describe customers.csv --types zip=category

    Args:
        action: what to do
        file: file, folder, or what --data of the other commands takes: images:FOLDER, digits, toy:moons
        header: yes: the first row is the names of the columns; no: it is an example; auto: if no cell is a number
        delimiter: what stands between cells, such as ; or tab
        decimal: the mark before decimals: . or ,
        columns: columns to read
        drop: columns to leave out
        types: kinds of columns, in place of what is seen: number, integer, category, boolean, date or date:%d/%m/%Y
        size: a side in pixels that all pictures are made to have, or a height and a width
        fit: how: crop, pad or stretch
        mode: what pictures are made to be: L (grey), RGB, or auto: grey if all are
        damaged: skip: leave out pictures that cannot be read
        data_root: folder of the data sets that are read from files
    """
    from genfuse.cli._arguments import load_told, show_columns, show_data, show_pictures
    from genfuse.data import kind_of

    known = {word for each in plugins.discover("datasets") for word in (each.name, each.distribution)}
    name, path = file, Path(file).expanduser()
    if name.partition(":")[0] not in known and name and (path.exists() or path.suffix or len(path.parts) > 1):
        name = f"{kind_of(path)}:{name}"
    head, _, place = name.partition(":")
    folder = Path(place).expanduser() if head == "images" and place else None
    said, needs = show_pictures(folder) if folder is not None and folder.is_dir() else ([], {})
    try:
        options = {"header": header, "delimiter": delimiter, "decimal": decimal, "columns": columns, "drop": drop,
                   "types": types, "size": size, "fit": fit, "mode": mode, "damaged": damaged}  # fmt: skip
        found = load_told(name, said, root=data_root, **options)
    except GenfuseError as error:
        if not said:
            raise
        given = {"size": size, "mode": mode, "damaged": damaged.removeprefix("refuse")}
        lacking = [f"--data.{key} {value}" for key, value in needs.items() if value and not given[key]]
        print(plain(f"to train on them: {' '.join(lacking) or error}"))
        return 0
    if found.scaling is None:
        show_data(found)
    else:
        print(plain(f"{name}: " + ", ".join(f"{part} {len(of):,}" for part, of in found.splits.items()) + " rows"))
        show_columns(found.described())
    return 0


def doctor(
    *, data_root: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: $GENFUSE_DATA)")] = None
) -> int:
    """Show versions, hardware, which implementation each operator got and why, and how many plugins there are.

    Look here where something is slower than it should be, or a model does not appear. This imports every plugin, and
    shows the errors of those that are broken.

    example:
      genfuse doctor

    Args:
        data_root: folder of the data sets that are read from files
    """
    from genfuse.doctor import report

    for line in report(data_root):
        print(plain(line))
    return 0


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], arg(metavar="SHELL")], /) -> int:
    """Print what makes a shell complete commands, models, data sets and options; plugins of now are among them.

    Put it where the shell reads it: for bash and zsh ~/.bashrc or ~/.zshrc, for fish
    ~/.config/fish/completions/genfuse.fish.

    example:
      genfuse completion bash >> ~/.bashrc

    Args:
        shell: bash, zsh or fish
    """
    from genfuse.cli._completion import script

    print(script(shell, COMMANDS))
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "list": list_,
    "plugins": plugins_,
    "new-plugin": new_plugin,
    "sample": sample,
    "evaluate": evaluate,
    "score": score,
    "encode": encode,
    "reconstruct": reconstruct,
    "interpolate": interpolate,
    "upscale": upscale,
    "compress": compress,
    "decompress": decompress,
    "export": export,
    "train-features": train_features,
    "compare": compare,
    "data": data,
    "doctor": doctor,
    "completion": completion,
}
