"""The columns of a table as people keep it: what kinds there are, and the way from text to numbers and back."""

import csv
import io
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from genfuse.errors import DataError, SettingsError

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["number", "integer", "category", "boolean", "date"]
# Cells, in lower case, that stand for nothing: those of pandas.
MISSING = {"", "na", "n/a", "#n/a", "#na", "<na>", "nan", "-nan", "null", "none", "nat", "?"}
BOOLEANS = [("false", "true"), ("no", "yes"), ("f", "t"), ("n", "y")]
DAYS = ["%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d/%m/%y", "%m/%d/%y", "%d-%m-%Y", "%m-%d-%Y",
        "%d %b %Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y"]  # fmt: skip
TIMES = [" %H:%M:%S", " %H:%M", " %H:%M:%S.%f", " %I:%M %p", " %I:%M:%S %p"]
ISO = ["T%H:%M:%S", "T%H:%M", "T%H:%M:%S.%f"]
DATES = [*DAYS, *(day + time for time in TIMES for day in DAYS), *(DAYS[0] + time + zone for time in (*ISO, *TIMES[:3])
         for zone in ("", "Z", "%z") if time in ISO or zone), "%Y%m%d", "%Y-%m", "%H:%M", "%H:%M:%S"]  # fmt: skip
MOST = 1000  # categories of a column
FINE = 1000.0  # standard deviation, in ones, beyond which whole numbers are modelled as numbers
POINTS = [NormalDist().cdf(z / 4) for z in range(-11, 12)]  # at whose quantiles the knots of a column are
# A number with marks in it that are not those of the file, or with a unit; a code, whose zeros would be lost; a day.
MARKED = r"[+-]?(\d{1,3}([.,' ]\d{3})+([.,]\d+)?|\d+[.,]\d+)"
THOUSANDS = r"[+-]?\d{1,3}([.,' ]\d{3})+[.,]\d+|[+-]?\d{1,3}([' ]\d{3})+"
UNIT = rf"([$€£¥]|[A-Z]{{3}}) ?({MARKED}|[+-]?\d+)|({MARKED}|[+-]?\d+) ?(%|[$€£¥]|[A-Z]{{3}}|[kM]?[gm]|[cm]m)"
CODE = r"0\d+"
DAY = r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"
EXACT = 2**53  # whole numbers up to it are float64's
TOO_LONG = (
    "a whole number beyond 2^53, which float64 cannot tell from its neighbours: subtract an offset, or leave the "
    "column out if it is an identifier"
)
EPOCH = np.datetime64("1970-01-01", "s")


@dataclass(frozen=True)
class Scaling:
    """How the columns of a table were standardized: (value - mean) / std, by the training split's statistics.

    ``std`` is 1 for a constant column. ``dataclasses.asdict`` gives what JSON can hold, and ``Scaling(**of_that)`` the
    same scaling again.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    names: tuple[str, ...] | None = None  # of the columns, if the table has a header

    def __post_init__(self) -> None:
        for name in ("mean", "std", "names"):  # JSON has no tuples
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))

    def apply(self, x: Tensor) -> Tensor:
        """From original units (N, D) to standardized values (N, D), computed in float64 and returned as float32."""
        return ((x.double() - x.new_tensor(self.mean, dtype=torch.float64)) / self._std(x)).float()

    def restore(self, x: Tensor) -> Tensor:
        """From standardized values (N, D) to original units (N, D), in float64."""
        return x.double() * self._std(x) + x.new_tensor(self.mean, dtype=torch.float64)

    def some(self, indices: Sequence[int]) -> "Scaling":
        """The scaling of some of the columns."""
        return Scaling(*(of and tuple(of[i] for i in indices) for of in (self.mean, self.std, self.names)))  # type: ignore[arg-type]

    def _std(self, x: Tensor) -> Tensor:
        return x.new_tensor(self.std, dtype=torch.float64)


@dataclass(frozen=True)
class Column:
    """One column: its kind, and what is needed to read it, to model it and to write it again."""

    name: str
    kind: Kind = "number"
    categories: tuple[str, ...] = ()  # of categories and booleans, by their codes 0, 1, ...
    digits: int | None = None  # of numbers: decimals that they have; None: any
    low: float = 0.0  # of numbers, integers and dates, in original units
    high: float = 0.0
    unit: str = ""  # of dates: what they are counted in since 1970-01-01, days or seconds
    form: str = ""  # of dates: how they are written, as strftime has it
    missing: bool = False  # whether cells are
    mean: float = 0.0  # of the training split: numbers in original units, categories by their codes
    std: float = 1.0
    knots: tuple[float, ...] = field(default=(), repr=False)  # of numbers, integers and dates: quantiles, standardized
    scores: tuple[float, ...] = field(default=(), repr=False)  # and those of N(0, 1)
    # how often each category is; of numbers: is there, or missing
    shares: tuple[float, ...] = field(default=(), repr=False)

    @property
    def coded(self) -> bool:
        """Whether its numbers are codes of categories."""
        return self.kind in ("category", "boolean")

    @property
    def whole(self) -> bool:
        """Whether its numbers, or the codes of its categories, are whole."""
        return self.coded or self.kind in ("integer", "date") or self.digits == 0

    def spec(self) -> dict[str, Any]:
        """What `genfuse.nn.Columns` is made of, as JSON has it. A column of one value is a category."""
        if not self.coded and self.low == self.high:
            only = {"mean": 0.0, "std": 1.0, "low": 0.0, "high": 0.0, "knots": [], "scores": []}
            return {"kind": "category", "missing": self.missing, "shares": list(self.shares) or [1.0], **only}
        whole = self.kind == "integer" or self.unit == "days"
        kind = "category" if self.coded else "integer" if whole and self.std <= FINE else "number"
        ends = {"low": (self.low - self.mean) / self.std, "high": (self.high - self.mean) / self.std}
        lists = {name: list(getattr(self, name)) for name in ("knots", "scores", "shares")}
        return {"kind": kind, "mean": self.mean, "std": self.std, "missing": self.missing, **ends, **lists}

    def fitted(self, values: np.ndarray, mean: float, std: float) -> "Column":
        """The column with what is to be known of its values (N,) in the training split, NaN where they are missing."""
        there = values[~np.isnan(values)]
        gone = len(values) - len(there)
        if self.coded:
            counts = np.bincount(there.astype(int), minlength=len(self.categories)).tolist() + [gone] * self.missing
            return replace(self, mean=mean, std=std, shares=_shares(counts))
        known = replace(self, mean=mean, std=std, low=float(there.min()), high=float(there.max()),
                        shares=_shares([len(there), gone]) if self.missing else ())  # fmt: skip
        if known.low == known.high:
            return known
        spread = there
        if known.spec()["kind"] == "integer":  # they fill their bins
            spread = there + np.random.default_rng(0).random(len(there)) - 0.5
        ends = [0.5 / len(there), *(p for p in POINTS if 1 < p * len(there) < len(there) - 1), 1 - 0.5 / len(there)]
        knots = (np.quantile(spread, ends) - mean) / std
        different, of = np.unique(knots, return_inverse=True)
        scores = np.bincount(of, [NormalDist().inv_cdf(p) for p in ends]) / np.bincount(of)
        return replace(known, knots=tuple(different.tolist()), scores=tuple(scores.tolist()))

    def _code(self, word: str) -> float:
        """The code of a category, of a boolean in any usual spelling; NaN if there is none."""
        known = [each.lower() for each in self.categories] if self.kind == "boolean" else list(self.categories)
        word = word.lower() if self.kind == "boolean" else word
        if self.kind == "boolean" and word not in known:
            word = next((known[pair.index(word)] for pair in (*BOOLEANS, ("0", "1")) if word in pair), word)
        number = number_of(word, ".")  # 1.0 is 1, as tables with empty cells have it
        word = f"{number + 0.0:g}" if word not in known and math.isfinite(number) else word
        return float(known.index(word)) if word in known else math.nan

    def parse(self, texts: "pd.Series", decimal: str = ".") -> tuple[np.ndarray, np.ndarray]:
        """Numbers (N,), NaN where a cell is missing, of text; and where it is text that the column does not have."""
        present, gone = stripped(texts)
        if self.coded:
            values = present.map({word: self._code(word) for word in present.unique()}).to_numpy(float)
        elif self.kind == "date":
            values = _days(present, self.form, self.unit)
        else:
            values = numbers(present, decimal)
            if self.kind == "integer":
                values = np.where(values == np.round(values), values, np.nan)
        return np.where(gone, np.nan, values), np.isnan(values) & ~gone

    def restore(self, values: np.ndarray) -> "pd.Series":
        """Numbers (N,) in original units, NaN where a cell is missing, as cells of the column's own type."""
        import pandas as pd

        gone = np.isnan(values)
        if self.coded:
            codes = np.where(gone, 0, values).round().astype(int).clip(0, len(self.categories) - 1)
            words = np.array(self.categories, dtype=object)[codes]
            if self.categories == ("0", "1"):
                return pd.Series(codes, name=self.name).astype("Int64").mask(gone)
            if self.kind == "boolean" and self.categories[1].lower() == "true":
                return pd.Series(codes == 1, name=self.name).astype("boolean").mask(gone)
            return pd.Series(np.where(gone, None, words), name=self.name, dtype=object)
        if self.kind == "date":
            count = np.where(gone, 0, values).round().astype("int64") * (86400 if self.unit == "days" else 1)
            return pd.Series(EPOCH + count.astype("timedelta64[s]"), name=self.name).mask(gone)
        if self.whole:
            return pd.Series(np.where(gone, 0, values).round(), name=self.name).astype("Int64").mask(gone)
        return pd.Series(values if self.digits is None else values.round(self.digits), name=self.name)

    def written(self, dates: "pd.Series") -> "pd.Series":
        """Dates as they were written."""
        return (dates.dt.tz_localize("UTC") if "%z" in self.form else dates).dt.strftime(self.form)

    def about(self) -> str:
        """What its values are, in words."""
        if self.coded:
            quoted = (f'"{word}"' if "," in word or not word else word for word in self.categories[:6])
            words = ", ".join(quoted) + (", ..." if len(self.categories) > 6 else "")
            return words if self.kind == "boolean" else f"{len(self.categories)}: {words}"
        ends = self.restore(np.array([self.low, self.high]))
        if self.kind == "date":
            ends = self.written(ends)
        shown = [f"{end:.6g}" if isinstance(end, float) else str(end) for end in ends]
        return f"{shown[0]} to {shown[1]}" + (f", modelled in {self.unit} since 1970-01-01" if self.unit else "")


@dataclass(frozen=True)
class Schema:
    """The columns of a table, in the order of what models see, and those that are left out, with the reason.

    ``Schema.from_json(schema.to_json())`` is the same schema.
    """

    columns: tuple[Column, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    decimal: str = "."  # the mark before decimals in text

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    @property
    def scaling(self) -> Scaling:
        """How the columns are standardized, categories by their codes."""
        return Scaling(tuple(c.mean for c in self.columns), tuple(c.std for c in self.columns), self.names)

    @property
    def real(self) -> bool:
        """Whether all are numbers without end, and none is missing: then no model needs to know more of them."""
        return all(c.kind == "number" and not c.missing for c in self.columns)

    @property
    def plain(self) -> bool:
        """Whether all are numbers, some of them whole perhaps, with no cell missing and no code of a category."""
        coded = [c for c in self.columns if c.kind == "category" or c.categories not in ((), ("0", "1"))]
        return not coded and not any(c.missing for c in self.columns)

    def _repr_html_(self) -> str:
        """For notebooks: `describe` as a table."""
        import pandas as pd

        return pd.DataFrame(self.describe(), columns=["column", "kind", "values", "missing"]).to_html(index=False)

    @classmethod
    def of_scaling(cls, scaling: Scaling) -> "Schema":
        """Of columns that are all numbers without end."""
        names = scaling.names or tuple(str(i + 1) for i in range(len(scaling.mean)))
        each = zip(names, scaling.mean, scaling.std, strict=True)
        return cls(tuple(Column(name, mean=mean, std=std) for name, mean, std in each))

    def fitted(self, train: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> "Schema":
        """The schema with what is to be known of the training rows (N, D), their means and standard deviations (D,)."""
        each = zip(self.columns, train.T, mean, std, strict=True)
        return replace(self, columns=tuple(column.fitted(*of) for column, *of in each))

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # which has no tuples
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Schema":
        """Raises DataError for what `to_json` does not make."""
        try:
            lists = [{k: tuple(v) if isinstance(v, list) else v for k, v in c.items()} for c in content["columns"]]
            columns = tuple(Column(**each) for each in lists)  # type: ignore[arg-type]
            return cls(columns, tuple((name, why) for name, why in content["left_out"]), content["decimal"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"this is no schema of a table: {type(error).__name__}: {error}") from error

    def specs(self) -> tuple[dict[str, Any], ...]:
        """What `genfuse.nn.Columns` is made of."""
        return tuple(column.spec() for column in self.columns)

    def some(self, indices: Sequence[int]) -> "Schema":
        """The schema of some of the columns."""
        return replace(self, columns=tuple(self.columns[i] for i in indices))

    def parse(self, frame: "pd.DataFrame", origin: str = "the table") -> np.ndarray:
        """Numbers (N, D), codes in place of categories, NaN where a cell is missing, of a table of text or of anything.

        Columns are found by name, in any order. Raises DataError, which names the column, and row and cell, if columns
        are missing or unknown, or a cell is nothing that the column has.
        """
        known = {*self.names, *(name for name, _ in self.left_out)}
        if gone := [name for name in self.names if name not in frame.columns]:
            raise DataError(f"{origin} has no column {', '.join(gone)}; it has: {', '.join(map(str, frame.columns))}")
        if more := [str(name) for name in frame.columns if name not in known]:
            raise DataError(f"{origin} has the columns {', '.join(more)}, which are none of {', '.join(self.names)}")
        parsed = np.empty((len(frame), len(self.columns)))
        for i, column in enumerate(self.columns):
            parsed[:, i], odd = column.parse(frame[column.name], self.decimal)
            if odd.any():
                row = int(odd.argmax())
                shown = ", ".join(column.categories[:9]) + (", ..." if len(column.categories) > 9 else "")
                wanted = {"integer": "a whole number", "date": f"a date of the form {column.form}"}
                expected = f"expected {wanted.get(column.kind, 'a number')}"
                if column.coded:
                    expected = f"one of the categories {shown}, which the training data has"
                raise DataError(f"{origin}, {place(frame, row, column.name)}: {expected}; got "
                                f"{str(frame[column.name].iloc[row])!r}")  # fmt: skip
            if not column.missing and len(gone_rows := np.flatnonzero(np.isnan(parsed[:, i]))):
                raise DataError(
                    f"{origin}, {place(frame, gone_rows[0], column.name)}: the cell is empty, and none of the training "
                    "data's was: fill it, or train on data with such cells"
                )
        return parsed

    def encode(self, frame: "pd.DataFrame", origin: str = "the table") -> Tensor:
        """Rows as models see them, (N, D) in float32: standardized, NaN where a cell is missing. Raises what `parse`
        does."""
        return self.scaling.apply(torch.from_numpy(self.parse(frame, origin)))

    def decode(self, x: Tensor) -> "pd.DataFrame":
        """Examples (N, D) as a table in original units: integers whole, categories as words, dates as dates, and what
        is missing empty."""
        import pandas as pd

        values = self.scaling.restore(x.detach().cpu()).numpy()
        return pd.concat([column.restore(values[:, i]) for i, column in enumerate(self.columns)], axis=1)

    def texts(self, frame: "pd.DataFrame") -> "pd.DataFrame":
        """A table as `decode` makes it, with dates written as they were."""
        return frame.assign(**{c.name: c.written(frame[c.name]) for c in self.columns if c.kind == "date"})

    def describe(self) -> Iterator[tuple[str, str, str, str]]:
        """Name, kind, values and share of missing cells of each column, and of those that are left out the reason."""
        for column in self.columns:
            share = f"{column.shares[-1] / sum(column.shares):.1%}" if column.missing else ""
            yield column.name, column.kind, column.about(), share
        yield from ((name, "left out", why, "") for name, why in self.left_out)


def infer(
    frame: "pd.DataFrame",
    origin: str,
    *,
    columns: str = "",
    drop: str = "",
    types: str = "",
    decimal: str = ".",
) -> Schema:
    """The schema of a table of text, by what is in it and what the user says, yet without means, spreads and shares.

    Raises DataError, which names row and column, for a column that is not clear, and SettingsError for columns that are
    not there and kinds that are unknown.
    """
    wanted, dropped, given = names_in(columns), names_in(drop), _types(types)
    names = list(map(str, frame.columns))
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        which = " and ".join(str(i + 1) for i, name in enumerate(names) if name == twice)
        raise DataError(
            f"{origin}: the names of the columns are not all different: {', '.join(names)}; columns {which} are both "
            f"called {twice!r}: rename one"
        )
    for option, some in (("columns", wanted), ("drop", dropped), ("types", given)):
        if unknown := ", ".join(name for name in some if name not in names):
            raise SettingsError(f"--data.{option}: {origin} has no column {unknown}; it has: {', '.join(names)}")
    found: list[Column] = []
    left_out: list[tuple[str, str]] = []
    for name in names:
        if name in dropped or (wanted and name not in wanted):
            left_out.append((name, "by --data." + ("drop" if name in dropped else "columns")))
            continue
        column = _column(frame, name, origin, *given.get(name, ("", "")), decimal, asked=name in wanted)
        (left_out if isinstance(column, tuple) else found).append(column)  # type: ignore[arg-type]
    if not found:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out)
        raise DataError(f"{origin}: no column is left to be modelled: {why}")
    return Schema(tuple(found), tuple(left_out), decimal)


def of_numbers(names: Sequence[str], values: np.ndarray) -> Schema:
    """The schema of a table of numbers (N, D) alone, all of them finite."""
    return Schema(tuple(_numeric(name, values[:, i]) for i, name in enumerate(names)))


def _types(text: str) -> dict[str, tuple[str, str]]:
    """Kind and form by name, of "a=category,b=date:%d/%m/%Y"."""
    found = {}
    for each in names_in(text):
        name, _, kind = (part.strip() for part in each.rpartition("="))
        kind, _, form = kind.partition(":")
        if kind not in get_args(Kind) or not name or (form and kind != "date"):
            raise SettingsError(
                f"--data.types must be NAME=KIND,... with the kinds {', '.join(get_args(Kind))} or date:%d/%m/%Y; got "
                f"{each!r}"
            )
        found[name] = kind, form
    return found


def _column(
    frame: "pd.DataFrame", name: str, origin: str, kind: str, form: str, decimal: str, asked: bool
) -> Column | tuple[str, str]:
    """What a column is; if it is to be left out its name and the reason."""
    cells = frame[name]
    if cells.dtype.kind in "Oc" and (parts := cells.map(_has_parts).to_numpy(bool)).any():
        row = int(parts.argmax())
        raise DataError(
            f"{origin}, {place(frame, row, name)}: expected a number, a word or a date; got a "
            f"{type(cells.iloc[row]).__name__}: give each of its parts a column of its own, or leave it out by "
            f"--data.drop {shlex.quote(joined([name]))}"
        )
    present, gone = stripped(frame[name])
    there = present[~gone]
    missing = bool(gone.any())

    def refuse(odd: np.ndarray, wanted: str, hint: str) -> DataError:
        row = int(np.flatnonzero(~gone)[odd.argmax()])
        got = str(frame[name].iloc[row])
        return DataError(f"{origin}, {place(frame, row, name)}: expected {wanted}; got {got!r}{hint}")

    if not len(there):
        if kind:
            raise DataError(f"{origin}: the column {name} is to be of kind {kind}, and all of its cells are empty")
        return name, "all of its cells are empty"
    coded = not kind and bool(there.str.fullmatch(CODE).any())
    if kind in ("number", "integer") or not (kind or coded or there.str.fullmatch(DAY).all()):
        values = numbers(there, decimal)
        odd = np.isnan(values)
        if not odd.any() and not np.isfinite(values).all():
            raise refuse(~np.isfinite(values), "a finite number", "; remove or fill it")
        if not odd.any():
            found = _numeric(name, values, missing, kind, asked)
            far = np.abs(values) > EXACT
            inexact = far & there.map(is_inexact).to_numpy(bool) if far.any() else far
            if isinstance(found, Column) and inexact.any():
                if not kind and not asked and len(there) >= 10 and there.is_unique:
                    return name, "its whole numbers are too long for measurements, and all different: it names the rows"
                raise refuse(inexact, "a number that float64 holds", f": {TOO_LONG}")
            return found
        marked = there.str.fullmatch(f"{MARKED}|{UNIT}").to_numpy(bool) & odd
        few = odd.mean() <= 0.5 or (there[odd].nunique() == 1 and there[~odd].nunique() > 20)  # a dash, in most rows
        if kind or few or marked.any():
            hint = f"; if it is a name and no number, say {_typed(name, 'category')}"
            if few and not marked.any():
                hint += "; if it stands for nothing, leave the cell empty"
            elif there[odd].str.fullmatch(UNIT).any():
                hint = f"; write numbers without their unit, or say {_typed(name, 'category')}"
            elif there[odd].str.fullmatch(THOUSANDS).any():
                hint = f"; write numbers without marks between thousands, or say {_typed(name, 'category')}"
            if not frame.attrs.get("named", True) and odd[0] and not odd[1:].all():
                hint = "; if the row holds names, say --data.header yes (in Python header='yes')"
            raise refuse(marked if marked.any() else odd, "a number", hint)
    if kind in ("", "date") and (form or not kind or len(there)):
        some = there.drop_duplicates()[:100]
        forms = [form] if form else [each for each in DATES if not np.isnan(_days(some, each)).all()] or DATES[:1]
        fits = {each: _days(there, each) for each in forms}
        whole = [each for each, days in fits.items() if not np.isnan(days).any()]
        if len(whole) > 1 and any((fits[whole[0]] != fits[each]).any() for each in whole):
            raise DataError(
                f"{origin}: the column {name} has dates such as {there.iloc[0]}, which may be {' or '.join(whole)}: "
                f"say which by {_typed(name, f'date:{whole[0]}')}"
            )
        best = whole[0] if whole else max(fits, key=lambda each: int((~np.isnan(fits[each])).sum()))
        share = float((~np.isnan(fits[best])).mean())
        if not whole and (kind or share >= 0.5):
            wanted = f"a date of the form {best}" + (f", as {share:.0%} of the column are" if share else "")
            hint = f"; write all dates in one form, or say {_typed(name, 'category')}"
            raise refuse(np.isnan(fits[best]), wanted, hint)
        if whole:
            unit = "days" if (fits[best] == np.round(fits[best])).all() else "seconds"
            return Column(name, "date", unit=unit, form=best, missing=missing)
    different = there.unique().tolist()
    spelled = {word.lower(): word for word in different}
    for pair in BOOLEANS:
        if kind in ("", "boolean") and spelled.keys() == set(pair):
            return Column(name, "boolean", (spelled[pair[0]], spelled[pair[1]]), missing=missing)
    if kind == "boolean":
        if len(different) > 2:
            raise DataError(f"{origin}: the column {name} is to be boolean, and has {len(different)} different values")
        return Column(name, "category", tuple(in_order(different)), missing=missing)
    if not kind and not asked and len(different) > max(20, len(there) / 2):
        numbered = f"; if they are numbers with zeros before them, say {_typed(name, 'integer')}" if coded else ""
        return name, f"{len(different):,} of its {len(there):,} cells are different words: it names the rows{numbered}"
    if not kind and len(different) > MOST:
        raise DataError(
            f"{origin}: the column {name} has {len(different):,} categories, more than {MOST:,}: leave it out by "
            f"--data.drop {shlex.quote(joined([name]))}, join rare ones, or have it modelled all the same by "
            + _typed(name, "category")
        )
    return Column(name, "category", tuple(in_order(different)), missing=missing)


def _has_parts(cell: Any) -> bool:
    """Whether a cell of a DataFrame has parts, as a list has and a complex number."""
    return bool(np.iscomplexobj(cell) or (np.iterable(cell) and not isinstance(cell, (str, bytes))))


def _numeric(name: str, values: np.ndarray, missing: bool = False, kind: str = "", asked: bool = True) -> Any:
    """A column of finite numbers, without the missing ones; its name and a reason if it numbers the rows."""
    whole = bool((values == np.round(values)).all())
    far = bool(np.abs(values).max() > EXACT)
    if kind == "integer" and far:
        raise DataError(f"the column {name} is to be of whole numbers, and has some beyond 2^53, which float64 cannot "
                        f"tell from their neighbours: say {_typed(name, 'number')}")  # fmt: skip
    if kind == "integer" and not whole:
        odd = values[values != np.round(values)][0]
        raise DataError(f"the column {name} is to be of whole numbers, and has {odd:g}: say {_typed(name, 'number')}")
    if not kind and not asked and numbers_rows(name, values):
        return name, f"it numbers the rows; to have it modelled, say {_typed(name, 'integer')}"
    if not kind and np.unique(values).tolist() == [0, 1]:
        return Column(name, "boolean", ("0", "1"), missing=missing)
    with np.errstate(over="ignore"):
        fine = values.std() <= FINE
    if whole and kind != "number" and fine and not far:
        return Column(name, "integer", missing=missing)
    digits = next((d for d in range(7) if (values.round(d) == values).all()), None)
    return Column(name, "number", digits=None if far else digits, missing=missing)


def numbers_rows(name: str, values: np.ndarray) -> bool:
    """Whether numbers (N,) are whole, no two the same, and without gaps or of a name that says what they are."""
    if len(values) < 10 or (values != np.round(values)).any() or len(different := np.unique(values)) < len(values):
        return False
    called = re.search(r"(?i:(^|[^a-z])(id|uuid|guid|key|index|nr|no))$|[a-z]I[dD]$", name)
    return bool(called) or bool((np.diff(different) == 1).all())


def _typed(name: str, kind: str) -> str:
    """The option that says what kind a column is, as a shell takes it."""
    return f"--data.types {shlex.quote(joined([f'{name}={kind}']))}"


def is_inexact(cell: str) -> bool:
    """Whether text is a whole number that float64 does not hold."""
    return bool(re.fullmatch(r"[+-]?\d+", cell)) and int(cell) != int(float(cell))


def named(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The DataFrame with text as the names of its columns, and names of several levels in one."""
    names = [" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in frame.columns]
    return frame.set_axis(names, axis=1)


def stripped(texts: "pd.Series") -> tuple["pd.Series", np.ndarray]:
    """Cells as text without spaces around, and which of them stand for nothing."""
    if texts.dtype.kind in "Mm":  # of a DataFrame
        texts = texts.dt.floor("s") if texts.dtype.kind == "M" else texts.dt.total_seconds()
    cells = texts.astype("string").fillna("").astype(object).map(str.strip)
    return cells, cells.map(str.lower).isin(MISSING).to_numpy(bool)


def numbers(cells: "pd.Series", decimal: str = ".") -> np.ndarray:
    """Numbers (N,) of text, NaN for what is none: also for 1_000 and digits of other scripts, which Python takes."""
    different = {cell: number_of(cell, decimal) for cell in cells.unique()}
    return cells.map(different).to_numpy(float)


def number_of(cell: str, decimal: str) -> float:
    if "_" in cell or not cell.isascii() or (decimal == "," and "." in cell):
        return math.nan
    try:
        return float(cell.replace(",", ".") if decimal == "," else cell)
    except ValueError:
        return math.nan


def place(frame: "pd.DataFrame", row: int, name: str) -> str:
    """A cell, as errors name it: by the index of the table, which of text is the line, and the column from 1."""
    column = list(frame.attrs.get("columns", frame.columns)).index(name) + 1
    return f"row {frame.index[row]}, column {column}" + (f" ({name})" if frame.attrs.get("named", True) else "")


def _days(cells: "pd.Series", form: str, unit: str = "days") -> np.ndarray:
    """Days or seconds (N,) since 1970-01-01 of dates of one form; NaN for what is no such date."""
    import pandas as pd

    found = pd.to_datetime(cells, format=form, errors="coerce", utc=True)
    times = found.dt.tz_localize(None).to_numpy("datetime64[s]")
    seconds = np.where(np.isnat(times), np.nan, (times - EPOCH).astype(float))
    return seconds / (86400 if unit == "days" else 1)


def _shares(counts: Sequence[int]) -> tuple[float, ...]:
    """Shares of choices, none of them 0."""
    return tuple(float((count + 0.5) / (sum(counts) + 0.5 * len(counts))) for count in counts)


def names_in(text: str) -> list[str]:
    """The names in "a,b": one that has a comma itself, or what is said of it, as a="b, c", is in quotes."""
    text = re.sub(r'(^|,)\s*([^",]+[=<>])\s*"((?:[^"]|"")*)"', r'\1"\2\3"', text)
    return [name for row in csv.reader([text], skipinitialspace=True) for name in map(str.strip, row) if name]


def joined(names: Sequence[str]) -> str:
    """The text in which `names_in` finds these names."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(names)
    return line.getvalue()


def in_order(names: Iterable[str]) -> list[str]:
    """Names sorted, and numbers as numbers, those within names too: 2 before 10."""
    names = list(names)
    if all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name) for name in names):
        return sorted(names, key=lambda name: (float(name), name))
    parts = {name: re.split(r"(\d+)", name) for name in names}  # words and digits in turns
    return sorted(names, key=lambda name: ([int(p) if i % 2 else p for i, p in enumerate(parts[name])], name))
