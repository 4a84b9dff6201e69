"""A comparison as a table: in Markdown, on the terminal, and as a page that needs nothing but itself."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from genfuse._files import plain
from genfuse.comparison._columns import COLUMNS, Column
from genfuse.plots import inline

# The table is too wide for a terminal or a page of text, so it is shown there in parts.
PARTS = (("quality", "diversity"), ("plugins",), ("stability",), ("latent space", "likelihood"), ("cost",))
TEXTS = (
    Column("outcome", "runs", "stability", "", "how many seeds were trained to the end; of the others why not"),
    Column("bound", "bound", "likelihood", "", "what the log-likelihood is"),
)
WIDTH, HEIGHT = 300, 110  # of a loss curve
ARROWS = {"lower": " ↓", "higher": " ↑", "": ""}


class Cell(NamedTuple):
    text: str
    value: float | None = None


class Row(NamedTuple):
    label: str
    cells: dict[str, Cell]  # by the keys of columns


class Table(NamedTuple):
    columns: list[Column]
    rows: list[Row]
    real: Row  # the same measures of real examples

    @property
    def shown(self) -> list[Row]:
        """The rows, and real examples if anything is measured of them."""
        measured = any(self.real.cells[column.key].value is not None for column in self.columns)
        return [*self.rows, *([self.real] if measured else [])]


def measures(result: dict[str, Any]) -> list[Column]:
    """All that there are columns for: `COLUMNS`, and what metrics of other packages make, before the stability."""
    known = {measure.key for measure in (*COLUMNS, *TEXTS)}
    others = [Column.of_plugin(*each) for each in result.get("plugins", {}).items() if each[0] not in known]
    first = next(i for i, measure in enumerate(COLUMNS) if measure.group == "stability")
    return [*COLUMNS[:first], *others, *COLUMNS[first:]]


def summary(runs: list[dict[str, Any]], measures: Sequence[Column]) -> dict[str, Any]:
    """Mean and standard deviation over the runs of a row that have figures, and what became of the others."""
    done = [run["figures"] for run in runs if "figures" in run]
    mean, std = {}, {}
    for measure in measures:
        values = [figures[measure.key] for figures in done if figures.get(measure.key) is not None]
        if values:
            mean[measure.key] = statistics.fmean(values)
        if len(values) > 1:
            std[measure.key] = statistics.stdev(values)
    if mean.get("frechet_distance") and "frechet_distance" in std:
        mean["spread"] = std["frechet_distance"] / mean["frechet_distance"]
    if any(run.get("losses") for run in runs):
        mean["warnings"] = float(sum(len(run.get("warnings", ())) for run in runs))
    errors = dict.fromkeys(run["error"] for run in runs if "error" in run)
    diverged = sum(run.get("diverged", False) for run in runs)
    outcome = [f"{len(done)} of {len(runs)}", *([f"{diverged} diverged"] if diverged else []), *errors]
    bounds = dict.fromkeys(figures["bound"] for figures in done)
    return {"mean": mean, "std": std, "outcome": "; ".join(outcome), "bound": ", ".join(bounds)}


def table(result: dict[str, Any]) -> Table:
    """The columns for which any row has a value, and what they show."""
    rows = result["rows"]
    columns = [m for m in measures(result) if any(m.key in row["mean"] for row in rows)]
    if columns and columns[0].key == COLUMNS[0].key:  # the Fréchet distance
        columns = [m for m in columns if m.key != COLUMNS[1].key]
    for text in TEXTS:  # each before the figures of its group
        at = next((i for i, m in enumerate(columns) if m.group == text.group), len(columns))
        columns.insert(at, text)

    def cell(row: dict[str, Any], measure: Column) -> Cell:
        if measure in TEXTS:
            return Cell(row.get(measure.key, "–"))
        value, std = row["mean"].get(measure.key), row["std"].get(measure.key)
        if value is None:
            return Cell("–")
        spread = f" ± {std:.2g}" if std and measure.group != "cost" else ""
        return Cell(format(value, measure.form) + spread, value)

    of_real = {"label": "real examples", "mean": result["real"], "std": {}}
    *made, real = (Row(row["label"], {m.key: cell(row, m) for m in columns}) for row in (*rows, of_real))
    return Table(columns, made, real)


def markdown(result: dict[str, Any]) -> str:
    """The table in parts, as Markdown."""
    whole = table(result)
    return "\n\n".join([about(result, literal), *(_markdown(part) for part in _parts(whole))]) + "\n"


def about(result: dict[str, Any], shown: Callable[[str], str] = str) -> str:
    """What was compared, in a line or two. ``shown`` is what becomes of names."""
    options, machine = result["options"], result["machine"]
    budget = options["budget"]
    trained = "existing runs"
    if budget and budget["seconds"]:
        trained = f"{budget['seconds']:g} seconds of updates each"
    elif budget:
        trained = f"{budget['examples']:,} examples each"
    names = [f"{i} {name}" for i, name in enumerate(options["data"].get("class_names") or ())]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    classes = " " + shown(f"(classes: {', '.join(names[:20])}{more})") if names else ""
    return (
        f"Data: {shown(options['data']['name'])}{classes}; {trained}. Features: {shown(options['about'])}. "
        f"genfuse {machine['genfuse']}, torch {machine['torch']}, {shown(machine['device'])}, "
        f"threads: {machine['threads']}."
    )


def show(result: dict[str, Any]) -> None:
    """Print the table, in parts, on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    def text(words: str) -> Text:  # a label or a title may look like markup, as [red]
        return Text(plain(words))

    console = Console()
    console.print(text(about(result)))
    whole = table(result)
    best = _best(whole)
    for part in (piece for each in _parts(whole) for piece in _fitting(each, console.width)):
        shown = RichTable("", box=box.SIMPLE, padding=(0, 1, 0, 0))
        for column in part.columns:
            shown.add_column(text(_title(column)))
        for row in part.shown:
            cells = [text(row.label)]
            for key in (column.key for column in part.columns):
                is_best = row is not part.real and (key, row.cells[key].value) in best
                cells.append(Text(plain(row.cells[key].text), "bold" if is_best else ""))
            shown.add_row(*cells)
        console.print(shown)


def html(result: dict[str, Any], pictures: Path, folder: Callable[[str], str]) -> str:
    """One page with all of it: pictures are within it, and it loads nothing. ``folder`` names the picture of a row."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    def picture(name: str) -> dict[str, str] | None:
        found = [file for file in (pictures / f"{name}.png", pictures / f"{name}.svg") if file.is_file()]
        return {"html": inline(found[0]), "href": quote(f"{pictures.name}/{found[0].name}")} if found else None

    whole = table(result)
    environment = Environment(
        loader=PackageLoader("genfuse.comparison", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    models = [
        {
            **row,
            "picture": picture(folder(row["label"])),
            "curves": [
                {"player": player, **_chart(lines)}
                for player in dict.fromkeys(player for run in row["runs"] for player in run.get("losses", ()))
                if (lines := [line for run in row["runs"] if len(line := run.get("losses", {}).get(player, ())) > 1])
            ],  # SVG points, one line a run, and the scale
            "links": [(run["seed"], quote(f"{run['path']}/")) for run in row["runs"] if run.get("path")],
            "distance": whole.columns[0].title + " " + cells[whole.columns[0].key].text,
            "measured": any("figures" in run for run in row["runs"]),
        }
        for row, (_, cells) in zip(result["rows"], whole.rows, strict=True)
    ]
    return environment.get_template("report.html").render(
        about=about(result),
        data=result["options"]["data"]["name"],
        table=whole,
        groups=Counter(column.group for column in whole.columns),
        models=models,
        best=_best(whole),
        together=_together(result["rows"]),
        warnings=[
            f"{row['label']}, seed {run['seed']}, {warning}"
            for row in result["rows"]
            for run in row["runs"]
            for warning in run.get("warnings", ())
        ],
        real=picture("real"),
        title=_title,
        colours=["#1f77b4", "#d1495b", "#2a9d5c", "#e09f3e", "#7b4fa3", "#5f6b73", "#17a2b8", "#a0522d"],
        dict=dict,
        width=WIDTH,
        height=HEIGHT,
    )


def _together(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The losses of all models of one player over each other, of each its first run; None if there is but one."""
    lines = {}
    for row in rows:
        losses: dict[str, Any] = next((run["losses"] for run in row["runs"] if run.get("losses")), {})
        if len(losses) == 1 and len(line := next(iter(losses.values()))) > 1:  # one point is no line
            lines[row["label"]] = line
    return {"names": list(lines), **_chart(list(lines.values()))} if len(lines) > 1 else None


def _chart(lines: list[Any]) -> dict[str, Any]:
    """Lines of (step, loss) as points of an SVG, and its ticks."""
    from matplotlib.ticker import MaxNLocator

    losses = sorted(loss for line in lines for _, loss in line)
    # The steep fall of the first steps, and what shoots up, would press the rest into a line.
    low, high = losses[int(0.02 * len(losses))], losses[math.ceil(0.95 * len(losses)) - 1]
    margin = 0.05 * (high - low) or 0.5 * max(1.0, abs(high))
    low, high, last = low - margin, high + margin, max(step for line in lines for step, _ in line)

    def x(step: float) -> str:
        return f"{step / last * WIDTH:.1f}"

    def y(loss: float) -> str:
        return f"{(1 - (min(max(loss, low), high) - low) / (high - low)) * HEIGHT:.1f}"

    ticks = [
        [(at(tick), f"{tick:,.10g}") for tick in MaxNLocator(4).tick_values(*ends) if ends[0] <= tick <= ends[1]]
        for at, ends in ((x, (0, last)), (y, (low, high)))
    ]
    return {
        "lines": [" ".join(f"{x(step)},{y(loss)}" for step, loss in line) for line in lines],
        "low": f"{float(f'{low:.3g}'):,.10g}",
        "high": f"{float(f'{high:.3g}'):,.10g}",
        "last": f"{last:,}",
        "x": ticks[0],
        "y": ticks[1],
    }


def _parts(whole: Table) -> list[Table]:
    parts = [[column for column in whole.columns if column.group in groups] for groups in PARTS]
    return [whole._replace(columns=columns) for columns in parts if columns]


def _best(whole: Table) -> set[tuple[str, float]]:
    """The key of each column of which one direction is better, with its best value, if rows have different ones."""
    found = set()
    for column in whole.columns:
        values = [value for row in whole.rows if (value := row.cells[column.key].value) is not None]
        if column.better and len(set(values)) > 1:
            found.add((column.key, min(values) if column.better == "lower" else max(values)))
    return found


def _fitting(part: Table, width: int) -> Iterator[Table]:
    """Pieces of a table that are as wide as a terminal at most, where titles may break between words."""
    first = max(len(row.label) for row in part.shown) + 3
    piece: list[Column] = []
    taken = first
    for column in part.columns:
        needs = max(map(len, _title(column).split())) + 3
        needs = max(needs, *(min(len(row.cells[column.key].text), 24) + 3 for row in part.shown))
        if piece and taken + needs > width:
            yield part._replace(columns=piece)
            piece, taken = [], first
        piece.append(column)
        taken += needs
    yield part._replace(columns=piece)


def _title(column: Column) -> str:
    return column.title + ARROWS[column.better]


def _markdown(part: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    def outcome(text: str) -> str:  # how many runs, and what errors say
        count, semicolon, errors = text.partition("; ")
        return count + semicolon + literal(errors)

    texts = [(column.key, outcome if column.key == "outcome" else literal) for column in part.columns]
    lines = [line(["", *(literal(_title(column)) for column in part.columns)])]
    lines.append(line(["---", *("--:" for _ in part.columns)]))
    for row in part.shown:
        lines.append(line([literal(row.label), *(text(row.cells[key].text) for key, text in texts)]))
    return "\n".join(lines)


def literal(text: str) -> str:
    """Text as Markdown that shows it and nothing else: as code where Markdown would see more in it."""
    text = " ".join(plain(text).split())
    if not re.search(r"[<>&`*~\[\]\\$!#@]|(?<!\w)_|_(?!\w)|https?:|www\.", text):
        return text
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    edge = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{edge}{text}{edge}{fence}"
