"""What goes wrong for reasons that the user can mend.

The command line prints the message of these, without a traceback, and exits with 2. Each message says what was wrong,
where, what was got, and what to do.
"""

from collections.abc import Iterable, Sequence


def near(name: str, known: Iterable[str]) -> str:
    """What somebody who typed ``name`` may have meant, to be put behind a message; "" if nothing is alike."""
    import difflib

    found = difflib.get_close_matches(name, [*known], 1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


class GenfuseError(ValueError):
    """Base of all errors that are the input's fault and not the program's."""


class SettingsError(GenfuseError):
    """A setting of a model, of the training or of the command is not usable."""


class NoLevelsError(SettingsError):
    """Columns of a table, by their ``places`` from 0 and ``names``, are real numbers, where levels are needed."""

    def __init__(self, places: Sequence[int], names: Sequence[str] = ()) -> None:
        self.places = places
        shown = ", ".join(names[i] if names else str(i + 1) for i in places)
        super().__init__(
            f"column {shown} of the table has no levels: integers without empty cells, categories and booleans do"
        )


class DataError(GenfuseError):
    """A data set cannot be found, read or used."""


class RunError(GenfuseError):
    """A run folder is missing, half there, of another version, or already taken."""


class PluginError(GenfuseError):
    """A model or data set is unknown, claimed twice, or fails to load."""


class NonFiniteLossError(GenfuseError):
    """Training met a loss that is NaN or infinite."""


class TrainingWarning(UserWarning):
    """A training that goes wrong in a way that its losses alone do not show. The message says what to try."""


class DataWarning(UserWarning):
    """Data that can be used, but of which something was left out, or is probably not what was meant."""


class RunWarning(UserWarning):
    """Something about a run folder that does not stop the work, and that whoever uses its numbers should know."""
