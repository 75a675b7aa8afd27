"""The process that a run, or a command that reads one, lives in."""

from __future__ import annotations

import logging
import os
import warnings

from lightning.fabric.strategies.launchers import subprocess_script

from genfw.train.loggers import git_commit
from genfw.train.memory import keep_freed_memory
from genfw.train.sharding import FSDP2


def prepare() -> None:
    """The process: memory is kept, the commit of its code is noted, Lightning knows our strategy,
    and its advertisements and its advice about what is meant to be so are not shown."""
    keep_freed_memory()
    git_commit()
    FSDP2.register_strategies()
    subprocess_script._ChildProcessObserver._terminate_all = end_all
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*litlogger.*",
        ".*LeafSpec.*",
        ".*in eval mode at the start of training.*",
        ".*your dataloader is not resumable.*",  # it is: genfw.train.batches
        ".*overridden `on_after_batch_transfer`.*",  # which leaves batches of ours alone
        ".*returned a view tensor.*",  # of a network, and nobody writes into it
        ".*sync_dist=True.*",  # what is logged was summed over the ranks already
    ):
        warnings.filterwarnings("ignore", message=message)


def end_all(self: subprocess_script._ChildProcessObserver) -> None:
    """What Lightning does when a rank that it started has failed: kill the others, and the first
    rank, which ends with 1 and not as one that was killed; the rank has said what it was."""
    for process in self._child_processes:
        process.kill()
    os._exit(1)
