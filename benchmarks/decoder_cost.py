"""What p(x | z_0) costs of a training step: python benchmarks/decoder_cost.py [batch] [rounds]

The shipped U-Net (conf/net/unet.yaml) at CIFAR-10's size, param=eps, one thread. A training step is
the bound, its gradient and AdamW. The decoders are timed beside it, round by round, best of all:
log p(x | z_0) of `bins` and `discretized_gaussian`, and of `bins` over all 256 values instead of a
window of a few sigma_0 / alpha_0, which must say the same to 1e-6 nats per dimension.

Target: 5 % of a step.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from genfw import (
    VDM,
    BinsLikelihood,
    Cosine,
    DiscretizedGaussianLikelihood,
    Eps,
    NetworkDenoiser,
)
from genfw.nets import UNet

K, SHAPE = 256, (3, 32, 32)


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def all_bins(x: Tensor, where: Tensor, width: Tensor) -> Tensor:
    """log p(x | z_0) in every dimension from all K values, (b, *dims)."""
    centres = (2 * torch.arange(K) + 1) / K - 1
    energy = -0.5 * ((where.unsqueeze(-1) - centres) / width).square()
    return energy.log_softmax(-1).gather(-1, x.unsqueeze(-1)).squeeze(-1)


def main() -> None:
    given = [int(each) for each in sys.argv[1:]]
    batch, rounds = (*given, *(16, 3)[len(given) :])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    schedule = Cosine(2 * math.log(3.02 * K), -10.0)
    denoiser = NetworkDenoiser(
        UNet(SHAPE, bins=K, width=64, blocks=2, attention=8), Eps(), schedule
    )
    vdm = VDM(denoiser, BinsLikelihood(K), shape=SHAPE)
    optimizer = torch.optim.AdamW(vdm.parameters())
    x = torch.randint(K, (batch, *SHAPE))
    alpha, sigma = (each(torch.zeros(())).float() for each in (schedule.alpha, schedule.sigma))
    where, width = vdm.encode(x, 1).sample() / alpha, (sigma / alpha).view(1, 1, 1, 1)

    def step() -> None:
        optimizer.zero_grad()
        (-vdm.elbo(x).total).mean().backward()
        optimizer.step()

    def decoder(likelihood) -> Callable[[], Tensor]:
        return lambda: likelihood((where, width)).log_prob(x)

    acts = {
        "training step": step,
        "bins": decoder(BinsLikelihood(K)),
        "discretized_gaussian": decoder(DiscretizedGaussianLikelihood(K)),
        "bins, all 256": lambda: all_bins(x, where, width),
    }
    times = dict.fromkeys(acts, math.inf)
    for _ in range(rounds):
        for name, act in acts.items():
            times[name] = min(times[name], seconds(act))
    whole = times["training step"]
    print(f"batch {batch}, {SHAPE}, one thread, best of {rounds}, torch {torch.__version__}")
    for name, spent in times.items():
        told = ("ok    " if spent <= 0.05 * whole else "MISSED") if "bins, " not in name else ""
        told = "" if name == "training step" else told
        print(f"{told:6} {name:21} {1000 * spent:9.1f} ms  {100 * spent / whole:6.2f} %")
    every = all_bins(x.cpu(), where.double(), width.double()).flatten(1).sum(1)
    window = BinsLikelihood(K)((where.double(), width.double())).log_prob(x)
    gap = ((window - every).abs() / x[0].numel()).max().item()
    print(f"{'ok    ' if gap <= 1e-6 else 'MISSED'} window against all bins: {gap:.1e} nats a dim")


if __name__ == "__main__":
    main()
