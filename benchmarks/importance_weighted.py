"""What 5000-sample evaluation costs: python benchmarks/importance_weighted.py [images] [threads]

Two numbers, on a VAE 784-[200, 200]-50 with random weights and binary images:

* time: the estimator, against the decoder and the likelihood alone over the same chunks (same
  latents' shape, same images), alternating image by image in one process; the ratio is of the sums
  of the best of five rounds per image. Between them are the encoder, keyed noise, the densities of
  z, the tail fit and the standard error. Target: 1.2. The ratio falls with the chunk: what
  is done once a chunk weighs less. As in a run, freed memory is kept (genfw.train.memory).
* memory: the peak above what the process held before, for 10,000 images at once. The estimator goes
  through the images one by one, so draws only repeat what one chunk does: few images with all 5000
  draws and 10,000 images with few draws are both measured. Target: 1 GB.
"""

from __future__ import annotations

import resource
import sys
import threading
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


class Peak:
    """The largest resident memory while it is open, bytes above that at its start."""

    def __enter__(self) -> Peak:
        self.process, self.open = psutil.Process(), True
        self.before = self.most = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.open:
            self.most = max(self.most, self.process.memory_info().rss)
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.open = False
        self.thread.join()

    @property
    def above(self) -> float:
        return (self.most - self.before) / 2**20


@torch.no_grad()
def alone(model: VAE, x: Tensor, z: Tensor) -> None:
    """Decoder and likelihood over the chunks of one image; x: (CHUNK, 784), it repeated."""
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
    with Peak() as few_images:
        evaluate(model, x[:2], noise=noise.of(slice(0, 2)))
    with Peak() as few_draws:
        ImportanceWeighted(5, CHUNK)(model, x, noise=noise)

    whole = part = 0.0
    for i in range(images):
        one, of = x[i : i + 1], noise.of(slice(i, i + 1))
        same = one.repeat_interleave(CHUNK, 0)
        rounds = [
            (seconds(evaluate, model, one, noise=of), seconds(alone, model, same, z))
            for _ in range(5)
        ]
        whole, part = whole + min(a for a, _ in rounds), part + min(b for _, b in rounds)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    ratio, above = whole / part, max(few_images.above, few_draws.above)
    print(
        f"{images} images, k = {K}, chunk = {CHUNK}, {threads} thread(s), torch {torch.__version__}"
    )
    print(f"time: {whole / images:.4f} s an image, decoder and likelihood {part / images:.4f} s")
    print(f"      10,000 images would take {whole / images * 10_000 / 60:.0f} minutes")
    print(f"{'ok    ' if ratio <= 1.2 else 'MISSED'}  ratio {ratio:.3f}, target 1.2")
    print(f"memory above the start: {few_images.above:.0f} MB for 2 images x {K} draws, then")
    print(f"      {few_draws.above:.0f} MB more for 10,000 images x 5 draws; {most:.0f} MB in all")
    above = few_images.above + few_draws.above
    print(f"{'ok    ' if above <= 1024 else 'MISSED'}  {above:.0f} MB, target 1024")


if __name__ == "__main__":
    main()
