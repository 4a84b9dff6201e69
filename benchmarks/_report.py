"""What people read: lines on the terminal, docs/benchmarks.md and plots, all made from records."""

from pathlib import Path
from typing import Any

from benchmarks._record import Bar

Json = dict[str, Any]
STEP_SETTINGS = {"one": "one pinned thread, CPU time", "all": "all threads, wall time", "gpu": "GPU, wall time"}
MODES = {"forward": "forward", "backward": "backward", "both": "forward+backward"}
INTRODUCTION = """# Benchmarks

Written by `python -m benchmarks report RECORD.json... --out docs/benchmarks.md`, which replaces the sections of its
records; edit nothing here by hand. The records come from `python -m benchmarks steps --json RECORD.json`, and `ops`,
`training`, `flows`, `gans` or `examples` in place of `steps`. Figures of an NVIDIA H200 are in [gpu.md](gpu.md).

A time is the median of one run, with the 20% and 80% quantiles in brackets. All sides take turns in that run. An
operator is checked against float64 before it is timed: its error may be twice that of eager PyTorch in the same dtype.
Errors are those of results and gradients, as shares of the largest value of each.
`eager` is the formula in plain PyTorch, noise included, and `compile` is torch.compile of it. Backward is measured
alone, on a graph that is kept. A share of a copy is the time of a copy that reads and writes as many bytes as the
operator has to, divided by the operator's time. Memory is the most that one call holds at a time, results included.
"""


def _seconds(value: float) -> str:
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if value * s >= 1), ("ns", 1e9))
    return f"{value * scale:.3g} {unit}" if value * scale < 1000 else f"{value * scale:.0f} {unit}"


def _bytes(value: float) -> str:
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if value >= s), ("B", 1))
    return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:.0f} {unit}"


def _band(result: Json) -> str:
    return f"{_seconds(result['median'])} [{_seconds(result['low'])}, {_seconds(result['high'])}]"


def _size(comparison: Json) -> str:
    return " x ".join(map(str, comparison["size"]))


def describe(comparison: Json) -> str:
    """One comparison as lines for the terminal."""
    moved, copy = comparison["bytes"], comparison["copy"]
    lines = [
        f"{comparison['op']} ({_size(comparison)}) {MODES[comparison['mode']]}: "
        f"moves {_bytes(moved)}, a copy of which takes {_seconds(copy)} ({_bytes(moved / copy)}/s)"
    ]
    eager = comparison["sides"]["eager"]["median"]
    for side, result in comparison["sides"].items():
        if "failure" in result:
            lines.append(f"  {side:<10} {result['failure']}")
            continue
        median = result["median"]
        error = f"  error {result['error']:.1e}" if "error" in result else ""
        lines.append(
            f"  {side:<10} {_band(result):<32} {eager / median:6.2f}x eager  {_bytes(moved / median):>8}/s "
            f"({copy / median:4.0%} of copy)  peak {_bytes(result['memory']):>7}{error}"
        )
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _bars(record: Json) -> str:
    bars = [Bar(**bar) for bar in record["bars"]]
    return _table(["bar", "asked", "got", ""], [[bar.what, bar.limit, bar.got, bar.verdict] for bar in bars])


def _operators(record: Json) -> list[str]:
    parts = []
    for op in dict.fromkeys(comparison["op"] for comparison in record["comparisons"]):
        comparisons = [comparison for comparison in record["comparisons"] if comparison["op"] == op]
        sides, default = list(comparisons[0]["sides"]), comparisons[0]["default"]
        parts.append(f"### {op}\n")
        times, costs = [], []
        for comparison in comparisons:
            results = comparison["sides"]
            place = [_size(comparison), MODES[comparison["mode"]]]
            times.append(place + [results[side].get("failure") or _band(results[side]) for side in sides])
            ours = results[default]
            if "failure" not in ours:
                compiled = results["compile"].get("median")
                costs.append(
                    [
                        *place,
                        f"{results['eager']['median'] / ours['median']:.2f}x",
                        f"{compiled / ours['median']:.2f}x" if compiled else "-",
                        f"{_bytes(comparison['bytes'] / ours['median'])}/s",
                        f"{comparison['copy'] / ours['median']:.0%}",
                        f"{_bytes(ours['memory'])} ({_bytes(results['eager']['memory'])})",
                        f"{ours['error']:.1e} ({results['eager']['error']:.1e})",
                    ]
                )
        parts.append(_table(["size", "mode", *sides], times))
        parts.append(f"What this device gets by default, {default}, in detail (eager's figure in brackets):\n")
        head = ["size", "mode", "against eager", "against compile", "moves", "of a copy", "peak memory", "error"]
        parts.append(_table(head, costs))
    return parts


STEPS_TITLE = "Whole training steps"
STEPS = """A training step is the loss, its gradients, Adam's update and the clearing of gradients, of a batch that is
there. All sides have the same network and loss, and take turns in one process: on one thread that is pinned to one
core, by its CPU time, and on all threads, by the clock. Before anything is timed, genfuse's loss and gradients, and
JAX's, are held against plain PyTorch's at the same weights and noise. *PyTorch* is the model as one writes it by hand,
with torch.optim.Adam as it is by default, or fused; *products* are the matrix products and convolutions of that step
alone; *JAX* is value_and_grad and optax.adam in one jit with donated arguments. The two flows of couplings alone are
`realnvp` without learned linear layers. EDM's U-Net is genfuse's own on all sides, but with PyTorch's group
normalisation and in PyTorch's usual memory format on all others; diffusion models keep a moving average. On all sides
freed memory is kept, as a training of genfuse's keeps it. Figures beside genfuse's time are multiples of it: above 1,
genfuse's step is the shorter one. They are ratios of the 20% quantiles of all rounds, as whatever else runs on a
machine only ever makes a step longer, with the 90% interval by the bootstrap over rounds.

nflows, normflows, zuko and pythae have the model of their own that is nearest, of the same sizes: normflows' spline
layer also bends the coordinates that pass through, which its equal model leaves out; zuko's autoregressive flows and
nflows' MAF turn the order of coordinates around where genfuse has linear layers or normalised activations.
"""


def _ratio(result: Json) -> str:
    return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**result["ratio"])


def describe_step(row: Json) -> str:
    """One step in one setting as lines for the terminal."""
    lines = [f"{row['case']}, {STEP_SETTINGS[row['setting']]}"]
    for side, result in row["sides"].items():
        figure = result.get("failure") or f"{_band(result):<32} {_ratio(result) if 'ratio' in result else ''}"
        lines.append(f"  {side:<22} {figure}".rstrip())
    if "shares" in row:
        lines.append("  " + ", ".join(f"{part} {share:.0%}" for part, share in row["shares"].items()))
    return "\n".join(lines)


def _steps(record: Json) -> list[str]:
    """A table for each setting, and what is missing in it and why."""
    parts = [f"![Training steps beside other code]({record['chart']})\n"] if "chart" in record else []
    parts.append(STEPS)
    for setting, title in STEP_SETTINGS.items():
        rows = [row for row in record["comparisons"] if row["setting"] == setting]
        if not rows:
            continue
        own = ["genfuse", "genfuse, CUDA graphs", "products", "PyTorch, fused Adam", "PyTorch", "torch.compile",
               "torch.compile, CUDA graphs", "JAX"]  # fmt: skip
        own = [side for side in own if any(side in row["sides"] for row in rows)]
        failures = {
            result["failure"]: side for row in rows for side, result in row["sides"].items() if "failure" in result
        }
        cells = []
        for row in rows:
            shown = {side: result for side, result in row["sides"].items() if "failure" not in result}
            ours = _band(shown["genfuse"]) if "genfuse" in shown else "-"
            others = [
                f"{side} {_ratio(result)}" for side, result in shown.items() if side not in own and "ratio" in result
            ]
            ratios = [_ratio(shown[side]) if "ratio" in shown.get(side, {}) else "-" for side in own[1:]]
            cells.append([row["case"], ours, *ratios, ", ".join(others) or "-"])
        parts += [f"### {title[0].upper()}{title[1:]}\n", _table(["step", *own, "other libraries"], cells)]
        parts += [f"{side}: {reason}\n" for reason, side in failures.items()]
        if shares := [
            [row["case"], *(f"{share:.0%}" for share in row["shares"].values())] for row in rows if "shares" in row
        ]:
            head = ["step", *next(row["shares"] for row in rows if "shares" in row)]
            parts += [
                "Where the time of genfuse's step goes, by torch.profiler; products that a kernel of genfuse makes are "
                "the kernel's:\n",
                _table(head, shares),
            ]
    return parts


def report(records: list[Json], page: str = "") -> str:
    """The page that docs/benchmarks.md is: the same records give the same page. Of a former ``page`` it keeps the
    sections that no record is of."""
    former: dict[str, str] = {}
    for section in page.split("\n## ")[1:]:
        title = section.partition("\n")[0]
        former[title] = former.get(title, "") + f"## {section.rstrip()}\n\n"
    sections: dict[str, str] = {}
    for record in sorted(records, key=lambda record: record["command"] != "steps"):
        title, text = _section(record)
        sections[title] = sections.get(title, "") + text
    titles = sorted(
        {**former, **sections}, key=lambda title: not title.startswith(STEPS_TITLE)
    )  # else the page's order
    sections = {title: sections.get(title, former.get(title, "")) for title in titles}
    return "\n".join([INTRODUCTION, *(text.rstrip("\n") + "\n" for text in sections.values())])


def _section(record: Json) -> tuple[str, str]:
    """The title of a record's section, and all of it."""
    settings = record["settings"]
    command = STEPS_TITLE if record["command"] == "steps" else record["command"]
    title = ", ".join([command, *(settings[key] for key in ("device", "dtype") if key in settings)])
    if settings.get("replay"):
        title += ", without launches"
    parts = [f"## {title}\n"]
    if settings["quick"]:
        parts.append("This is a `--quick` run: a check that all runs, and no measurement.\n")
    if record["command"] == "steps":
        parts += _steps(record)
    parts.append("".join(f"- {key}: {value}\n" for key, value in record["machine"].items()))
    if record["bars"]:
        parts.append(_bars(record))
    if record["command"] == "ops":
        parts += _operators(record)
    elif "parts" in record:
        for part in record["parts"]:
            parts += [f"### {part['name']}\n", part["about"] + "\n", _rows(part["rows"])]
    elif "rows" in record:
        parts.append(_rows(record["rows"]))
    return title, "\n".join(parts) + "\n"


def _rows(rows: list[Json]) -> str:
    return _table(["measured", "figure"], [[row["what"], figure(row)] for row in rows])


def figure(row: Json) -> str:
    """One row: a time with its band, and as a multiple of ours; bytes; a number with its unit; or why there is none."""
    if "failure" in row:
        return row["failure"]
    if "median" in row:
        return _band(row) + (f", {row['ratio']:.3g} times genfuse's" if "ratio" in row else "")
    return _bytes(row["memory"]) if "memory" in row else f"{row['value']:.4g}{row['unit']}"


def plot(record: Json, folder: Path) -> list[Path]:
    """For each operator and mode time against elements, one line a side with its band. Returns the pictures' paths."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    comparisons = record.get("comparisons", [])
    for op, mode in dict.fromkeys((comparison["op"], comparison["mode"]) for comparison in comparisons):
        chosen = [comparison for comparison in comparisons if (comparison["op"], comparison["mode"]) == (op, mode)]
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for side in ["copy", *chosen[0]["sides"]]:
            points = []
            for comparison in chosen:
                copy = dict.fromkeys(("median", "low", "high"), comparison["copy"])
                result = copy if side == "copy" else comparison["sides"][side]
                if "median" in result:
                    points.append((comparison["bytes"], result["median"], result["low"], result["high"]))
            if points:
                moved, median, low, high = zip(*sorted(points), strict=True)
                style: Json = {"color": "0.6", "linestyle": ":"} if side == "copy" else {"marker": "o"}
                (line,) = axes.plot(moved, median, label=side, markersize=4, **style)
                axes.fill_between(moved, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel="bytes that an ideal kernel moves", ylabel="seconds a call")
        settings, machine = record["settings"], record["machine"]
        processor = machine.get("GPU", machine["CPU"])
        title = f"{op}, {MODES[mode]}, {settings['dtype']}\n{processor}, torch {machine['torch']}"
        axes.set_title(title, fontsize=10)
        axes.grid(which="major", alpha=0.3)
        axes.legend()
        paths.append(folder / f"{op}_{settings['device']}_{settings['dtype']}_{mode}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def chart(record: Json, path: Path) -> None:
    """How long other code takes for a training step, as multiples of genfuse's time; on one thread, if it was timed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from genfuse.plots import CONTEXT, DATA, MODEL

    setting = record["comparisons"][0]["setting"]
    rows = [row for row in record["comparisons"] if row["setting"] == setting][::-1]
    marks: dict[str, Json] = {
        "PyTorch": {"marker": "o", "color": DATA},
        "PyTorch, fused Adam": {"marker": "o", "markerfacecolor": "none", "color": DATA},
        "torch.compile": {"marker": "s", "color": "#7a9a5b"},
        "JAX": {"marker": "^", "color": "#e09f3e"},
        "nflows": {"marker": "D", "color": "0.25"},
        "zuko": {"marker": "v", "color": "0.45"},
        "normflows": {"marker": "P", "color": "0.65"},
        "pythae": {"marker": "X", "color": "0.35"},
        "products": {"marker": "|", "color": "0.5", "markersize": 11},
    }
    with rc_context(CONTEXT):
        figure = Figure(figsize=(8, 0.34 * len(rows) + 1.6), layout="constrained")
        axes = figure.subplots()
        for side, style in marks.items():
            points = [
                (row["sides"][side]["ratio"]["value"], y)
                for y, row in enumerate(rows)
                if "ratio" in row["sides"].get(side, {})
            ]
            if points:
                label = "matrix products alone" if side == "products" else side
                axes.plot(*zip(*points, strict=True), **{"linestyle": "none", "markersize": 6, "label": label, **style})
        axes.axvline(1, color=MODEL, label="genfuse")
        axes.set(xscale="log")
        figure.supxlabel(f"time of a step, as a multiple of genfuse's ({STEP_SETTINGS[setting]})", fontsize=10)
        axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
        axes.set_xticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
        axes.minorticks_off()
        figure.legend(loc="outside upper center", ncols=5, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
