"""How many draws an image needs until its bits/dim is sure to 0.005: two choices of times.

    python benchmarks/evaluation_draws.py run=<folder> [images=64] [sets=16] [strata=64]
        [target=0.005] [checkpoint=best|last]

A draw is a whole bound: one z_0, one time, one call of the network. Four choices of the times of
an image: uniform in t along the run's schedule or uniform in log SNR, each independent or
stratified over the draws (t = (u + j / m) mod 1). Evaluation takes the last one. `draws` is the
number for a standard error of `target`, from the variance between `sets` sets of `strata` draws:
variance x draws / target^2, a mean over images. That product does not grow with the size of a
stratified set, so beyond `strata` draws the number is, if anything, too large. After ± standard
errors over images.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

import torch
from ledger import at_least
from torch import Tensor
from trained import images, trained_vdm

from genfw import VDM, Noise, UniformLogSNR, UniformTime
from genfw.diffusion.times import TimeSampler
from genfw.train.runs import command, read

DEFAULTS = {"images": 64, "sets": 16, "strata": 64, "target": 0.005, "checkpoint": "best"}


def mean_of_set(vdm: VDM, x: Tensor, noise: Noise, strata: int, stratified: bool) -> Tensor:
    """(b,) nats: the mean of the bound over one set of draws."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for j in range(strata):
        one = noise.stratified(j, strata) if stratified else noise.fold("draw", j)
        total += vdm.elbo(x, noise=one).total.double()
    return total / strata


def variance(
    vdm: VDM, x: Tensor, times: TimeSampler, sets: int, strata: int, stratified: bool
) -> tuple[Tensor, Tensor]:
    """(b,) each: the mean, and the variance of a set's mean times its size, nats^2."""
    read = VDM(vdm.denoiser, vdm.likelihood, shape=vdm.shape, times=times)
    noise = Noise(0, torch.arange(len(x)))
    means = torch.stack(
        [mean_of_set(read, x, noise.fold("set", r), strata, stratified) for r in range(sets)]
    )
    return means.mean(0), means.var(0) * strata


def compare(vdm: VDM, x: Tensor, sets: int, strata: int, target: float) -> None:
    nats = target * x[0].numel() * math.log(2)
    print(f"{len(x)} images, {sets} sets of {strata} draws, target {target} bits/dim\n")
    print("| times | bound, nats | variance of a draw, nats^2 | draws | seconds |")
    print("|---|--:|--:|--:|--:|")
    needed: list[float] = []
    for name, times in (("t", UniformTime()), ("log SNR", UniformLogSNR())):
        for stratified in (False, True):
            start = time.perf_counter()
            mean, each = variance(vdm, x, times, sets, strata, stratified)
            error = each.std().item() / math.sqrt(len(x))
            draws = each.mean().item() / nats**2
            needed.append(draws)
            how = "stratified" if stratified else "independent"
            print(
                f"| {name}, {how} | {mean.mean():.4f} | {each.mean():.4g} ± {error:.2g} "
                f"| {draws:.0f} ± {error / nats**2:.0f} | {time.perf_counter() - start:.1f} |",
                flush=True,
            )
    ratio = needed[-1] / needed[0]
    print(f"\n{'ok    ' if ratio <= 0.25 else 'MISSED'}  {ratio:.3f} of the draws, target 0.25")


def main(arguments: Sequence[str]) -> None:
    folder, config, options = read(arguments, DEFAULTS, (__doc__ or "").split("\n\n")[1])
    at_least(options, 1, "images", "strata")
    at_least(options, 2, "sets")
    with trained_vdm(folder, config, options.checkpoint) as (model, _, data):
        x = images(data, "test", options.images)
        compare(model, x, options.sets, options.strata, options.target)


if __name__ == "__main__":
    sys.exit(command(main))
