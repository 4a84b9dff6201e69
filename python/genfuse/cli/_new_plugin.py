"""Write a package with a model, from the one in the folder `template`, whose name is my-model."""

import importlib.util
import keyword
import re
import shutil
from pathlib import Path

from genfuse import plugins
from genfuse._files import occupied, writing
from genfuse.errors import RunError, SettingsError

TEMPLATE = Path(__file__).parent / "template"


def write(name: str, out: Path) -> list[Path]:
    """Write the package ``name`` into the folder ``out``; returns its files.

    Raises SettingsError for a name that no package can have, or that a model or a module has already, and RunError
    where ``out`` holds something.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise SettingsError(
            f"a plugin's name is of lower-case letters, digits and single -, with a letter first; got {name!r}"
        )
    if taken := [str(plugin) for plugin in plugins.discover("models") if plugin.name == name]:
        raise SettingsError(f"the name {name!r} is taken, by the {' and the '.join(taken)}: choose another one")
    module = name.replace("-", "_")
    if _is_module(module):
        raise SettingsError(f"a package {name!r} would hide the module {module!r} that is there: choose another name")
    if occupied(out):
        raise RunError(f"{out} exists: name another folder by --out")
    names = {"my-model": name, "my_model": module, "MyModel": "".join(map(str.capitalize, name.split("-")))}
    written: list[Path] = []
    made = not out.exists()
    try:
        for source in sorted(path for path in TEMPLATE.rglob("*") if path.is_file() and path.suffix != ".pyc"):
            file = out / _renamed(str(source.relative_to(TEMPLATE)), names)
            file.parent.mkdir(parents=True, exist_ok=True)
            with writing(file) as content:
                content.write(_renamed(source.read_text(encoding="utf-8"), names).encode("utf-8"))
            written.append(file)
    except BaseException:  # half a package is in the way of a whole one
        for part in [out] if made else [*out.iterdir()]:
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        raise
    return written


def _renamed(text: str, names: dict[str, str]) -> str:
    return re.sub("|".join(names), lambda found: names[found.group()], text)


def _is_module(name: str) -> bool:
    return keyword.iskeyword(name) or importlib.util.find_spec(name) is not None
