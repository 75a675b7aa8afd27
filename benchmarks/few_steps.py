"""How few calls of the network will do: Frechet distances against that of 1000 ancestral steps.

    python benchmarks/few_steps.py run=<folder> [sets=5] [samples=2000] [evaluations=[5,10,20,50]]
        [reference=1000] [grids=[uniform]] [samplers=null] [chunk=500] [device=cpu]
        [checkpoint=best|last] [out=<folder>]

`sets` disjoint sets of `samples` images each, in the run's own features and against its training
images; mean and standard error over sets. Set i holds the same sample numbers whatever the sampler,
so all start from the same z_1 and differences are taken set by set. The bar is DPM-Solver++ 2M
with 20 calls within 5 % or two standard errors (of the difference) of the reference. Samplers that
ask twice a step take half the steps; `euler` is `ddim` and left out. `grids` are where samplers
stop (the reference: even in t); the table shows every grid measured so far.

Every distance is written to few_steps.csv in `out` (by default <run>/few_steps) as it is there: a
second call goes on where the first stopped, and adds what it is asked for. few_steps.md and
few_steps.png are made of all that file holds for `samples` and `checkpoint`.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import genfw
from genfw import VDM, Ancestral, Sampler, TimeGrid
from genfw.noise import mix
from genfw.train.callbacks import Frechet
from genfw.train.errors import GenfwError
from genfw.train.frechet import FrechetDistance
from genfw.train.job import make_callbacks, prepare, restore
from genfw.train.pictures import draw_samples
from genfw.train.runs import command, read

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ancestral": Ancestral,
    "ddim": genfw.DDIM,
    "heun": genfw.Heun,
    "edm": genfw.Churn,
    "dpm_solver": genfw.DPMSolver,
    "dpm_solver_sde": genfw.DPMSolverSDE,
    "unipc": genfw.UniPC,
    "langevin": partial(genfw.Langevin, corrections=1, size=0.5),
    "predictor_corrector": partial(genfw.PredictorCorrector, corrections=1),
}
BAR = "dpm_solver", 20


class Row(NamedTuple):
    """What is measured: a sampler, where it stops, and how many calls it was allowed."""

    sampler: str
    grid: str
    evaluations: int

    def build(self) -> Sampler:
        make, grid = SAMPLERS[self.sampler], TimeGrid.registry[self.grid]()
        return make(steps=max(1, self.evaluations // make(steps=1).calls), grid=grid)


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
        "out": None,
    }
    folder, config, options = read(arguments, defaults, (__doc__ or "").split("\n\n")[1])
    wanted = list(options.samplers or SAMPLERS)
    if unknown := {*wanted} - {*SAMPLERS}:
        raise GenfwError(f"samplers: there is no {', '.join(unknown)}; there are {[*SAMPLERS]}")
    grids = list(options.grids or ["uniform"])
    if not {*grids} <= {*TimeGrid.registry}:
        raise GenfwError(f"grids={grids}: expected some of {', '.join(TimeGrid.registry)}")
    prepare()
    module, data = restore(config, folder / "checkpoints" / f"{options.checkpoint}.ckpt")
    module.to(options.device)
    distance = opened(config)
    train = data.split("train")  # pyright: ignore
    distance.to(module.device).reference(train.images, "train", train.hash)

    out = Path(options.out or folder / "few_steps")
    out.mkdir(parents=True, exist_ok=True)
    file, kept = out / "few_steps.csv", (str(options.samples), options.checkpoint)
    found = measured(file, kept)
    reference = Row("ancestral", "uniform", options.reference)
    calls = options.evaluations or (5, 10, 20, 50)
    rows = [Row(s, g, e) for e in calls for g in grids for s in wanted]
    with module.evaluating() as model:
        if not isinstance(model, VDM):
            raise GenfwError(f"run={folder}: expected a VDM, got {type(model).__name__}")
        for row in (reference, *rows):
            model.sampler = row.build()
            for i in range(options.sets):
                if i in found.get(row, {}):
                    continue
                start = time.perf_counter()
                numbers = range(i * options.samples, (i + 1) * options.samples)
                images = draw_samples(model, numbers, mix(module.seed, "few_steps"), options.chunk)
                distance.reset()
                distance.update(images)
                value, seconds = distance.compute(), time.perf_counter() - start
                found.setdefault(row, {})[i] = value
                with file.open("a", newline="") as lines:
                    csv.writer(lines).writerow([*row, i, value, f"{seconds:.1f}", *kept])
                said = f"{row.sampler} ({row.grid}), {model.sampler.evaluations} calls"
                print(f"{said}, set {i}: {value:.3f} in {seconds:.0f} s", flush=True)
            print(f"  {summary(found[row].values())}", flush=True)
    name = f"{distance.key} of {options.samples} samples"
    (out / "few_steps.md").write_text(table(found, reference, name))
    plot(found, reference, name).savefig(out / "few_steps.png")
    print((out / "few_steps.md").read_text())
    print(f"{torch.get_num_threads()} threads, {module.device}: {out}")


def opened(config: object) -> FrechetDistance:
    """The distance that the run itself reports."""
    for one in make_callbacks(config):  # pyright: ignore[reportArgumentType]
        if isinstance(one, Frechet) and one.distance is not None:
            return one.distance
    raise GenfwError("the run measured no Frechet distance: its metrics name no extractor")


def measured(file: Path, kept: tuple[str, str]) -> Distances:
    """What the file holds for this number of samples and checkpoint."""
    found: Distances = {}
    if file.is_file():
        with file.open(newline="") as lines:
            for sampler, grid, evaluations, i, value, _, *of in csv.reader(lines):
                if tuple(of) == kept:
                    row = Row(sampler, grid, int(evaluations))
                    found.setdefault(row, {})[int(i)] = float(value)
    return found


def mean(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard error (nan for one)."""
    drawn = torch.tensor(list(values), dtype=torch.float64)
    error = drawn.std() / len(drawn) ** 0.5 if len(drawn) > 1 else torch.tensor(float("nan"))
    return float(drawn.mean()), float(error)


def summary(values: Iterable[float]) -> str:
    return "{:.3f} ± {:.3f}".format(*mean(values))


def verdict(found: Distances, reference: Row, row: Row) -> str:
    """The bar: within 5 %, or two standard errors of the difference set by set."""
    common = sorted({*found[row]} & {*found[reference]})
    base, _ = mean(found[reference][i] for i in common)
    more, error = mean(found[row][i] - found[reference][i] for i in common)
    holds = more <= 0.05 * base or more <= 2 * error
    said = f"{100 * more / base:+.1f} %, {more:+.3f} ± {error:.3f} over {len(common)} sets"
    name = f"{row.sampler} ({row.grid}) with {row.evaluations} calls"
    return f"{name} against {reference.evaluations} ancestral steps: {said}: " + (
        "within the bar" if holds else "OUTSIDE the bar"
    )


def table(found: Distances, reference: Row, name: str) -> str:
    """Markdown: a line per sampler and grid, a column per number of calls, and the verdicts."""
    columns = sorted({row.evaluations for row in found if row != reference})
    lines = [
        f"{name}; {reference.evaluations} ancestral steps: {summary(found[reference].values())}.",
        "",
        "| sampler | grid | " + " | ".join(f"{e} calls" for e in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for sampler, grid in dict.fromkeys(row[:2] for row in found if row != reference):
        cells = [found.get(Row(sampler, grid, e), {}) for e in columns]
        said = " | ".join(summary(cell.values()) if cell else "" for cell in cells)
        lines.append(f"| {sampler} | {grid} | {said} |")
    judged = [row for row in found if (row.sampler, row.evaluations) == BAR]
    lines += ["", *(f"{verdict(found, reference, row)}.\n" for row in judged)]
    return "\n".join(lines)


def plot(found: Distances, reference: Row, name: str) -> Figure:
    """Distance against calls, one panel per grid, with two standard errors; the reference as a
    band."""
    grids = list(dict.fromkeys(row.grid for row in found if row != reference))
    figure = Figure(figsize=(1 + 4 * len(grids), 3.8), dpi=100, layout="constrained")
    panels = FigureCanvasAgg(figure).figure.subplots(1, len(grids), sharey=True, squeeze=False)[0]
    level, error = mean(found[reference].values())
    for axes, grid in zip(panels, grids):
        axes.axhspan(level - 2 * error, level + 2 * error, color="0.85")
        axes.axhline(level, color="black", ls="--", label=f"{reference.evaluations} ancestral")
        for sampler in dict.fromkeys(row.sampler for row in found):
            rows = sorted(r for r in found if r[:2] == (sampler, grid) and r != reference)
            if rows:
                values, errors = zip(*(mean(found[row].values()) for row in rows))
                calls = [row.evaluations for row in rows]
                axes.errorbar(calls, values, [2 * e for e in errors], fmt="o-", ms=3, label=sampler)
        axes.set(xscale="log", yscale="log", xlabel="calls of the network", title=f"grid: {grid}")
    panels[0].set_ylabel(name)
    panels[-1].legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(command(few_steps))
