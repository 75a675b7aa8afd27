"""What 5000-sample evaluation costs: python benchmarks/importance_weighted.py [images] [threads]

Two numbers, on a VAE 784-[200, 200]-50 with random weights and binary images:

* time: the estimator, against the decoder and the likelihood alone over the same chunks (same
  latents' shape, same images), alternating image by image in one process; the ratio is of the sums
  of the best of five rounds per image. Between them are the encoder, keyed noise, the densities of
  z, the tail fit and the standard error; what the estimator saves is that the image of a chunk is
  one row for the likelihood, not as many as draws. Target: 1.2. The second ratio is to the same
  calls with that saving. As in a run, freed memory is kept (genfw.train.memory).
* memory: the peak of the process, by the system's own count, above what it held before, with 10,000
  images in memory: after an evaluation of `images` at once, and after one of ten times as many. The
  second is to be no more than 64 MB higher, which is where the heap settles: small results that are
  kept between large tensors once left it in pieces, 4 GB after 3200 images. Target: 1 GB.
"""

from __future__ import annotations

import resource
import sys
import time
from itertools import pairwise

import psutil
import torch
from torch import Tensor, nn

from genfw import VAE, BernoulliLikelihood, ImportanceWeighted, Noise
from genfw.train.memory import keep_freed_memory

K, CHUNK = 5000, 2500


class MLP(nn.Module):
    def __init__(self, *sizes: int):
        super().__init__()
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.layers(x)


def held() -> float:
    """Resident memory, MB."""
    return psutil.Process().memory_info().rss / 2**20


def most() -> float:
    """The most it has ever been, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@torch.no_grad()
def alone(model: VAE, x: Tensor, z: Tensor) -> None:
    """Decoder and likelihood over the chunks of one image; x: (CHUNK, 784), it repeated or
    expanded."""
    for _ in range(K // CHUNK):
        model.decode(z, 1).log_prob(x)


def seconds(act, *arguments, **more) -> float:
    start = time.perf_counter()
    act(*arguments, **more)
    return time.perf_counter() - start


def main() -> None:
    given = [int(each) for each in sys.argv[1:]]
    images, threads = (*given, *(20, 1)[len(given) :])
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.manual_seed(0)
    model = VAE(MLP(784, 200, 200, 100), MLP(50, 200, 200, 784), BernoulliLikelihood(), 50)
    x = torch.randint(2, (10_000, 784), dtype=torch.uint8)
    z, noise = torch.randn(CHUNK, 50), Noise(0, torch.arange(10_000))
    evaluate = ImportanceWeighted(K, CHUNK)
    before, above = held(), []
    for rows in (slice(images), slice(10 * images)):
        evaluate(model, x[rows], noise=noise.of(rows))
        above.append(most() - before)

    best = torch.zeros(3, dtype=torch.float64)
    for i in range(images):
        one, of = x[i : i + 1], noise.of(slice(i, i + 1))
        copies, view = one.repeat_interleave(CHUNK, 0), one.expand(CHUNK, -1)
        rounds = [
            (
                seconds(evaluate, model, one, noise=of),
                seconds(alone, model, copies, z),
                seconds(alone, model, view, z),
            )
            for _ in range(5)
        ]
        best += torch.tensor(rounds, dtype=torch.float64).amin(0)
    whole, part, least = (best / images).tolist()
    ratio, (few, many) = whole / part, above
    print(
        f"{images} images, k = {K}, chunk = {CHUNK}, {threads} thread(s), torch {torch.__version__}"
    )
    print(f"time: {whole:.4f} s an image, decoder and likelihood {part:.4f} s")
    print(f"      10,000 images would take {whole * 10_000 / 60:.0f} minutes")
    print(f"{'ok    ' if ratio <= 1.2 else 'MISSED'}  ratio {ratio:.3f}, target 1.2")
    print(
        f"      {whole / least:.3f} to {least:.4f} s, where the image is one row for those as well"
    )
    print(f"memory above the {before:.0f} MB before: {few:.1f} MB for {images} images x {K} draws,")
    print(f"      {many:.1f} MB for {10 * images} images x {K} draws")
    holds = many <= 1024 and many - few <= 64
    print(f"{'ok    ' if holds else 'MISSED'}  {many:.0f} MB, target 1024, and no growth")


if __name__ == "__main__":
    main()
