"""What guidance buys and what it costs: accuracy and Frechet distances against scale.

    python benchmarks/guidance_curve.py run=<folder> [classifier=<folder>] [scales=[1,2,3,5,7.5]]
        [sampler=dpm_solver sampler.steps=20] [sets=3] [samples=500] [chunk=250] [device=cpu]
        [checkpoint=best|last] [out=<folder>]

Without a classifier, `guidance=classifier_free` of a conditional run; with one (the folder of a
`python -m genfw.classifier`), `guidance=classifier` of any run that can do without labels. Other
settings of guidance as in `genfw.sample`: guidance.interval=[-3,3].

`sets` disjoint sets of `samples` images each, classes in turn; mean and standard error over sets.
Set i holds the same sample numbers at every scale, so all scales start from the same z_1. Distances
are in the run's own features, from its training images: all classes together, and the mean over
classes of the distance of a class from its own images. Distances of few images are too large:
compare those of equal numbers only.

Every set is written to guidance_curve.csv in `out` (by default <run>/guidance_curve) as it is
there: a second call goes on where the first stopped. guidance_curve.md and guidance_curve.png are
made of all that file holds for `samples`: give two runs one `out` to see them side by side.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from genfw import VDM
from genfw.noise import mix
from genfw.train.callbacks import Frechet
from genfw.train.control import Control, Controlled
from genfw.train.errors import GenfwError
from genfw.train.frechet import FrechetDistance
from genfw.train.job import make_callbacks, prepare, restore
from genfw.train.pictures import draw_samples
from genfw.train.runs import command, read

DEFAULTS = {
    "scales": None,
    "sets": 3,
    "samples": 500,
    "chunk": 250,
    "device": "cpu",
    "checkpoint": "best",
    "out": None,
}


class Row(NamedTuple):
    """What is measured: how a run is guided, and how far."""

    run: str
    guidance: str
    sampler: str
    scale: float


Curve = dict[Row, dict[int, Controlled]]
"""Of each row, {set: what was measured}."""


def guidance_curve(arguments: Sequence[str]) -> None:
    folder, config, options = read(asked(arguments), DEFAULTS, (__doc__ or "").split("\n\n")[1])
    prepare()
    checkpoint = folder / "checkpoints" / f"{options.checkpoint}.ckpt"
    module, data = restore(config, checkpoint)
    module.to(options.device)
    control = Control(opened(config).to(module.device), config.data.classes)
    train = data.split("train")  # pyright: ignore
    control.reference(train.images, train.labels, "train", train.hash)

    out = Path(options.out or folder / "guidance_curve")
    out.mkdir(parents=True, exist_ok=True)
    file, kept = out / "guidance_curve.csv", str(options.samples)
    found = measured(file, kept)
    with module.evaluating() as model:
        if not isinstance(model, VDM):
            raise GenfwError(f"run={folder}: expected a VDM, got {type(model).__name__}")
        unscaled, sampler = model.guidance, f"{model.sampler.name}({model.sampler.extra_repr()})"
        for scale in map(float, options.scales or (1, 2, 3, 5, 7.5)):
            model.guidance = partial(unscaled, scale=scale)  # pyright: ignore[reportCallIssue]
            row = Row(f"{folder.name} ({options.checkpoint})", model.guided().name, sampler, scale)
            for i in range(options.sets):
                if i in found.get(row, {}):
                    continue
                start = time.perf_counter()
                numbers = range(i * options.samples, (i + 1) * options.samples)
                labels = [n % config.data.classes for n in numbers]
                seed = mix(module.seed, "guidance_curve")
                images = draw_samples(model, numbers, seed, options.chunk, labels)
                value = control(images, torch.tensor(labels))
                found.setdefault(row, {})[i] = value
                write(file, [*row, i, kept, value.accuracy, value.distance, *value.per_class])
                seconds = time.perf_counter() - start
                print(f"{row.guidance} {scale:g}, set {i}: {said([value])}, {seconds:.0f} s")
            print(f"  {said(found[row].values())}", flush=True)
    name = f"{control.distance.key} of {options.samples} samples"
    (out / "guidance_curve.md").write_text(table(found, name))
    plot(found, name).savefig(out / "guidance_curve.png")
    print((out / "guidance_curve.md").read_text())
    print(f"{torch.get_num_threads()} threads, {module.device}: {out}")


def asked(arguments: Sequence[str]) -> list[str]:
    """`classifier=<folder>`, or its absence, as a choice of guidance; a fast sampler where none is
    chosen."""
    given = [each for each in arguments if not each.startswith("classifier=")]
    folders = [each.partition("=")[2] for each in arguments if each.startswith("classifier=")]
    if not any(each.startswith("guidance=") for each in given):
        given.append("guidance=classifier" if folders else "guidance=classifier_free")
    if not any(each.startswith("sampler=") for each in given):
        given.append("sampler=dpm_solver")
        if not any(each.startswith("sampler.steps=") for each in given):
            given.append("sampler.steps=20")
    return [*given, *(f"guidance.classifier={folder}" for folder in folders)]


def opened(config: object) -> FrechetDistance:
    """The distance that the run itself reports."""
    for one in make_callbacks(config):  # pyright: ignore[reportArgumentType]
        if isinstance(one, Frechet) and one.distance is not None:
            return one.distance
    raise GenfwError("the run measured no Frechet distance: its metrics name no extractor")


def write(file: Path, line: list[object]) -> None:
    with file.open("a", newline="") as lines:
        csv.writer(lines).writerow(line)


def measured(file: Path, kept: str) -> Curve:
    """What the file holds for this number of samples."""
    found: Curve = {}
    if file.is_file():
        with file.open(newline="") as lines:
            for *row, scale, i, samples, accuracy, distance, in_all in map(
                _split, csv.reader(lines)
            ):
                if samples == kept:
                    value = Controlled(float(accuracy), float(distance), tuple(map(float, in_all)))
                    found.setdefault(Row(*row, float(scale)), {})[int(i)] = value
    return found


def _split(line: list[str]) -> list:
    return [*line[:8], line[8:]]


def mean(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard error (nan for one)."""
    drawn = torch.tensor(list(values), dtype=torch.float64)
    error = drawn.std() / len(drawn) ** 0.5 if len(drawn) > 1 else torch.tensor(float("nan"))
    return float(drawn.mean()), float(error)


MEASURES = {
    "accuracy, %": lambda value: 100 * value.accuracy,
    "{name}": lambda value: value.distance,
    "{name}, of a class": lambda value: value.within_class,
}


def cells(values: Iterable[Controlled]) -> list[tuple[float, float]]:
    """Mean and standard error of each measure."""
    values = list(values)
    return [mean(map(measure, values)) for measure in MEASURES.values()]


def said(values: Iterable[Controlled]) -> str:
    shown = ["{:.2f} ± {:.2f}".format(*each) for each in cells(values)]
    return "accuracy {} %, distance {}, of a class {}".format(*shown)


def table(found: Curve, name: str) -> str:
    """Markdown: a line per run, guidance, sampler and scale."""
    heads = [head.format(name=name) for head in MEASURES]
    lines = [
        "| run | guidance | sampler | scale | " + " | ".join(heads) + " | sets |",
        "|---|---|---|---|" + "---|" * len(heads) + "---|",
    ]
    for row in sorted(found):
        shown = ["{:.2f} ± {:.2f}".format(*each) for each in cells(found[row].values())]
        first = f"{row.run} | {row.guidance} | {row.sampler} | {row.scale:g}"
        lines.append(f"| {first} | {' | '.join(shown)} | {len(found[row])} |")
    return "\n".join(lines) + "\n"


def plot(found: Curve, name: str) -> Figure:
    """A panel per measure, a line per run and guidance, with two standard errors."""
    figure = Figure(figsize=(4 * len(MEASURES), 3.6), dpi=100, layout="constrained")
    panels = FigureCanvasAgg(figure).figure.subplots(1, len(MEASURES))
    for i, (axes, head) in enumerate(zip(panels, MEASURES)):
        for line in dict.fromkeys(row[:3] for row in sorted(found)):
            rows = sorted(row for row in found if row[:3] == line)
            values, errors = zip(*(cells(found[row].values())[i] for row in rows))
            label = f"{line[1]}, {line[0]}"
            scales = [row.scale for row in rows]
            axes.errorbar(scales, values, [2 * e for e in errors], fmt="o-", ms=3, label=label)
        axes.set(xlabel="scale w", title=head.format(name=name))
    panels[0].legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(command(guidance_curve))
