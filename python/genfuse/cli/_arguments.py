"""What arguments of several commands mean."""

from pathlib import Path
from typing import TYPE_CHECKING

from genfuse.errors import SettingsError

if TYPE_CHECKING:
    import torch

    from genfuse.data import Schema


def find_device(name: str) -> "torch.device":
    """The device that a user means. Raises SettingsError if this machine or this PyTorch does not have it."""
    import torch

    if name == "auto":
        return (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")
    reason = "no such device"
    if name.partition(":")[0] in ("cpu", "cuda", "mps"):
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
    raise SettingsError(f"--device must be auto, cpu, cuda, cuda:N or mps; got {name}: {reason}")


def refuse_existing(file: Path, overwrite: bool) -> None:
    """Raise SettingsError if a file is there that may not be replaced."""
    if file.exists() and not overwrite:
        raise SettingsError(f"{file} exists: name another file, or pass --overwrite")


def show_columns(schema: "Schema") -> None:
    """Print what the columns of a table are taken for."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from genfuse._files import plain

    table = Table("column", "kind", "values", "missing", box=box.SIMPLE_HEAD)
    for row in schema.describe():
        table.add_row(*(Text(plain(cell)) for cell in row))
    Console().print(table)
