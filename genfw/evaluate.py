"""python -m genfw.evaluate run=<folder>: the test NLL of a finished run, computed again.

The same images, weights and random numbers as at the run's end, so the same number; other settings
of its config.yaml may be given, such as `estimator.strata=128`. Written to
`<folder>/evaluation.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from genfw.train.runs import command, read

USAGE = """python -m genfw.evaluate run=<folder> [checkpoint=best|last] [key=value ...]
Example: python -m genfw.evaluate run=outputs/2026-11-23_10-15-42_k3f9ab estimator.strata=128"""


def evaluate(arguments: Sequence[str]) -> None:
    folder, config, options = read(arguments, {"checkpoint": "best"}, USAGE)

    from rich.console import Console

    from genfw.train.config import build
    from genfw.train.job import quiet, restore, table, versions

    quiet()
    module, data = restore(config, folder / "checkpoints" / f"{options.checkpoint}.ckpt")
    trainer = build(
        config.trainer,
        logger=False,
        callbacks=[],
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=str(folder),
    )
    results = {**trainer.test(module, data, verbose=False)[0], **versions()}
    (folder / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    Console().print(table(results))


if __name__ == "__main__":
    sys.exit(command(evaluate))
