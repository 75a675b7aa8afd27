"""Small files that are whole or as they were before, whatever happens while they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from genfw.train.errors import GenfwError


def probe(folder: Path) -> None:
    """Writes and removes a file, to know early whether a folder takes any.

    Raises:
        OSError: nothing can be written there.
    """
    file = folder / "probe.tmp"
    file.write_bytes(b"genfw")
    file.unlink()


def write_json(file: Path, value: Any) -> None:
    """As JSON, whole or not at all."""
    replace_text(file, json.dumps(value, indent=2, allow_nan=False) + "\n")


def store(file: Path, value: Any, advice: str) -> None:
    """`write_json` of numbers that a person has been shown.

    Raises:
        GenfwError: it could not be written; and `advice`.
    """
    try:
        write_json(file, value)
    except OSError as error:
        raise GenfwError(f"{file} cannot be written: {error.strerror}; {advice}") from error


def replace_text(file: Path, text: str) -> None:
    """Writes a file beside its place, to the disk, and moves it there in one motion.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    with replaced(file) as beside, beside.open("w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A path beside a file. What is written there takes the file's place when it is whole."""
    beside = file.with_name(f"{file.name}.tmp")
    try:
        yield beside
        beside.replace(file)
    finally:
        with suppress(OSError):
            beside.unlink()
