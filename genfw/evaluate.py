"""python -m genfw.evaluate run=<folder>: the test NLL of a finished run, computed again.

The same images, weights and random numbers as at the run's end, so the same number; another
estimator may be chosen, `estimator=importance_weighted`, and settings of the run's config.yaml
changed, `estimator.k=500`. Written to `<folder>/evaluation.json`, which keeps one entry per
estimator and checkpoint: {"importance_weighted(k=500) of best": {"kind": ..., "test/nll": ...}}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genfw.train.runs import command, read

USAGE = """python -m genfw.evaluate run=<folder> [checkpoint=best|last] [group=name] [key=value ...]
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
    if trainer.is_global_zero:
        estimator = module.estimator
        name = f"{estimator.name}({estimator.extra_repr()}) of {options.checkpoint}"
        changed = [each for each in arguments if not each.startswith("run=")]
        keep(folder, name, {"kind": estimator.kind, "changed": changed, **results})
        Console().print(name, table(results), sep="\n")


def keep(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Adds one entry to `<folder>/evaluation.json`, or replaces the one of this name."""
    file = folder / "evaluation.json"
    entries = json.loads(file.read_text()) if file.exists() else {}
    if not all(isinstance(each, dict) for each in entries.values()):
        entries = {}  # of before entries had names
    file.write_text(json.dumps({**entries, name: entry}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(command(evaluate))
