"""python -m genfw resume=<folder>: a run that was killed or interrupted goes on where it was, be it
a model's or a classifier's.

It is the run of the folder's config.yaml, exactly: what would change its mathematics is refused.
A finished run goes on too, given a larger `trainer.max_steps`, at the learning rate that a run of
that length would have there (`genfw.train.module.on_schedule`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from genfw.train.errors import ConfigError, GenfwError, command_line, not_finite
from genfw.train.runs import GUIDES, read
from genfw.train.slurm import first_rank

USAGE = """python -m genfw resume=<folder> [key=value ...]
Example: python -m genfw resume=outputs/2026-11-23_10-15-42_k3f9ab trainer.max_steps=5000
A sweep goes on with python -m genfw sweep=<folder>"""

MAY_CHANGE = (
    *("trainer.max_steps", "trainer.max_epochs", "trainer.max_time", "trainer.limit_test_batches"),
    *("trainer.enable_progress_bar", "trainer.profiler"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    "trainer.accumulate_grad_batches",
    *("checkpoint.", "callbacks.progress.", "logger.", "estimator", "trusted"),
    *("data.path", "data.num_workers", "data.eval_batch_size", "optimized"),
)
"""How long, where, and what is shown. The product of ranks and micro-batches must stay: see
`genfw.train.keeper`."""


MAY_HAVE_MOVED = tuple(f"guidance.{each}" for each in GUIDES)


def asked(arguments: Sequence[str]) -> bool:
    """Whether a command line goes on with a run."""
    return any(each.startswith("resume=") for each in arguments)


def resume(arguments: Sequence[str]) -> None:
    """Goes on with the run that `resume=` names.

    Raises:
        ConfigError: there is none, or something is given that it cannot go on with.
        CheckpointError: it has no checkpoint that is whole.
    """
    folder, config, _ = read(arguments, {}, USAGE, word="resume", keeps=_its_mathematics)
    take_up(folder, config)


def _its_mathematics(key: str) -> str | None:
    if key.startswith(MAY_CHANGE) or key in MAY_HAVE_MOVED:
        return None
    able = ", ".join(f"{name}*" if name.endswith(".") else name for name in MAY_CHANGE)
    return f"a run that goes on keeps its {key}. What may change: {able}"


def take_up(folder: Path, config: DictConfig) -> None:
    """Goes on from the newest checkpoint of `folder`; a run killed before its first one begins."""
    from genfw.train.run_folder import locked

    with locked(folder):
        _take_up(folder, config)


def _take_up(folder: Path, config: DictConfig) -> None:
    from genfw.train.checkpoint import newest
    from genfw.train.run_folder import noted

    if "classifier" in config:
        from genfw.train.classifier_job import run
    else:
        from genfw.train.job import run

    checkpoints = folder / "checkpoints"
    begin = None
    if any(checkpoints.glob("*.ckpt")):
        begin = newest(checkpoints, say=print if first_rank() else lambda _: None)
    with noted(folder, resumed=True):
        if begin is None or not _finished(folder, config, begin):
            run(config, folder, begin)


def _finished(folder: Path, config: DictConfig, begin: Path) -> bool:
    """Whether there is nothing to do.

    Raises:
        ConfigError: it has taken more steps than it is to take.
        GenfwError: its end was a NLL that is not finite.
    """
    from genfw.train.checkpoint import read as read_checkpoint

    kept, trainer, results = read_checkpoint(begin), config.trainer, folder / "results.json"
    step, done = kept["global_step"], results.is_file()
    for key, reached in (("max_steps", step), ("max_epochs", kept["epoch"])):
        asked = trainer.get(key)
        if not done and asked is not None and 0 <= asked < reached:
            raise ConfigError(
                f"trainer.{key}={asked}: this run has reached {reached} already: give at least that"
            )
    epochs = trainer.get("max_epochs")
    by_steps = 0 <= trainer.max_steps <= step
    by_epochs = epochs is not None and 0 <= epochs <= _epochs(kept)
    if not done or not (by_steps or by_epochs):
        return False
    if wrong := not_finite(json.loads(results.read_text())):
        again = command_line("genfw.evaluate", f"run={folder}", "checkpoint=last")
        other = "" if "classifier" in config else f", or another checkpoint or estimator ({again})"
        raise GenfwError(
            f"{folder} has ended, at step {step}, without a number: {wrong}; a new run with a "
            f"smaller optimizer.lr may have one{other}"
        )
    longer = " and ".join(
        f"trainer.{key}"
        for key, ended in (("max_steps", by_steps), ("max_epochs", by_epochs))
        if ended
    )
    print(f"{folder} is finished, at step {step}: give a larger {longer} to go on")
    return True


def _epochs(checkpoint: Mapping[str, Any]) -> int:
    """Those that it has seen to their end. Lightning counts one when its last step has gone by, and
    the counters kept are of before."""
    fit = checkpoint["loops"]["fit_loop"]
    ended = fit["epoch_loop.batch_progress"]["is_last_batch"]
    return fit["epoch_progress"]["current"]["completed"] + ended
