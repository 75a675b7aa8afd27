"""What the environment says of this process: its rank, and the SLURM job it belongs to.

A job that SLURM puts back into the queue runs the same command again, with the same job id and a
restart count. So a run folder is named after job and command: the requeued run finds it and goes
on. To be put back, and warned in time:

    #SBATCH --requeue --signal=SIGUSR1@90
    srun python -m genfw ... || [ $? -ne 143 ] || scontrol requeue $SLURM_JOB_ID
"""

from __future__ import annotations

import hashlib
import os
import sys


def first_rank() -> bool:
    """Whether this is rank 0, or not yet one of several."""
    return all(os.environ.get(each, "0") == "0" for each in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


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


def restarted() -> bool:
    """Whether SLURM runs this job again."""
    return job() is not None and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
