"""How few calls of the network will do: Frechet distances against that of 1000 ancestral steps.

    python benchmarks/few_steps.py run=<folder> [sets=5] [samples=2000] [evaluations=[10,20,50]]
        [reference=1000] [grids=[uniform]] [samplers=null] [chunk=500] [device=cpu]
        [checkpoint=best|last] [guidance=...] [against=guided|plain] [out=<folder>]

`sets` disjoint sets of `samples` images each, in the run's own features and against its training
images; mean and standard error over sets. Set i holds the same sample numbers whatever the sampler,
so all start from the same z_1 and differences are taken set by set. The bar is DPM-Solver++ 2M
with 20 calls within 5 % or two standard errors (of the difference) of the reference. Samplers that
ask twice a step take half the steps; `euler` is `ddim` and left out. `grids` are where samplers
stop (the reference: even in t). Guidance steers all of them, and with against=plain all but the
reference, which is what guidance that mends a sampler is measured by.

Every distance is written to few_steps.jsonl in `out` (by default <run>/few_steps) as it is there,
with all that it depends on: a second call goes on where the first stopped, and never takes what was
measured of other weights, guidance, seed or sampler. few_steps.md and few_steps.png are made anew
after every sampler, of all that the file holds for this model, seed and `samples`, under this
guidance or that of the reference.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ledger import (
    Ledger,
    at_least,
    commits,
    extracted,
    listed,
    mean,
    origin,
    setting,
    simple,
    titled,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig
from trained import trained_vdm

import genfw
from genfw import VDM, Ancestral, Sampler, TimeGrid, Unguided
from genfw.diffusion.guidance import ByClassifier
from genfw.noise import mix
from genfw.train.errors import ConfigError
from genfw.train.frechet import FrechetDistance
from genfw.train.pictures import draw_samples
from genfw.train.runs import command, read

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "dpm_solver": genfw.DPMSolver,
    "unipc": genfw.UniPC,
    "ddim": genfw.DDIM,
    "heun": genfw.Heun,
    "edm": genfw.Churn,
    "ancestral": Ancestral,
    "dpm_solver_sde": genfw.DPMSolverSDE,
    "langevin": partial(genfw.Langevin, corrections=1, size=0.5),
    "predictor_corrector": partial(genfw.PredictorCorrector, corrections=1),
}
BAR = "dpm_solver", "uniform", 20
UNDER = ", under "
PATIENCE = 10
"""Seconds that a chunk may take before it is worth a line."""


class Row(NamedTuple):
    """A sampler with its settings and guidance, where it stops, and how often it calls the
    network."""

    sampler: str
    grid: str
    calls: int

    @classmethod
    def of(cls, setting: Mapping[str, Any]) -> Row:
        """Of a ledger's setting."""
        sampler = setting["sampler"]
        name = titled(sampler, "steps", "calls", "remembers", "grid")
        guidance = titled(setting["guidance"], "denoiser")
        guided = UNDER + guidance if guidance != "none" else ""
        return cls(name + guided, titled(sampler["grid"]), setting["calls"])


Distances = dict[Row, dict[int, float]]
"""Of each row, {set: distance}."""


def few_steps(arguments: Sequence[str]) -> None:
    defaults = {
        "sets": 5,
        "samples": 2000,
        "evaluations": None,
        "reference": 1000,
        "grids": None,
        "samplers": None,
        "chunk": 500,
        "device": "cpu",
        "checkpoint": "best",
        "against": "guided",
        "out": None,
    }
    usage = (__doc__ or "").split("\n\n")[1]
    folder, config, options = read(arguments, defaults, usage, keeps=_listed_instead)
    at_least(options, 1, "sets", "samples", "reference", "chunk")
    wanted = listed(options, "samplers", list(SAMPLERS))
    grids = listed(options, "grids", ["uniform"])
    calls = listed(options, "evaluations", (10, 20, 50))
    for key, given, known in (("samplers", wanted, SAMPLERS), ("grids", grids, TimeGrid.registry)):
        if unknown := {*given} - {*known}:
            raise ConfigError(f"{key}: there is no {', '.join(unknown)}; there are {[*known]}")
    if options.against not in ("guided", "plain"):
        raise ConfigError(f"against={options.against}: expected guided or plain")
    out = Path(options.out or folder / "few_steps")
    base = "ancestral", "uniform", options.reference
    rows = [base, BAR, *((s, g, e) for e in calls for g in grids for s in wanted)]
    with trained_vdm(folder, config, options.checkpoint, options.device) as (model, module, data):
        ledger = Ledger(out / "few_steps.jsonl")
        distance = extracted(config)
        train = data.split("train")  # pyright: ignore
        distance.to(module.device).reference(train.images, "train", train.hash)
        if isinstance(model.guided(), ByClassifier) and model.classes is None:
            raise ConfigError(
                "guidance: these samples have no labels to guide to; see guidance_curve.py"
            )
        title = f"{distance.key} of {options.samples} samples"
        about = origin(folder, config, model, options.checkpoint)
        print(about, f"{title}, seed {module.seed}", sep="\n", flush=True)
        guide, reference = model.guidance, None
        model.guidance = Unguided if options.against == "plain" else guide
        for sampler, grid, evaluations in rows:
            model.sampler = made(sampler, grid, evaluations)
            here = simple(setting(model, distance, train, module.seed, options.samples))
            row, seed = Row.of(here), mix(module.seed, "few_steps")
            for i in sorted({*range(options.sets)} - {*ledger.of(here)}):
                start = time.perf_counter()
                value = measured(model, distance, seed, i, options)
                seconds = round(time.perf_counter() - start, 1)
                ledger.add(here, i, value=value, seconds=seconds, run=folder.name)
                print(f"{said(row)}, set {i}: {value:.3f} in {seconds:.0f} s", flush=True)
            model.guidance = guide
            reference = reference or here
            found = report(
                comparable(ledger, here, reference), Row.of(reference), about, title, out
            )
            print(f"{said(row)}: {summary(found[row].values())}", flush=True)
    print((out / "few_steps.md").read_text())
    print(f"{torch.get_num_threads()} threads, {module.device}: {out}")


def comparable(
    ledger: Ledger, here: dict[str, Any], reference: dict[str, Any]
) -> list[dict[str, Any]]:
    """The lines of this model under this guidance, and under that of the reference."""
    steered = here["guidance"], reference["guidance"]
    lines = ledger.like(here, "sampler", "calls", "guidance")
    return [line for line in lines if line["setting"]["guidance"] in steered]


def made(name: str, grid: str, evaluations: int) -> Sampler:
    """The sampler with so many calls, or as many as its steps allow."""
    build = SAMPLERS[name]
    steps = max(1, evaluations // build(steps=1).calls)
    return build(steps=steps, grid=TimeGrid.registry[grid]())


def measured(
    model: VDM, distance: FrechetDistance, seed: int, i: int, options: DictConfig
) -> float:
    """The distance of set i."""
    distance.reset()
    numbers = range(i * options.samples, (i + 1) * options.samples)
    last = time.perf_counter()
    for k in range(0, len(numbers), options.chunk):
        some = numbers[k : k + options.chunk]
        distance.update(draw_samples(model, some, seed, options.chunk))
        if time.perf_counter() - last > PATIENCE:
            done, last = k + len(some), time.perf_counter()
            print(f"  set {i}: {done} of {len(numbers)} samples", flush=True)
    return distance.compute()


def report(
    lines: Sequence[Mapping[str, Any]], base: Row, about: str, title: str, out: Path
) -> Distances:
    """Table and picture of what a ledger holds, into `out`."""
    found: Distances = {}
    for line in lines:
        found.setdefault(Row.of(line["setting"]), {})[line["set"]] = line["value"]
    text = table(found, base, title)
    (out / "few_steps.md").write_text(f"{about}. genfw {commits(lines)}.\n\n{text}")
    plot(found, base, title).savefig(out / "few_steps.png")
    return found


def _listed_instead(key: str) -> str | None:
    sampler = key.partition(".")[0] in ("sampler", "grid")
    return "here it is samplers=[ddim] and grids=[karras]" if sampler else None


def said(row: Row) -> str:
    return f"{row.sampler}, {row.grid}, {row.calls} calls"


def summary(values: Iterable[float]) -> str:
    return "{:.3f} ± {:.3f}".format(*mean(values))


def verdict(found: Distances, reference: Row, row: Row) -> str:
    """The bar: within 5 %, or two standard errors of the difference set by set."""
    common = sorted({*found[row]} & {*found[reference]})
    base, _ = mean(found[reference][i] for i in common)
    more, error = mean(found[row][i] - found[reference][i] for i in common)
    holds = more <= 0.05 * base or more <= 2 * error
    return (
        f"{said(row)} against {said(reference)}: {100 * more / base:+.1f} %, "
        f"{more:+.3f} ± {error:.3f} over {len(common)} sets: "
        f"{'within' if holds else 'OUTSIDE'} the bar (5 % or two standard errors)"
    )


def table(found: Distances, reference: Row, name: str) -> str:
    """Markdown: a line per sampler and grid, a column per number of calls, and the verdicts."""
    columns = sorted({row.calls for row in found if row != reference})
    base = found[reference]
    lines = [
        f"{name}; {said(reference)}: {summary(base.values())} ({len(base)} sets).",
        "",
        "| sampler | grid | " + " | ".join(f"{e} calls" for e in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for sampler, grid in dict.fromkeys(row[:2] for row in found if row != reference):
        cells = [found.get(Row(sampler, grid, e), {}) for e in columns]
        shown = [summary(cell.values()) if cell else "" for cell in cells]
        fewer = [f" ({len(cell)} sets)" * (0 < len(cell) != len(base)) for cell in cells]
        lines.append(f"| {sampler} | {grid} | {' | '.join(map(str.__add__, shown, fewer))} |")
    judged = [row for row in found if (row.sampler.partition(UNDER)[0], row.calls) == BAR[::2]]
    lines += ["", *(f"{verdict(found, reference, row)}.\n" for row in judged)]
    return "\n".join(lines)


def plot(found: Distances, reference: Row, name: str) -> Figure:
    """Distance against calls, one panel per grid, with two standard errors; the reference as a
    band, and the bar of 5 % above it."""
    grids = list(dict.fromkeys(row.grid for row in found if row != reference)) or [reference.grid]
    names = list(dict.fromkeys(row.sampler for row in found))
    size = max(6, 4.5 * len(grids)), 3.4 + 0.1 * len(names)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    panels = FigureCanvasAgg(figure).figure.subplots(1, len(grids), sharey=True, squeeze=False)[0]
    level, error = mean(found[reference].values())
    colors = {each: f"C{i}" for i, each in enumerate(names)}
    for axes, grid in zip(panels, grids):
        axes.axhspan(level - 2 * error, level + 2 * error, color="0.85")
        axes.axhline(level, color="black", ls="--", label=said(reference))
        axes.axhline(1.05 * level, color="black", ls=":", label="5 % more")
        for sampler, color in colors.items():
            rows = sorted(r for r in found if r[:2] == (sampler, grid) and r != reference)
            if rows:
                values, errors = zip(*(mean(found[row].values()) for row in rows))
                calls = [row.calls for row in rows]
                twice = [2 * e for e in errors]
                axes.errorbar(calls, values, twice, fmt="o-", ms=3, color=color, label=sampler)
        axes.set(xscale="log", yscale="log", xlabel="calls of the network", title=f"grid: {grid}")
        stops = sorted({row.calls for row in found if row != reference})
        axes.set_xticks(stops, map(str, stops))
        axes.xaxis.set_minor_formatter("")
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter("{x:g}")
    panels[0].set_ylabel(name)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=6)  # pyright: ignore
    return figure


if __name__ == "__main__":
    sys.exit(command(few_steps))
