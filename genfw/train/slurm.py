"""What the environment says of this process: its rank, and the SLURM job it belongs to.

A job that SLURM puts back into the queue runs the same command again, with the same job id and a
restart count. So a run folder is named after job and command: the requeued run finds it and goes
on. To be put back, and warned in time:

    #SBATCH --requeue --signal=SIGUSR1@90
    srun --kill-on-bad-exit=1 python -m genfw ... || [ $? -ne 143 ] ||
        scontrol requeue $SLURM_JOB_ID

torchrun, too, runs a command again whose ranks have failed (`--max-restarts`).
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

from genfw.train.errors import GenfwError

NAME = "GENFW_RUN_NAME"
"""What a run tells the ranks that it starts."""

_stores: list[Any] = []


def first_rank() -> bool:
    """Whether this is rank 0, or not yet one of several."""
    return all(os.environ.get(each, "0") == "0" for each in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def tell(error: GenfwError, lines: int = 8) -> int:
    """Says what went wrong, once where all ranks know it; returns the exit code of this rank.

    Lightning kills the rank that started the others within seconds of one that fails.
    """
    further = error.on_all_ranks and not first_rank()
    if not further:
        kept = str(error).splitlines()
        shown = kept if len(kept) <= lines else [*kept[: lines - 1], "..."]
        print("\n".join(shown), file=sys.stderr)
    outside = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"))
    return 0 if further and not outside else error.exit_code


def job() -> str | None:
    """`slurm_<job id>_<hash of the command>`; None outside of batch jobs.

    All tasks of a step agree on it; two steps of a job do not.
    """
    number, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID", "")
    if not number or os.environ.get("SLURM_JOB_NAME") in ("interactive", "bash", "sh"):
        return None
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        number = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', 0)}"
    command = "\n".join([step, *sys.argv[1:]])
    return f"slurm_{number}_{hashlib.sha256(command.encode()).hexdigest()[:6]}"


def together(name: str) -> str:
    """One of the names that the ranks of a run propose, the same on all of them.

    Under torchrun they meet in a store at MASTER_ADDR:MASTER_PORT, before torch.distributed does.
    Ranks that Lightning starts inherit the name of the one that starts them.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        mine = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        host = mine and os.environ["RANK"] == "0"
        store = TCPStore(*where, is_master=host, wait_for_workers=False, multi_tenant=True)
        _stores.append(store)  # there until the last rank has asked, and torch.distributed joins it
        return store.compare_set("genfw/name", "", name).decode()
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        return os.environ.get(NAME, name)
    os.environ[NAME] = name
    return name


def restarted() -> bool:
    """Whether SLURM, or torchrun, runs this job again."""
    requeued = job() is not None and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    return requeued or int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0
