"""From hierarchy to diffusion: one trained VDM read at T steps.

    python benchmarks/steps_table.py run=<folder> [images=200] [sets=2] [strata=32]
        [checkpoint=best|last] [out=<folder>]

-ELBO of the first test images with vdm.at(steps=T), T = 1, 2, 5, 10, 100, 250, 1000 and in
continuous time: the same weights, images and keys of the random numbers, sets * strata draws an
image. Standard errors are of these draws, for these images. Kingma et al. (2021) have 7.54, 2.90,
2.74, 2.67, 2.65 bits/dim for T = 10, 100, 250, 1000, infinity on CIFAR-10.

Writes steps.csv, steps.md and steps.png to `out`, by default <run>/steps.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from ledger import at_least
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from trained import images, trained_vdm

from genfw import VDM, Bound, Estimator, Noise
from genfw.noise import mix
from genfw.train.metrics import NLL
from genfw.train.runs import command, read
from genfw.types import Image

STEPS = (1, 2, 5, 10, 100, 250, 1000, None)
COLUMNS = ("nll", "nll_stderr", "bpd", "bpd_stderr", "reconstruction", "levels", "prior")


def table(arguments: Sequence[str]) -> None:
    defaults = {"images": 200, "sets": 2, "strata": 32, "checkpoint": "best", "out": None}
    folder, config, options = read(arguments, defaults, (__doc__ or "").split("\n\n")[1])
    at_least(options, 1, "images", "strata")
    at_least(options, 2, "sets")  # or there is no variance to measure
    rows = []
    with trained_vdm(folder, config, options.checkpoint) as (model, module, data):
        x = images(data, "test", options.images)
        noise = Noise(mix(module.seed, "test"), torch.arange(len(x)))
        for row in readings(model, x, Bound(options.sets, options.strata), noise):
            rows.append(row)
            print(line(row), flush=True)
    out = Path(options.out or folder / "steps")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "steps.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("T", *COLUMNS), *rows])
    head = "| T | NLL, nats | bits/dim | reconstruction | denoising | prior |\n" + 6 * "|--:" + "|"
    (out / "steps.md").write_text("\n".join([head, *map(line, rows)]) + "\n")
    plot(rows).savefig(out / "steps.png")
    print(f"{len(x)} images, {options.sets * options.strata} draws each: {out}")


def readings(model: VDM, x: Image, estimator: Estimator, noise: Noise) -> Iterator[list]:
    """A row for each T, continuous time the last: T and COLUMNS."""
    for steps in STEPS:
        nll = NLL()
        nll.update(estimator(model.at(steps), x, noise=noise), x[0].numel())
        found = {name: float(value) for name, value in nll.compute().items()}
        found["bpd_stderr"] = found["nll_stderr"] * found["bpd"] / found["nll"]
        yield [steps or "inf", *(found[name] for name in COLUMNS)]


def line(row: Sequence) -> str:
    steps, nll, error, bpd, bpd_error, reconstruction, levels, prior = row
    return (
        f"| {steps} | {nll:.2f} ± {error:.2f} | {bpd:.4f} ± {bpd_error:.4f} "
        f"| {-reconstruction:.3f} | {levels:.2f} | {prior:.4f} |"
    )


def plot(rows: Sequence[Sequence]) -> Figure:
    """bits/dim against T, with two standard errors; the limit as a line."""
    figure = Figure(figsize=(5, 3.5), dpi=120, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    *finite, limit = rows
    steps, bits, errors = ([row[i] for row in finite] for i in (0, 3, 4))
    axes.errorbar(steps, bits, [2 * error for error in errors], fmt="o-", label="T steps")
    axes.axhline(limit[3], color="black", ls="--", label=f"continuous time: {limit[3]:.3f}")
    axes.set(xscale="log", yscale="log", xlabel="T", ylabel="bits/dim")
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(command(table))
