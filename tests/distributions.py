"""Real distributions for tests, in folders of their own: they are found by what finds installed ones."""

from pathlib import Path


def write_distribution(
    folder: Path, name: str, kind: str, entries: dict[str, str], modules: dict[str, str] | None = None
) -> Path:
    """Write version 1.0 of a distribution with entry points {name: target} and modules {name: source}.

    ``folder`` is what has to be put on the path. Returns the folder of the metadata.
    """
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{entry} = {target}\n" for entry, target in entries.items())
    (info / "entry_points.txt").write_text(f"[genfuse.{kind}]\n{lines}")
    for module, source in (modules or {}).items():
        (folder / f"{module}.py").write_text(source)
    return info
