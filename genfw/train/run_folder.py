"""A run's folder: its name, whose it is, and who writes there.

A new run makes its folder, and takes no other's. While it runs it holds `run.lock`; what went wrong
is kept in `error.txt`.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig, OmegaConf

from genfw.train import slurm
from genfw.train.errors import ConfigError, GenfwError, resume_line

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a file system says that knows no locks, as Lustre mounted without `flock`."""

STAYS = {".hydra", "genfw.log", "run.lock", "output.txt"}
"""What the next run of a folder writes over, or goes on with."""

LOGGED = {"metrics.csv", "wandb", "wandb_id.txt"}


def start_name() -> str:
    """`2026-11-23_10-15-42_k3f9ab`: when a run started, and 30 random bits, the same on all
    ranks; of a SLURM job the name that it has when it is started again."""
    if (job := slurm.job()) is not None:
        return job
    random = base64.b32encode(secrets.token_bytes(4)).decode()[:6].lower()
    return slurm.together(f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{random}")


OmegaConf.register_new_resolver("start", start_name, use_cache=True, replace=True)


def named_anew(config: DictConfig, key: str) -> bool:
    """Whether the folder that `key` names is this start's alone."""
    parent, _, leaf = key.rpartition(".")
    named = OmegaConf.to_container(OmegaConf.select(config, parent), resolve=False)
    assert isinstance(named, dict)
    return "${start:}" in str(named[leaf]) and slurm.job() is None


def own_folder(config: DictConfig, key: str) -> Path:
    """Makes the folder that `key` names, for this run alone; without `${start:}` it may exist, and
    where SLURM or torchrun starts a job again it may hold this very run."""
    while True:
        folder = Path(str(OmegaConf.select(config, key)))
        try:
            further_rank = any(name in os.environ for name in ("LOCAL_RANK", "RANK"))
            alone = named_anew(config, key) and not further_rank
            folder.mkdir(parents=True, exist_ok=not alone)
            known = not slurm.first_rank() or slurm.restarted()
            if (folder / "config.yaml").exists() and not known and not make_room(folder):
                raise ConfigError(
                    f"{key}: {folder} holds a run already; name another, or none for a new one; "
                    f"to go on with that one: {resume_line(folder)}"
                )
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise ConfigError(f"{key}: {folder} is a file") from None
            OmegaConf.clear_cache(config)
        except OSError as error:
            raise ConfigError(
                f"{key}: cannot make the folder {folder}: {error.strerror}"
            ) from error


def make_room(folder: Path) -> bool:
    """Whether a folder held a run that ended before its first checkpoint, however it ended, nothing
    else, and no longer does. What it logged is set aside, `<folder>.before-<n>`."""
    place = folder / "run.lock"
    if not place.is_file():
        return False
    with place.open("r+") as lock:
        if not take(lock, fcntl.lockf):  # a process runs there; or nobody can tell
            return False
        left = {each.name for each in _whole(folder)} - STAYS
        known = {"config.yaml", "error.txt", "checkpoints"} | LOGGED
        if not left <= known or any(_whole(folder / "checkpoints")):
            return False
        if left & LOGGED:
            aside = spare(folder.resolve())
            aside.mkdir()
            for name in left:
                (folder / name).rename(aside / name)
            print(f"{folder}: the run that ended there is set aside in {aside}")
        else:
            for name in left - {"checkpoints"}:
                (folder / name).unlink()
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return True


def abandon(folder: Path) -> None:
    """Removes a run folder that holds nothing but the configuration of a run that cannot be."""
    small = {"config.yaml", ".hydra", "genfw.log", "error.txt", "run.lock"}
    if {each.name for each in folder.iterdir()} <= small:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A run folder that no other process writes to: run.lock is held, by rank 0 for all of a run.

    The system takes it back however the process ends, and its children, which load data, do not
    inherit it.

    Raises:
        ConfigError: another process runs there, or the folder cannot be written.
    """
    if not slurm.first_rank():
        yield
        return
    try:
        file = (folder / "run.lock").open("a+")
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot write to this folder: {error.strerror}; a run keeps its files there"
        ) from error
    with file:
        free = take(file, fcntl.lockf)
        if free is False:
            file.seek(0)
            raise ConfigError(
                f"{folder}: this run is running already, in process {file.read().strip()}; "
                "wait for its end, or end it: kill saves and ends it"
            )
        if free is None:
            print(f"{folder}: this file system has no locks; start a run there once only")
        with suppress(OSError):  # a full disk
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            with suppress(OSError):  # somebody may have removed the folder, or filled the disk
                os.ftruncate(file.fileno(), 0)


@contextmanager
def noted(folder: Path, resumed: bool = False) -> Iterator[None]:
    """What goes wrong is kept in a line of `folder`/error.txt, for the table of the sweep, until
    the run is at its end.

    Args:
        resumed: what was refused leaves the folder as it was.
    """
    said, began = folder / "error.txt", time.time()
    try:
        yield
    except Exception as error:
        another = said.exists() and said.stat().st_mtime >= began  # rank's, which ours follows from
        if not (another or (resumed and isinstance(error, ConfigError))):
            kind = "" if isinstance(error, GenfwError) else f"{type(error).__name__}: "
            first = next(iter(str(error).splitlines()), "")
            with suppress(OSError):  # a disk that is full has been told of
                said.write_text(f"{kind}{first}\n")
        raise
    else:
        said.unlink(missing_ok=True)


def take(file: TextIO, lock: Callable[[TextIO, int], None]) -> bool | None:
    """Whether its lock was free; None: this file system has no locks.

    Args:
        lock: `fcntl.flock`, held until all who have the file open have ended, or `fcntl.lockf`,
            which is this process's alone.
    """
    try:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def spare(folder: Path) -> Path:
    """A name beside it that is free, `<folder>.before-<n>`: where it is set aside."""
    names = (f"{folder.name}.before-{n}" for n in range(1, 10**6))
    return next(p for name in names if not (p := folder.with_name(name)).exists())


def _whole(folder: Path) -> Iterator[Path]:
    """What is in it, but for files whose writing was cut short."""
    return (each for each in folder.glob("*") if each.suffix != ".tmp")
