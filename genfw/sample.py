"""python -m genfw.sample run=<folder> n=64: images from a finished run, as a PNG grid.

Sample number i of a seed is always the same image, however many are asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from genfw.noise import mix
from genfw.train.runs import command, read

USAGE = """python -m genfw.sample run=<folder> [n=64] [seed=0] [checkpoint=best|last] [out=<png>]
Example: python -m genfw.sample run=outputs/2026-11-23_10-15-42_k3f9ab n=100 seed=1"""


def sample(arguments: Sequence[str]) -> None:
    defaults = {"n": 64, "seed": 0, "checkpoint": "best", "out": None, "chunk": 128}
    folder, config, options = read(arguments, defaults, USAGE)

    from genfw.train.frechet import to_bytes
    from genfw.train.job import prepare, restore
    from genfw.train.pictures import draw_samples, grid, save

    prepare()
    module, _ = restore(config, folder / "checkpoints" / f"{options.checkpoint}.ckpt")
    with module.evaluating() as model:
        images = draw_samples(model, range(options.n), mix(options.seed, "sample"), options.chunk)
    picture = grid(to_bytes(images, config.data.bins), max(1, round(options.n**0.5)))
    out = Path(options.out or folder / f"samples_{options.n}_seed{options.seed}.png")
    print(f"{options.n} samples: {save(picture, out)}")


if __name__ == "__main__":
    sys.exit(command(sample))
