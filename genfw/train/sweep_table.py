r"""The table of a sweep: mean and standard error over seeds, grouped by all else that differs.

.. math:: \bar m = \frac1n \sum_i m_i, \qquad
    \mathrm{se} = \sqrt{\frac{1}{n (n - 1)} \sum_i (m_i - \bar m)^2}

over the n finished jobs of a group that have this number, n being said where those are not all; one
job has no standard error. In the sweep's folder:

table.csv, table.md, table.png     a row per group
jobs.csv                           a row per job: status, overrides and everything in its results

A job whose tested NLL is not finite has no number: it is none of the finished ones.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genfw.train.errors import not_finite
from genfw.train.files import replace_text, replaced

Record = Mapping[str, Any]

FINISHED, NOT_FINITE = "finished", "not finite: "

MAIN = ("test/bpd", "test/nll", "val/nll", "seconds/fit")
"""Shown of every sweep, with the distances between samples and data where they were measured."""


@dataclass(frozen=True)
class Group:
    """The jobs that differ in their seed alone.

    Args:
        choices: what they have in common where others differ, {key: value}.
        jobs: how many different ones there are, finished or not.
        values: {metric: its value in each finished job}.
    """

    choices: dict[str, str]
    jobs: int
    values: dict[str, list[float]]

    def mean(self, metric: str) -> float | None:
        values = self.values[metric]
        return sum(values) / len(values) if values else None

    def stderr(self, metric: str) -> float | None:
        values, mean = self.values[metric], self.mean(metric)
        n = len(values)
        if mean is None or n < 2:
            return None
        return math.sqrt(sum((value - mean) ** 2 for value in values) / (n * (n - 1)))

    @property
    def finished(self) -> int:
        return max((len(values) for values in self.values.values()), default=0)

    def cell(self, metric: str) -> str:
        r"""`1.833 ± 0.005`: rounded at the second digit of the standard error; `1.833 ± 0.005 (2)`
        where only two of the finished jobs have it."""
        mean, stderr, n = self.mean(metric), self.stderr(metric), len(self.values[metric])
        if mean is None:
            return ""
        few = f" ({n})" if n < self.finished else ""
        if not stderr or not math.isfinite(stderr):
            return f"{mean:.5g}{few}"
        digits = max(0, 1 - math.floor(math.log10(stderr)))
        return f"{mean:.{digits}f} ± {stderr:.{digits}f}{few}"


def groups(records: Sequence[Record]) -> list[Group]:
    """In the order of their first jobs. Of jobs with the same choices and seed one counts."""
    records = _each_once(records)
    chosen = [_choices(each) for each in records]
    keys = list(dict.fromkeys(key for each in chosen for key in each if key != "seed"))
    axes = [key for key in keys if len({each.get(key) for each in chosen}) > 1]
    shown = metrics(records)
    made: dict[tuple[str, ...], Group] = {}
    counts: dict[tuple[str, ...], int] = {}
    for each, choices in zip(records, chosen, strict=True):
        own = {axis: choices.get(axis, "") for axis in axes}
        key = tuple(own.values())
        group = made.setdefault(key, Group(own, 0, {metric: [] for metric in shown}))
        counts[key] = counts.get(key, 0) + 1
        if status(each) == FINISHED:
            for metric, values in group.values.items():
                if isinstance(value := each["results"].get(metric), int | float):
                    values.append(value)
    return [Group(group.choices, counts[key], group.values) for key, group in made.items()]


def metrics(records: Sequence[Record]) -> list[str]:
    """The columns of the table."""
    known = dict.fromkeys(key for each in records for key in each["results"])
    distances = [key for key in known if key.startswith("test/") and f"{key}_samples" in known]
    return [key for key in (*MAIN[:2], *distances, *MAIN[2:]) if key in known]


def status(record: Record) -> str:
    """`finished`, `running`, `not finite: ` and what, `failed: ` and why, or that its folder is
    gone, which is then to be run once more."""
    if record["exit"] is None:
        return "running"
    if wrong := not_finite(record["results"]):
        return f"{NOT_FINITE}{wrong}"
    if record["exit"] == 0:
        return FINISHED if record["folder"].is_dir() else "its folder is gone"
    said = str(record.get("error", ""))
    return said if said == "interrupted" else f"failed: {said}"


def write(sweep: Path, records: Sequence[Record]) -> None:
    """All four files, each whole or as it was before.

    Raises:
        OSError: one of them could not be written.
    """
    made, shown = groups(records), metrics(records)
    table = io.StringIO()
    rows = csv.writer(table)
    heads = [each for m in shown for each in (m, f"{m}_stderr", f"{m}_jobs")]
    rows.writerow([*(made[0].choices if made else ()), "jobs", "finished", *heads])
    for group in made:
        numbers = [n for m in shown for n in (group.mean(m), group.stderr(m), len(group.values[m]))]
        rows.writerow([*group.choices.values(), group.jobs, group.finished, *numbers])
    replace_text(sweep / "table.csv", table.getvalue())
    replace_text(sweep / "jobs.csv", _jobs(records))
    heads, body = _cells(made, shown)
    lines = [heads, ["---"] * len(heads), *body]
    said = [(each["number"], status(each)) for each in records]
    bad = [f"- job {number}: {' '.join(how.split())}" for number, how in said if how != FINISHED]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    replace_text(sweep / "table.md", "\n".join([text, *([""] if bad else []), *bad]) + "\n")
    if shown and any(group.finished for group in made):
        plot(sweep / "table.png", [group for group in made if group.finished], shown[0])


def plot(file: Path, made: Sequence[Group], metric: str) -> None:
    """Mean and standard error of every group, and its jobs as small dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.35 * len(made)), layout="constrained")
    axes = figure.add_subplot()
    for row, group in enumerate(made):
        values, mean = group.values[metric], group.mean(metric)
        axes.plot(values, [row] * len(values), ".", color="0.7", markersize=5)
        if mean is not None:
            axes.errorbar(mean, row, xerr=group.stderr(metric), fmt="o", color="C0", capsize=3)
    axes.set_yticks(range(len(made)), [_label(group) for group in made])
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric}: mean, standard error over seeds")
    axes.grid(axis="x", color="0.9")
    with replaced(file) as beside:
        figure.savefig(beside, dpi=120, format="png")


def show(sweep: Path, records: Sequence[Record], planned: int | None) -> None:
    """The table and what went wrong, on the screen."""
    made, shown = groups(records), metrics(records)
    heads, body = _cells(made, shown)
    chosen = len(made[0].choices)
    sheet = Table()
    for place, head in enumerate(heads):  # a narrow screen cuts no name
        sheet.add_column(head, no_wrap=place < chosen, overflow="fold")
    for line in body:
        sheet.add_row(*line)
    console = Console()
    console.print(sheet)
    same = set(records[0]["overrides"]).intersection(*(each["overrides"] for each in records))
    ends = [status(each) for each in records]
    for each, how in zip(records, ends, strict=True):
        if how != FINISHED:
            own = " ".join(word for word in each["overrides"] if word not in same)
            console.print(
                f"job {each['number']}{f' ({own})' if own else ''}: {how}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    without = sum(how.startswith(NOT_FINITE) for how in ends)
    print(
        f"{ends.count(FINISHED)} of {planned or len(records)} jobs finished"
        + f", {without} with a NLL that is not finite" * (without > 0)
        + f"; table.csv, .md{', .png' * (sweep / 'table.png').exists()} in {sweep}"
    )


def _cells(made: Sequence[Group], shown: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    heads = [*(made[0].choices if made else ()), "seeds", *shown]
    body = []
    for group in made:
        count = (
            str(group.jobs) if group.finished == group.jobs else f"{group.finished}/{group.jobs}"
        )
        cells = [group.cell(metric) for metric in shown]
        body.append([*group.choices.values(), count, *cells])
    return heads, body


def _jobs(records: Sequence[Record]) -> str:
    choices = [_choices(each) for each in records]
    keys = dict.fromkeys(key for each in choices for key in each)
    known = dict.fromkeys(key for each in records for key in each["results"])
    heads = ["number", "status", *keys, *(k for k in known if k not in keys)]
    table = io.StringIO()
    rows = csv.DictWriter(table, heads)
    rows.writeheader()
    for each, own in zip(records, choices, strict=True):
        said = {"number": each["number"], "status": status(each)}
        rows.writerow({**each["results"], **own, **said})
    return table.getvalue()


def _each_once(records: Sequence[Record]) -> list[Record]:
    """Of jobs that are the same one, the first that is finished, or the first."""
    kept: dict[tuple[tuple[str, str], ...], Record] = {}
    for each in records:
        before = kept.setdefault(key := tuple(sorted(_choices(each).items())), each)
        if status(before) != FINISHED and status(each) == FINISHED:
            kept[key] = each
    return list(kept.values())


def _choices(record: Record) -> dict[str, str]:
    pairs = (each.partition("=") for each in record["overrides"])
    return {key.lstrip("+"): value for key, _, value in pairs}


def _label(group: Group) -> str:
    return ", ".join(group.choices.values()) or "all"
