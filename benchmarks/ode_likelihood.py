"""What the probability-flow likelihood costs: python benchmarks/ode_likelihood.py run=<folder>
[images=2] [draws=1] [threads=1]

On the first test images of a finished run, whose best weights are read, with the same draws of z_0
for every row:

* adaptive, each image at its own steps, and fixed, equal steps in log SNR: nats, the error believed
  (embedded, a sum over steps), the error found (against the tightest adaptive row), network calls
  per image, and seconds. The trace is one probe's, the same for every row: a call is one forward
  and one backward pass.
* the exact trace, D backward passes a call.
"""

from __future__ import annotations

import sys
import time

import torch

from genfw import ProbabilityFlow
from genfw.noise import Noise
from genfw.train.parts import restore
from genfw.train.runs import read

ROWS = (
    {"tolerance": 1e-5},
    {"tolerance": 1e-4},
    {"tolerance": 1e-3},
    {"tolerance": 1e-2},
    {"steps": 20},
    {"steps": 50},
    {"steps": 150},
    {"tolerance": 1e-2, "exact_dims": 1024},
)


def main() -> None:
    defaults = {"images": 2, "draws": 1, "threads": 1}
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
    print(f"{'':32}{'nats':>10}{'stderr':>8}{'believed':>10}{'found':>10}{'calls':>7}{'s':>8}")
    truth = None
    for how in ROWS:
        flow = ProbabilityFlow(draws, **({"exact_dims": 0} | how))
        start = time.perf_counter()
        with module.evaluating() as model:
            estimate = flow(model, x, noise=noise)
        seconds = time.perf_counter() - start
        truth = estimate.nats if truth is None else truth
        believed, calls = (estimate.diagnostics[k].mean() for k in ("ode_error", "ode_calls"))
        found = "" if "exact_dims" in how else f"{(estimate.nats - truth).abs().mean():.1e}"
        error = estimate.variance.sum().sqrt() / images
        name = ", ".join(f"{key}={value:g}" for key, value in how.items())
        print(
            f"{name:32}{estimate.nats.mean():10.4f}{error:8.3f}{believed:10.1e}{found:>10}"
            f"{calls:7.0f}{seconds:8.2f}"
        )


if __name__ == "__main__":
    main()
