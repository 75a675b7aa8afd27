"""What discrete parameterizations hold in memory: python benchmarks/categorical_memory.py [batch]

The peak of forward and backward on CIFAR-10's shape and 256 values, in tensors of (B, C, H, W, K),
the network's output and its gradient among them. Live bytes of all storages that operators make
are counted, so the numbers do not depend on the machine.

* x_hat: what every training step computes, from the output to its gradient.
* decoder: log p(x | z_0) under the network's own masses.
* naive: x_hat as one writes it down, a softmax and a sum, for comparison.
* network: x_hat of the shipped convolutional network of width 4, features included.
* step: the whole bound of a VDM of that network, which looks at it twice: for the decoder and for
  a noise level; with an eighth of the decoders (model.decoder_share=0.125), in the time that is
  said.

Target: 2.5.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from genfw import (
    VDM,
    CategoricalLikelihood,
    CategoricalParameterization,
    Cosine,
    LogisticMixtureParameterization,
    NetworkDenoiser,
)
from genfw.bayes import centres
from genfw.nets import Conv
from genfw.testing.memory import Live

K, SHAPE = 256, (3, 32, 32)


def ratio(batch: int, step: Callable[[], Tensor]) -> float:
    """The peak of `step` and its backward pass, in tensors of (B, C, H, W, K) in float32."""
    with Live() as memory:
        step().sum().backward()
    return memory.peak / (4 * K * batch * torch.Size(SHAPE).numel())


def main() -> None:
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    alpha, sigma = torch.full((batch,), 0.6), torch.full((batch,), 0.8)
    z, value = torch.randn(batch, *SHAPE), torch.randint(K, (batch, *SHAPE))
    logits, mixture = CategoricalParameterization(K), LogisticMixtureParameterization(K)
    network = Conv(SHAPE, out_channels=K * SHAPE[0], bins=K, width=4, blocks=1)
    level = torch.full((batch,), 0.5)

    def output(param) -> Tensor:
        return torch.zeros(batch, param.channels(SHAPE[0], K), *SHAPE[1:]).requires_grad_()

    def naive() -> Tensor:
        v = centres(K).float().view(K, 1, 1, 1)
        energy = 0.5 * ((z.unsqueeze(1) - 0.6 * v) / 0.8).square()
        return ((output(logits).unflatten(1, (K, -1)) - energy).softmax(1) * v).sum(1)

    def bound(share: float) -> Callable[[], Tensor]:
        denoiser = NetworkDenoiser(network, logits, Cosine(13.3, -10.0))
        vdm = VDM(denoiser, CategoricalLikelihood(K), decoder_share=share)
        return lambda: vdm.elbo(value).total

    steps = {
        "categorical, x_hat": lambda: logits.solve(output(logits), z, alpha, sigma).x,
        "categorical, decoder": lambda: logits.posterior(output(logits), z, alpha, sigma).log_prob(
            value
        ),
        "categorical, network": lambda: logits.solve(network(z, level), z, alpha, sigma).x,
        "categorical, step": bound(1.0),
        "categorical, eighth": bound(1 / 8),
        "categorical, naive": naive,
        "logistic_mixture, x_hat": lambda: mixture.solve(output(mixture), z, alpha, sigma).x,
    }
    print(f"batch {batch}, {SHAPE}, {K} values, torch {torch.__version__}")
    for name, step in steps.items():
        found = ratio(batch, step)
        compared = name.endswith(("naive", "step"))
        told = "      " if compared else "ok    " if found <= 2.5 else "MISSED"
        print(f"{told} {name:24} {found:5.2f} tensors")
    whole, part = (fastest(steps[f"categorical, {name}"]) for name in ("step", "eighth"))
    print(f"with an eighth of the decoders a step takes {part / whole:.2f} of the time")


def fastest(step: Callable[[], Tensor], rounds: int = 5) -> float:
    """Seconds of forward and backward."""

    def seconds() -> float:
        start = time.perf_counter()
        step().sum().backward()
        return time.perf_counter() - start

    return min(seconds() for _ in range(rounds))


if __name__ == "__main__":
    main()
