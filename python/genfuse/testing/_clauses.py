"""What a clause of a contract is, and how it is tried."""

from collections.abc import Callable
from typing import Any

import torch


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
    """The message of a ContractError, of {the text of a clause: what was seen}."""
    lines = [f"  - {text}\n    seen: {found}" for text, found in broken.items()]
    name = f"{what.__module__}:{what.__qualname__}"
    return "\n".join([f"{name} breaks {len(broken)} of {clauses} clauses of its contract{where}:", *lines])
