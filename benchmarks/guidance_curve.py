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

Every set is written to guidance_curve.jsonl in `out` (by default <run>/guidance_curve) as it is
there, with all that it depends on: a second call goes on where the first stopped, and never takes
what was measured of other weights, guidance, sampler or seed. guidance_curve.md and
guidance_curve.png are made of all that the file holds for `samples` in these features: give two
runs one `out` to see them side by side.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ledger import Ledger, at_least, commits, extracted, listed, mean, origin, setting, titled
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from trained import trained_vdm

from genfw.diffusion.guidance import Scaled
from genfw.noise import mix
from genfw.train.control import Control, Controlled
from genfw.train.errors import ConfigError
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

ONE_TABLE = {"samples", "extractor", "reference", "device"}
"""What all lines of a table have in common; of the rest its columns tell."""


class Row(NamedTuple):
    """What is measured: a run, how it is guided and sampled, and how far."""

    run: str
    guidance: str
    sampler: str
    scale: float

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Row:
        """Of a ledger's line; hashes tell apart what has no name of its own."""
        setting = line["setting"]
        run = f"{line['run']}, seed {setting['seed']}, {setting['model']}"
        guidance = titled(setting["guidance"], "scale")
        return cls(run, guidance, titled(setting["sampler"]), setting["guidance"]["scale"])


Curve = dict[Row, dict[int, Controlled]]
"""Of each row, {set: what was measured}."""


def guidance_curve(arguments: Sequence[str]) -> None:
    folder, config, options = read(asked(arguments), DEFAULTS, (__doc__ or "").split("\n\n")[1])
    at_least(options, 1, "sets", "samples", "chunk")
    scales = listed(options, "scales", (1.0, 2.0, 3.0, 5.0, 7.5))
    out = Path(options.out or folder / "guidance_curve")
    with trained_vdm(folder, config, options.checkpoint, options.device) as (model, module, data):
        ledger = Ledger(out / "guidance_curve.jsonl")
        control = Control(extracted(config).to(module.device), config.data.classes)
        train = data.split("train")  # pyright: ignore
        control.reference(train.images, train.labels, "train", train.hash)
        print(about := origin(folder, config, model, options.checkpoint), flush=True)
        unscaled, name = model.guidance, f"{folder.name}, {options.checkpoint}"
        if not isinstance(model.guided(), Scaled):
            raise ConfigError(f"guidance={model.guided().name}: it has no scale to measure")
        for scale in map(float, scales):
            model.guidance = partial(unscaled, scale=scale)  # pyright: ignore[reportCallIssue]
            here = setting(model, control.distance, train, module.seed, options.samples)
            words = f"{titled(here['guidance'], 'scale')}, scale {scale:g}"
            for i in range(options.sets):
                if i in ledger.of(here):
                    continue
                start = time.perf_counter()
                numbers = range(i * options.samples, (i + 1) * options.samples)
                labels = [n % config.data.classes for n in numbers]
                seed = mix(module.seed, "guidance_curve")
                images = draw_samples(model, numbers, seed, options.chunk, labels)
                value = control(images, torch.tensor(labels))
                seconds = round(time.perf_counter() - start, 1)
                facts = {"seconds": seconds, "run": name, "about": about}
                ledger.add(here, i, value=asdict(value), **facts)
                print(f"{words}, set {i}: {said([value])}, {seconds:.0f} s", flush=True)
            print(f"{words}: {said(map(controlled, ledger.of(here).values()))}", flush=True)
            lines = ledger.like(here, *({*here} - ONE_TABLE))
            found, title = curve(lines), f"{control.distance.key} of {options.samples} samples"
            (out / "guidance_curve.md").write_text(f"{origins(lines)}\n\n{table(found, title)}")
            plot(found, title).savefig(out / "guidance_curve.png")
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


def curve(lines: Iterable[Mapping[str, Any]]) -> Curve:
    """The measurements of a ledger's lines; a run is called as it was called last."""
    lines, found = list(lines), {}
    names = {line["setting"]["model"]: line["run"] for line in lines}
    for line in lines:
        row = Row.of({**line, "run": names[line["setting"]["model"]]})
        found.setdefault(row, {})[line["set"]] = controlled(line)
    return found


def controlled(line: Mapping[str, Any]) -> Controlled:
    value = line["value"]
    return Controlled(value["accuracy"], value["distance"], tuple(value["per_class"]))


def origins(lines: Iterable[Mapping[str, Any]]) -> str:
    """Which models they are of, and which commits measured them."""
    lines = list(lines)
    return "\n".join(
        [*dict.fromkeys(f"* {line['about']}" for line in lines), f"* genfw {commits(lines)}"]
    )


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
    written = ["{:.2f} ± {:.2f}".format(*each) for each in cells(values)]
    return "accuracy {} %, distance {}, of a class {}".format(*written)


def table(found: Curve, name: str) -> str:
    """Markdown: a line per run, guidance, sampler and scale."""
    heads = [head.format(name=name) for head in MEASURES]
    lines = [
        "| run | guidance | sampler | scale | " + " | ".join(heads) + " | sets |",
        "|---|---|---|---|" + "---|" * len(heads) + "---|",
    ]
    for row in sorted(found):
        written = ["{:.2f} ± {:.2f}".format(*each) for each in cells(found[row].values())]
        first = f"{row.run} | {row.guidance} | {row.sampler} | {row.scale:g}"
        lines.append(f"| {first} | {' | '.join(written)} | {len(found[row])} |")
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
    handles = panels[0].get_legend_handles_labels()
    where = "outside lower left"
    figure.legend(*handles, loc=where, frameon=False, fontsize=7)  # pyright: ignore
    return figure


if __name__ == "__main__":
    sys.exit(command(guidance_curve))
