"""Which form of the diffusion bound has the smaller variance, at equal calls of the network.

    python benchmarks/bound_forms.py [run=<folder>] [steps=[8,32,128]] [images=64] [repeats=16]
        [checkpoint=best|last]

Without a run: the exact denoiser of Gaussian data in 3 dimensions. Every row spends T calls of the
denoiser on an image:

independent   Luo (58) at T random steps, each with noise of its own
stratified    Luo (58) at each of the T steps, each with noise of its own
on a chain    Luo (58) at each of the T steps of one sampled chain
log ratio     the consistency form, log q(z_t|z_{t-1}) - log p(z_t|z_{t+1}), on the same chain

All four have one mean. Variances are of one such number for one image, over draws, averaged over
images; the rate is all but the reconstruction. After each ± its standard error over images.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch
from exact import MEAN, STD, exact
from omegaconf import OmegaConf
from torch import Tensor
from trained import images, trained_vdm

from genfw import (
    VDM,
    GaussianLikelihood,
    LogLinear,
    Noise,
    marginal,
    posterior,
)
from genfw.train.runs import command, read

DEFAULTS = {
    "steps": OmegaConf.create([8, 32, 128]),
    "images": 64,
    "repeats": 16,
    "checkpoint": "best",
}
Terms = tuple[Tensor, Tensor]


def independent(vdm: VDM, x: Tensor, noise: Noise) -> Terms:
    return averaged(vdm, x, [noise.fold("draw", j) for j in range(vdm.levels - 1)])


def stratified(vdm: VDM, x: Tensor, noise: Noise) -> Terms:
    return averaged(vdm, x, [noise.stratified(j, vdm.levels - 1) for j in range(vdm.levels - 1)])


def averaged(vdm: VDM, x: Tensor, draws: Sequence[Noise]) -> Terms:
    """Total and rate of Luo (58), means over draws; one reconstruction, as the others have."""
    rate = torch.stack([vdm.denoising(x, noise=noise).cost for noise in draws]).mean(0)
    z_0 = vdm.encode(x, 1).sample(draws[0].fold("z_0"))
    rate = rate + prior(vdm, x)
    return vdm.decode(z_0, 1).log_prob(x) - rate, rate


def on_a_chain(vdm: VDM, x: Tensor, noise: Noise) -> Terms:
    rungs, data, rate = vdm.climb(x, noise=noise), vdm.likelihood.normalize(x), prior(vdm, x)
    times = torch.arange(vdm.levels, dtype=torch.float64) / (vdm.levels - 1)
    for rung, s, t in zip(rungs[1:], times[:-1], times[1:], strict=True):
        rate = rate + posterior(rung.z, data.to(rung.z), s, t, vdm.schedule).kl(rung.p)
    return rungs[0].log_below - rate, rate


def prior(vdm: VDM, x: Tensor) -> Tensor:
    end = torch.ones((), dtype=torch.float64)
    return marginal(vdm.likelihood.normalize(x), end, vdm.schedule).kl(
        vdm.prior(len(x), x.shape[1:])
    )


def log_ratio(vdm: VDM, x: Tensor, noise: Noise) -> Terms:
    elbo = vdm.ancestral_elbo(x, noise=noise)
    return elbo.total, elbo.rate


FORMS: dict[str, Callable[[VDM, Tensor, Noise], Terms]] = {
    "independent": independent,
    "stratified": stratified,
    "on a chain": on_a_chain,
    "log ratio": log_ratio,
}


@torch.no_grad()
def compare(vdm: VDM, x: Tensor, steps: Sequence[int], repeats: int) -> None:
    print(f"{len(x)} images, {repeats} repeats, nats\n")
    print("| T | form | bound | variance | variance of the rate |\n|--:|---|--:|--:|--:|")
    for t in steps:
        for name, form in FORMS.items():
            rows = [form(vdm.at(t), x, Noise(r, torch.arange(len(x)))) for r in range(repeats)]
            total, rate = (torch.stack(each).double() for each in zip(*rows, strict=True))
            numbers = total.mean(0), total.var(0), rate.var(0)
            print(f"| {t} | {name} | {' | '.join(map(shown, numbers))} |", flush=True)


def shown(values: Tensor) -> str:
    """Mean over images and its standard error."""
    error = values.std() / math.sqrt(len(values))
    return f"{values.mean():.4g} ± {error:.2g}"


def main(arguments: Sequence[str]) -> None:
    usage = (__doc__ or "").split("\n\n")[1]
    if any(each.startswith("run=") for each in arguments):
        folder, config, options = read(arguments, DEFAULTS, usage)
        with trained_vdm(folder, config, options.checkpoint) as (model, _, data):
            x = images(data, "test", options.images)
            compare(model, x, options.steps, options.repeats)
    else:
        options = OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist(list(arguments)))
        torch.set_default_dtype(torch.float64)
        vdm = VDM(exact(LogLinear(9.0, -9.0)), GaussianLikelihood(), shape=(3,))
        x = MEAN + STD * torch.randn(options.images, 3, generator=torch.Generator().manual_seed(0))
        compare(vdm, x, options.steps, options.repeats)


if __name__ == "__main__":
    sys.exit(command(main))
