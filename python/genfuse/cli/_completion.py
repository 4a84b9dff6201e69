"""``genfuse completion``: what a shell completes."""

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from genfuse import plugins
from genfuse.errors import PluginError

BASH = """\
_genfuse() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" found=""
  case "$COMP_CWORD $prev" in
    *" --data") found="{data}" ;;
    "1 "*) found="{commands}" ;;
    "2 train"|"2 compare") found="{models}" ;;
    *) case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}} $cur" in
{cases}
      esac ;;
  esac
  COMPREPLY=($(compgen -W "$found" -- "$cur"))
}}
complete -o default -F _genfuse genfuse"""


def script(shell: str, commands: Mapping[str, Callable[..., int]]) -> str:
    """What bash, zsh or fish must read to complete ``commands`` and what stands behind them."""
    names = {kind: " ".join(map(plugins.typed, plugins.discover(kind))) for kind in ("models", "datasets")}
    options = {**{name: sorted(_options(command)) for name, command in commands.items()}, **_of_training()}
    heads = " ".join(("train", *commands, "help"))
    if shell == "fish":
        seen = "complete -c genfuse -n '__fish_seen_subcommand_from"
        lines = [
            f"complete -c genfuse -n __fish_use_subcommand -f -a '{heads}'",
            f"{seen} train compare' -a '{names['models']}'",
            f"{seen} train compare train-features' -l data -x -a '{names['datasets']}'",
        ]
        for name, words in options.items():
            where = "; and __fish_seen_subcommand_from ".join(name.split())
            lines.append(f"{seen} {where}' -a '{' '.join(words)}'")
        return "\n".join(lines)
    cases = "\n".join(f'        "{name} "*-*) found="{" ".join(words)}" ;;' for name, words in options.items())
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return head + BASH.format(data=names["datasets"], commands=heads, models=names["models"], cases=cases)


def _options(command: Callable[..., int]) -> Iterator[str]:
    yield "--help"
    hints = typing.get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        kind, *_ = typing.get_args(hints[name]) or (hints[name],)
        if is_dataclass(kind):
            prefix = "data." if name == "data_options" else ""
            yield from (f"--{prefix}{field.name.replace('_', '-')}" for field in fields(kind))
        else:
            yield f"--{name.replace('_', '-')}"


def _of_training() -> dict[str, list[str]]:
    """The options of ``train MODEL``, of each model that can be imported."""
    from genfuse.cli.train import known_options

    found: dict[str, Any] = {}
    for plugin in plugins.discover("models"):
        try:
            known = known_options(plugins.typed(plugin))
        except PluginError:
            continue
        names = ("data" if name == "data.name" else name.replace("_", "-") for name in known)
        found[f"train {plugins.typed(plugin)}"] = sorted(f"--{name}" for name in (*names, "resume", "config", "help"))
    return found
