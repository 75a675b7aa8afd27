"""python -m genfw --multirun param=eps,x0 seed=0,1,2: what is done around the jobs of a sweep.

Hydra's sweeper says which jobs there are and a launcher runs them. This page has genfw's own
launcher, k jobs side by side on this machine; it keeps what is needed to go on with a sweep that
was interrupted, `sweep=<folder>`, and ends it with a table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from genfw.train import slurm
from genfw.train.errors import ConfigError, GenfwError, command_line, one_line
from genfw.train.files import probe, write_json
from genfw.train.jobs import (
    Fresh,
    Interrupted,
    Job,
    became,
    handled,
    living,
    passed_on,
    quoted,
    records,
)

KEPT = (
    *("hydra/sweeper=", "hydra/launcher=", "hydra.launcher.n_jobs=", "hydra.sweeper.n_jobs="),
    *("hydra.sweeper.n_trials=", "hydra.sweeper.direction=", "hydra.sweeper.sampler.seed="),
    *("hydra.sweeper.study_name=", "hydra.sweeper.storage=", "hydra.sweeper.max_batch_size="),
)
"""Hydra's overrides that sweep.json keeps: none that can name code or a shell command
(`hydra.launcher.setup`). Others, and flags, stand in the line to go on with."""

OWN = ("hydra.sweep.", "hydra.mode=")
"""Those that the folder itself answers."""


class Answer(JobReturn):
    """What became of a job. Asked for a failed one's value, Hydra's own writes a line of its own
    (`Error executing job with overrides`) beside the table's."""

    @property
    def return_value(self) -> Any:
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return super().return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


class Local(Launcher):
    """Runs the jobs of a sweep on this machine.

    Hydra's own local launcher runs one after the other, in its own process.

    Args:
        n_jobs: so many side by side; the cores and the GPUs are divided among them.
    """

    def __init__(self, n_jobs: int = 1):
        self.n_jobs = n_jobs

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        assert isinstance(task_function, Fresh)
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs them all, also where some fail.

        Raises:
            Interrupted: by Ctrl-C, or another signal; the running jobs have ended.
        """
        jobs: list[Job] = []
        returns: list[JobReturn] = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            jobs.append(Job.of(config.hydra))
            returns.append(Answer(overrides=overrides, cfg=config, hydra_cfg=config))
        self._run(jobs)
        known = {each["number"]: each for each in records(jobs[0].sweep)} if jobs else {}
        for job, answer in zip(jobs, returns, strict=True):
            assert answer.cfg is not None
            if error := known[job.number].get("error"):
                answer.status = JobStatus.FAILED
                answer.return_value = GenfwError(f"job {job.number} failed: {error}")
            else:
                answer.status = JobStatus.COMPLETED
                answer.return_value = job.results.get(answer.cfg.optimized)
        return returns

    def _run(self, jobs: Sequence[Job]) -> None:
        waiting = deque(job for job in jobs if not job.finished)
        if len(waiting) < len(jobs):
            print(f"{len(jobs) - len(waiting)} of {len(jobs)} jobs are finished already")
        running: dict[subprocess.Popen[bytes], Job] = {}
        started: dict[int, float] = {}
        free = list(range(self.n_jobs))
        places: dict[int, int] = {}
        with passed_on(running.keys()) as signals:
            while running or (waiting and not signals):
                while waiting and len(running) < self.n_jobs and not signals:
                    job = waiting.popleft()
                    print(f"job {job.number} starts: {self.task.name(job)}", flush=True)
                    started[job.number] = time.monotonic()
                    places[job.number] = place = free.pop(0)
                    running[self.task.start(job, self.n_jobs, place)] = job
                time.sleep(0.05)
                for process in [each for each in running if each.poll() is not None]:
                    job = running.pop(process)
                    free.append(places[job.number])
                    job.record(process.returncode)
                    seconds, how = (
                        time.monotonic() - started[job.number],
                        became(process.returncode),
                    )
                    print(f"job {job.number} {how} after {seconds:.0f} s", flush=True)
        if signals:
            raise Interrupted(signals[0])


def check_launcher(config: DictConfig) -> None:
    """Before there is a folder.

    Raises:
        ConfigError: genfw's own launcher cannot run so many jobs.
    """
    launcher = config.hydra.launcher
    n_jobs = launcher.get("n_jobs")
    ours = launcher._target_ == "hydra_plugins.genfw.Local"
    if ours and (type(n_jobs) is not int or n_jobs < 1):
        raise ConfigError(f"hydra.launcher.n_jobs={n_jobs}: expected an integer of at least 1")


def reopen(overrides: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The command line of `sweep=<folder> ...`: the folder, and the sweep's overrides.

    A folder may come from anywhere: it does not vouch for what it names.

    Args:
        overrides: as typed; without `sweep=` they are given back.

    Raises:
        ConfigError: there is no sweep, or its jobs would be others.
    """
    given = [each for each in overrides if each.startswith("sweep=")]
    if not given:
        return None, list(overrides)
    folder = Path(given[-1].partition("=")[2])
    beside = [each for each in overrides if not each.startswith("sweep=")]
    for each in beside:
        if not (_of_hydra(each) or each.startswith("trusted=")):
            raise ConfigError(
                f"{each}: the jobs of a sweep that is gone on with stay what they were; beside "
                "sweep=<folder> there may be hydra.launcher.n_jobs=<n> and the like, and trusted="
            )
    from genfw.train.config import allowed
    from genfw.train.overrides import parse, typed

    file = folder / "sweep.json"
    if not file.is_file():
        raise ConfigError(f"sweep={folder}: there is no {file}; the folder of a sweep has one")
    kept = json.loads(file.read_text())["overrides"]
    if any(_again(each) for each in kept):
        raise ConfigError(f"{file}: it holds settings of Hydra that genfw does not write there")
    trusted = [
        str(name)
        for each in parse([each for each in beside if each.startswith("trusted=")])
        for name in as_list(each.value())
    ]
    named = typed(parse(kept))
    foreign = [each for each in named if not allowed(each, trusted)]
    if foreign or (not named and any("_target_" in each for each in kept)):
        raise ConfigError(
            f"sweep={folder}: its command line names {', '.join(foreign) or 'classes'}, and a "
            "folder does not vouch for itself. If you do: add "
            f"'trusted=[{','.join(foreign) or '<module>'}]'"
        )
    return folder, [*kept, *beside]


def keep(sweep: Path, overrides: Sequence[str], jobs: int | None) -> None:
    """Writes sweep.json.

    Where SLURM starts a job again, the folder holds this very sweep, which goes on.

    Args:
        overrides: the sweep's command line.
        jobs: how many there will be; None: only the sweeper knows.

    Raises:
        ConfigError: the folder holds a sweep.
    """
    file = sweep / "sweep.json"
    if file.exists() and slurm.restarted():
        return
    if file.exists():
        raise ConfigError(
            f"hydra.sweep.dir: {sweep} holds a sweep already; name another folder, or go on with "
            f"it: {command_line('genfw', f'sweep={sweep}')}"
        )
    stays = [each for each in overrides if not _again(each) and not each.startswith(OWN)]
    write_json(file, {"overrides": stays, "jobs": jobs})


def run(hydra: Hydra, name: str, task: Fresh, overrides: Sequence[str], sweep: Path) -> int:
    """Runs a sweep; whatever happens, the table so far is written and shown.

    Args:
        name: of the primary configuration.
        overrides: of the sweep.
        sweep: its folder, with sweep.json in it.

    Returns:
        The exit code: 0, 1 where a job failed, 130 after Ctrl-C, 143 after another signal.

    Raises:
        GenfwError: jobs of it are running, the folder cannot be written, or Hydra's sweeper failed.
    """
    _writable(sweep / "jobs")
    if running := living(sweep):
        raise GenfwError(
            f"sweep={sweep}: jobs {', '.join(map(str, running))} still run (processes "
            f"{', '.join(running.values())}); go on when they have ended: kill saves and ends them"
        )
    code = 0
    words = [*overrides, f"hydra.sweep.dir={quoted(sweep)}", "hydra.mode=MULTIRUN"]
    try:
        with handled(Interrupted.by):
            hydra.multirun(name, task, words)
    except Interrupted as signal:
        code = signal.exit_code
    except KeyboardInterrupt:
        code = 130
    except ConfigError:
        raise
    except GenfwError:
        code = 1  # the table says which, and why
    except Exception as error:
        chosen = [each for each in overrides if each.startswith(("hydra/", "hydra."))]
        raise GenfwError(
            f"Hydra's sweeper or launcher ({', '.join(chosen) or 'of its own'}) failed: "
            f"{one_line(error)}; HYDRA_FULL_ERROR=1 shows where"
        ) from error
    finally:
        finished = close(sweep)
    if code or not finished:
        again = [f"sweep={sweep}", *(each for each in overrides if _again(each))]
        print(f"to go on: {command_line('genfw', *task.flags, *again)}", file=sys.stderr)
    return code or int(not finished)


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
        probe(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder.parent}: cannot write to this folder: {error.strerror}; a sweep keeps its "
            "records there"
        ) from error


def close(sweep: Path) -> bool:
    """Writes and prints the tables of a sweep; whether all its jobs are finished, each with a
    number."""
    from genfw.train.sweep_table import FINISHED, show, status, write

    found = records(sweep)
    if not found:
        return False
    planned = json.loads((sweep / "sweep.json").read_text())["jobs"]
    try:
        write(sweep, found)
    except OSError as error:
        print(f"{sweep}: the tables cannot be written: {error.strerror}", file=sys.stderr)
    show(sweep, found, planned)
    done = sum(status(each) == FINISHED for each in found)
    return done == (planned or len(found))


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _of_hydra(override: str) -> bool:
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))


def _again(override: str) -> bool:
    """Whether sweep.json does not have it."""
    if override.startswith("trusted="):
        return True
    return _of_hydra(override) and not override.startswith((*KEPT, *OWN))
