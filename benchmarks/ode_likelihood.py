"""What the probability-flow likelihood costs: python benchmarks/ode_likelihood.py run=<folder>
[images=4] [draws=1] [threads=1]

On the first test images of a finished run, whose best weights are read, with the same draws of z_0
for every row:

* `adaptive`, each image at its own steps, and `fixed`, equal steps in log SNR: nats, the error
  believed (embedded, a sum over steps), the error found (against the tightest adaptive row),
  network calls per image, and seconds. A call with the exact trace is one forward and D backward
  passes.
* one probe in place of the exact trace: its seconds, and the standard error it adds.
"""

from __future__ import annotations

import sys
import time

import torch

from genfw import ProbabilityFlow
from genfw.noise import Noise
from genfw.train.job import restore
from genfw.train.runs import read

ROWS = (
    {"tolerance": 1e-6},
    {"tolerance": 1e-5},
    {"tolerance": 1e-4},
    {"tolerance": 1e-3},
    {"steps": 10},
    {"steps": 20},
    {"steps": 40},
    {"tolerance": 1e-4, "exact_dims": 0},
)


def main() -> None:
    defaults = {"images": 4, "draws": 1, "threads": 1}
    folder, config, given = read(sys.argv[1:], defaults, __doc__ or "")
    images, draws = given.images, given.draws
    torch.set_num_threads(given.threads)
    module, data = restore(config, folder / "checkpoints" / "best.ckpt")
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    x, noise = batch.image[:images], Noise(0, batch.index[:images])
    print(
        f"{folder}: {images} images, D = {x[0].numel()}, {draws} draws, {given.threads} thread(s)"
    )
    print(f"{'':42}{'nats':>10}{'stderr':>8}{'believed':>10}{'found':>10}{'calls':>7}{'s':>8}")
    truth = None
    for how in ROWS:
        flow = ProbabilityFlow(draws, **how)
        start = time.perf_counter()
        with module.evaluating() as model:
            estimate = flow(model, x, noise=noise)
        seconds = time.perf_counter() - start
        truth = estimate.nats if truth is None else truth
        believed, calls = (estimate.diagnostics[k].mean() for k in ("ode_error", "ode_calls"))
        found = "" if "exact_dims" in how else f"{(estimate.nats - truth).abs().mean():.1e}"
        error = estimate.variance.sum().sqrt() / images
        name = flow.extra_repr() + (", one probe" if "exact_dims" in how else "")
        print(
            f"{name:42}{estimate.nats.mean():10.4f}{error:8.3f}{believed:10.1e}{found:>10}"
            f"{calls:7.0f}{seconds:8.2f}"
        )


if __name__ == "__main__":
    main()
