"""Checkpoint files: whole or not there, and found out when damaged.

A file is written beside its place, under another name on the same disk, synced, and then moved to
its place in one motion: whoever looks sees the old file or the new one. It ends with a line

    genfw sha256 <64 hexadecimal digits of everything before>

which zip readers, and so `torch.load`, skip. torch checks nothing itself: a flipped bit of a weight
loads without a word. What is read is plain types only (`weights_only=True`): a file may come from
anywhere.

`last.ckpt` is the newest; `previous.ckpt` the one before, for when the newest is damaged;
`best.ckpt` has the best validation NLL and costs no space of its own while it is one of the others.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from genfw.train.errors import GenfwError

LABEL = b"genfw sha256 "
TRAILER = len(LABEL) + 64 + 1
BLOCK = 1 << 22
"""Bytes read at a time."""


class CheckpointError(GenfwError):
    """A file that cannot be read: which, and what is wrong with it."""


def write(state: Mapping[str, Any], path: Path, previous: Path | None = None) -> None:
    """Replaces `path`, at once and for good.

    Args:
        state: plain types and tensors.
        path: where to.
        previous: what was there before becomes this.

    Raises:
        OSError: it could not be written; what was there before still is, and nothing else.
    """
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            hashed = _Hashed(file)
            try:
                torch.save(dict(state), hashed)  # pyright: ignore[reportArgumentType]
            except RuntimeError as error:  # torch's answer to a file that takes no more
                raise (hashed.failed or error) from error
            file.write(LABEL + hashed.sha.hexdigest().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            same(path, previous)
        beside.replace(path)
        _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            beside.unlink()


def check(path: Path) -> None:
    """Reads a file through.

    Raises:
        CheckpointError: it is not there, not whole, or not what was written.
    """
    try:
        size = path.stat().st_size - TRAILER
        with path.open("rb") as file:
            sha = hashlib.sha256()
            for start in range(0, max(0, size), BLOCK):
                sha.update(file.read(min(BLOCK, size - start)))
            trailer = file.read()
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    whole = trailer.startswith(LABEL) and trailer.endswith(b"\n")
    if not whole and zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} cannot be read: it has no checksum; a genfw older than checksums wrote it, "
            "or its end was cut off: train again, or read it with the genfw that wrote it"
        )
    if size <= 0 or not whole:
        raise CheckpointError(f"{path} cannot be read: it is cut short, or no checkpoint of genfw")
    if trailer[len(LABEL) : -1].decode("ascii", "replace") != sha.hexdigest():
        raise CheckpointError(f"{path} cannot be read: its contents do not match its checksum")


def read(path: Path) -> dict[str, Any]:
    """What was written, on the CPU.

    Raises:
        CheckpointError: as `check`; or it holds more than plain types.
    """
    check(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} holds what a checkpoint must not: {reason}") from error


def newest(folder: Path, say: Callable[[str], None] = print) -> Path:
    """The newest file of a `checkpoints` folder that is whole; `say` is told what is passed over.

    Raises:
        CheckpointError: there is none.
    """
    wrong = []
    for path in (folder / "last.ckpt", folder / "previous.ckpt"):
        try:
            check(path)
        except CheckpointError as error:
            wrong.append(str(error))
        else:
            for each in wrong:
                say(f"{each}; going on from {path.name}")
            return path
    raise CheckpointError("; ".join(wrong))


def same(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, at once; a copy where the disk has no links."""
    beside = target.with_name(f"{target.name}.tmp")
    beside.unlink(missing_ok=True)
    try:
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)
        beside.replace(target)
        _sync_folder(target.parent)
    finally:
        with suppress(OSError):
            beside.unlink()


class AtomicIO(CheckpointIO):
    """Lightning's door to these files. What `last.ckpt` was becomes `previous.ckpt`.

    A save that fails is remembered in `failed`, not raised: the other ranks wait for this one.
    """

    def __init__(self) -> None:
        self.failed: OSError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path, self.failed = Path(path), None
        previous = path.with_name("previous.ckpt") if path.name == "last.ckpt" else None
        try:
            write(checkpoint, path, previous)
        except OSError as error:
            self.failed = error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class _Hashed:
    """A file that hashes what passes."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha = file, hashlib.sha256()
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        self.sha.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _sync_folder(folder: Path) -> None:
    """The names of a folder, to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
