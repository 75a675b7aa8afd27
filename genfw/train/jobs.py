"""The jobs of a sweep: each a fresh process.

A job in the sweep's own process would inherit its environment, its loggers and its random state,
and Lightning's multi-process strategies would start the whole sweep again on every further rank.

A sweep's folder holds

sweep.json         its command line, for `sweep=<folder>`
jobs/<n>.json      a record per job: overrides, folder, exit code, and what went wrong
jobs/<n>.lock      held by the job's process for as long as it lives
<n>/               the run folder of job n
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from genfw.train import slurm
from genfw.train.errors import GenfwError
from genfw.train.files import write_json
from genfw.train.run_folder import spare, take

RANK_VARIABLES = (
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    slurm.NAME,
)

OF_THE_SWEEP = (
    *("hydra.mode", "hydra.run.", "hydra.sweep.", "hydra.sweeper.", "hydra.launcher."),
    *("hydra/sweeper", "hydra/launcher"),
)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What a person, a terminal that closes or a scheduler says to a sweep."""

INTERRUPTED = "interrupted"


class Interrupted(KeyboardInterrupt):
    """A signal ends the sweep, not an error: Hydra and its launchers let it pass, like Ctrl-C.

    Args:
        number: the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.exit_code = 130 if number == signal.SIGINT else 143

    @classmethod
    def by(cls, number: int, frame: FrameType | None) -> None:
        """A handler of signals."""
        raise cls(number)


def quoted(path: Path) -> str:
    """A path as the value of a Hydra override."""
    return QuotedString(text=str(path), quote=Quote.single).with_quotes()


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Args:
        number: its place in the sweep.
        sweep: the sweep's folder.
        folder: its own run folder.
        overrides: what it is, `key=value`, one value each.
        settings: of Hydra, for its process alone.
    """

    number: int
    sweep: Path
    folder: Path
    overrides: tuple[str, ...]
    settings: tuple[str, ...] = ()

    @classmethod
    def of(cls, hydra: DictConfig) -> Job:
        """From the node `hydra` of its composed configuration."""
        sweep, said = Path(str(hydra.sweep.dir)), hydra.overrides
        settings = [each for each in said.hydra if not each.lstrip("+~").startswith(OF_THE_SWEEP)]
        return cls(
            int(hydra.job.num),
            sweep,
            sweep / str(hydra.sweep.subdir),
            tuple(said.task),
            tuple(settings),
        )

    @property
    def results(self) -> dict[str, Any]:
        """What is in its results.json; {} where there is none."""
        file = self.folder / "results.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    @property
    def finished(self) -> bool:
        """Whether this very job was run before, to its end.

        Raises:
            GenfwError: another one was, under its number.
        """
        before = self._read()
        code = before.get("exit", "never started")
        if code != 0 and not (code is None and self.results):  # None: we were killed, it was not
            return False
        if not self.folder.is_dir():  # taken away, to have it once more
            return False
        if before["overrides"] != list(self.overrides):
            raise GenfwError(
                f"{self.sweep}: job {self.number} was {' '.join(before['overrides'])} and is now "
                f"{' '.join(self.overrides)}: a sweeper that draws its trials needs a seed to go on"
            )
        return True

    @property
    def saved(self) -> bool:
        """Whether its folder holds a run, with a checkpoint that is whole."""
        checkpoints = self.folder / "checkpoints"
        if not (self.folder / "config.yaml").exists() or not any(checkpoints.glob("*.ckpt")):
            return False
        from genfw.train.checkpoint import CheckpointError, newest  # imports torch

        try:
            newest(checkpoints, say=lambda _: None)
        except CheckpointError:
            return False
        return True

    def arguments(self, flags: Sequence[str] = ()) -> list[str]:
        """The command line of its process.

        What was saved is gone on with. Else it starts anew, and what is in its folder from before
        is set aside.

        Args:
            flags: for a start; a run that goes on has its whole configuration in its folder.
        """
        if self.saved:
            trusted = [each for each in self.overrides if each.startswith("trusted=")]
            return [f"resume={self.folder}", *trusted]
        if (self.folder / "config.yaml").exists():
            self.folder.rename(spare(self.folder))
        return [*flags, *self.overrides, *self.settings, f"hydra.run.dir={quoted(self.folder)}"]

    @contextmanager
    def lock(self) -> Iterator[int]:
        """Yields the descriptor of a lock for its process to inherit.

        The system takes it back when that process has ended, however it ended; so it tells whether
        a job lives whose sweep was killed.

        Raises:
            GenfwError: the job lives, from before.
        """
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.open("a") as file:
            if take(file, fcntl.flock) is False:
                raise GenfwError(f"{self.sweep}: job {self.number} runs already")
            file.truncate(0)
            yield file.fileno()

    def record(self, code: int | None) -> None:
        """Writes jobs/<n>.json, in one motion.

        Args:
            code: the exit code; None: it runs.
        """
        kept: dict[str, Any] = {
            "number": self.number,
            "folder": os.path.relpath(self.folder, self.sweep),
            "overrides": self.overrides,
            "exit": code,
        }
        said = self.folder / "error.txt"
        if code:
            how = ended(code)
            known = said.is_file() and how != INTERRUPTED
            kept["error"] = said.read_text().strip() if known else how
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, kept)

    @property
    def _file(self) -> Path:
        return self.sweep / "jobs" / f"{self.number}.json"

    @property
    def _lock(self) -> Path:
        return self._file.with_suffix(".lock")

    def _read(self) -> dict[str, Any]:
        return json.loads(self._file.read_text()) if self._file.is_file() else {}


@dataclass(frozen=True)
class Fresh:
    """The task of a sweep: a job in a process of its own.

    Hydra's launchers call it, each on its own worker; genfw's asks it to `start` jobs.

    Args:
        flags: command line flags that all jobs share.
        axes: the keys that differ between jobs, for their names; (): all that are given.
    """

    flags: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()

    def __call__(self, config: DictConfig) -> float | None:
        """Runs the job of Hydra's current configuration to its end.

        Returns:
            What `config.optimized` names in its results.

        Raises:
            GenfwError: it failed; the other jobs go on.
            Interrupted: by a signal, which it was told.
        """
        hydra = HydraConfig.get()
        job = Job.of(OmegaConf.create({"hydra": hydra}).hydra)
        if not job.finished:
            running: list[subprocess.Popen[bytes]] = []
            with passed_on(running) as signals:
                running.append(self.start(job, hydra.launcher.get("n_jobs", 1)))
                code = running[0].wait()
            job.record(code)
            if signals:
                raise Interrupted(signals[0])
            if code:
                raise GenfwError(
                    f"job {job.number} ({self.name(job)}) failed with exit code {code}"
                )
        return job.results.get(config.optimized)

    def start(self, job: Job, at_once: int, place: int | None = None) -> subprocess.Popen[bytes]:
        """Its process, in a process group of its own, so that Ctrl-C reaches it once: by us.

        Args:
            at_once: jobs side by side, which share cores and GPUs, and then write to output.txt;
                -1: as many as there are cores.
            place: which of them, from 0; None: by its number.
        """
        with job.lock() as lock:
            command = self.command(job)
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "error.txt").unlink(missing_ok=True)
            job.record(None)
            process = self._start(command, job, at_once, lock, place)
            os.write(lock, f"{process.pid}\n".encode())
        return process

    def command(self, job: Job) -> list[str]:
        """Its process's, with the program that runs it."""
        return [sys.executable, "-m", "genfw", *job.arguments(self.flags)]

    def _start(
        self, command: Sequence[str], job: Job, at_once: int, lock: int, place: int | None
    ) -> subprocess.Popen[bytes]:
        cores = len(os.sched_getaffinity(0))
        at_once = cores if at_once < 0 else at_once
        environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
        environment["WANDB_RUN_GROUP"] = job.sweep.name
        environment["WANDB_NAME"] = f"{job.number} {self.name(job)}"
        if at_once == 1:
            return subprocess.Popen(command, env=environment, process_group=0, pass_fds=(lock,))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // at_once)))
        mine = part(gpus(), job.number % at_once if place is None else place, at_once)
        if mine:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        with (job.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(
                command,
                env=environment,
                process_group=0,
                pass_fds=(lock,),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def name(self, job: Job) -> str:
        """What sets it apart: `param=eps seed=0`."""
        chosen = [each for each in job.overrides if each.partition("=")[0] in self.axes]
        return " ".join(chosen or job.overrides)


def gpus() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [each for each in given.split(",") if each]
    found = [each.name.removeprefix("nvidia") for each in Path("/dev").glob("nvidia[0-9]*")]
    return sorted(found, key=int)


def part(things: Sequence[str], place: int, at_once: int) -> Sequence[str]:
    """An equal share of them; of fewer things than shares one, which has others too.

    Example:
        >>> [part("abcd", place, 2) for place in (0, 1)], [part("ab", i, 3) for i in range(3)]
        (['ab', 'cd'], ['a', 'b', 'a'])
    """
    size = max(1, len(things) // at_once)
    start = place * size % max(1, len(things))
    return things[start : start + size]


@contextmanager
def passed_on(running: Collection[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """What is said to this process goes to those that it runs; yields the signals that came.

    To each of them and to its further ranks, as a terminal would. This process goes on, and does as
    it likes with what is in the list.
    """
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for process in list(running):
            if process.poll() is None:
                os.killpg(process.pid, number)

    with handled(pass_on):
        yield came


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """`SIGNALS` go to `handler`, but for those that are ignored (by nohup). On another thread than
    the main one, none do."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        now = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: kept for number, kept in now.items() if kept is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, kept in before.items():
            signal.signal(number, kept)


def ended(code: int) -> str:
    """How a process ended that did not say why.

    Example:
        >>> ended(1), ended(-9), ended(130), ended(143)
        ('exit code 1', 'killed by SIGKILL', 'interrupted', 'interrupted')
    """
    if code in (130, 143, -signal.SIGINT, -signal.SIGTERM):
        return INTERRUPTED
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def became(code: int) -> str:
    """What became of a process, in a word.

    Example:
        >>> became(0), became(1), became(130)
        ('finished', 'failed', 'interrupted')
    """
    return "finished" if code == 0 else INTERRUPTED if ended(code) == INTERRUPTED else "failed"


def records(sweep: Path) -> list[Mapping[str, Any]]:
    """All records of a sweep, in order, each with the `results` of its job."""
    found = [json.loads(file.read_text()) for file in (sweep / "jobs").glob("*.json")]
    for each in found:
        each["folder"] = sweep / each["folder"]
        file = each["folder"] / "results.json"
        each["results"] = json.loads(file.read_text()) if file.is_file() else {}
    return sorted(found, key=lambda each: each["number"])


def living(sweep: Path) -> dict[int, str]:
    """{job: process} of jobs that live, though the sweep that started them may not."""
    found = {}
    for path in (sweep / "jobs").glob("*.lock"):
        with path.open() as file:
            if take(file, fcntl.flock) is False:
                found[int(path.stem)] = file.read().strip()
    return dict(sorted(found.items()))
