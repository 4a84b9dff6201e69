"""Real distributions for tests, in folders of their own: they are found by what finds installed ones."""

import zipfile
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


def write_wheel(folder: Path, name: str, models: dict[str, str], source: str) -> Path:
    """Write version 1.0 of a distribution with one module, ``name`` with _ for -, as a wheel that pip installs."""
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    entries = "".join(f"{entry} = {target}\n" for entry, target in models.items())
    files = {
        f"{module}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[genfuse.models]\n{entries}",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    wheel = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, content in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(file, content)
    return wheel
