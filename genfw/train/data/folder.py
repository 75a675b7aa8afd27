"""A folder of image files, one folder per class."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from genfw.train.data.cache import Encoded, OnError, decoded, fingerprint
from genfw.train.data.images import DataError, Source, Splits, some

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}

FEW = 10
"""Images of a split below which their mean is unknown to more than a third (1 / sqrt(10)) of how
much they differ."""

_log = logging.getLogger(__name__)


class Folder(Source, name="folder"):
    """`<path>/<class>/*.png`, or `<path>/train/<class>/*.png` with `validation`, `test` beside it.

    Classes are the folders' names in alphabetical order. A split without a folder is carved out of
    the images that have none, or out of train, by a rule that looks at the image's name alone:
    adding images moves no other one. Names that begin with a dot are nobody's images; others that
    stand elsewhere are left out, and some of them are named.

    Args:
        validation: share of the images that are carved out for validation.
        test: the same for the test.
        on_error: what to do with images that cannot be used: `fail`, or `skip` them and say so.

    Raises:
        ValueError: an argument out of its range.
        DataError: when read, no image for a split.
    """

    def __init__(self, validation: float = 0.1, test: float = 0.1, on_error: OnError = "fail"):
        if min(validation, test) < 0 or validation + test >= 1:
            raise ValueError(
                f"validation, test: expected shares >= 0, together < 1, got {validation}, {test}"
            )
        if on_error not in ("fail", "skip"):
            raise ValueError(f"on_error: expected fail or skip, got {on_error!r}")
        self.validation, self.test = validation, test
        self.on_error: OnError = on_error
        self.named: list[str] | None = None

    def read(self, shape: tuple[int, int, int], path: Path | None) -> Splits:
        if path is None:
            raise DataError("folder: which one? Give data.path=<folder with one folder per class>")
        if not path.is_dir():
            raise DataError(f"data.path={path}: no such folder")
        files = self._files(path)
        self._enough(path, files)
        self.named = classes = _classes(files)
        stats = [
            (part, str(f.relative_to(path)), f.stat().st_size, f.stat().st_ctime_ns)
            for part in files
            for f in files[part]
        ]  # a time of change is nobody's to set, as that of the contents is
        key = fingerprint("folder", str(path.resolve()), shape, self.on_error, stats)

        def encoded(_: Path) -> dict[str, Encoded]:
            return {
                part: Encoded(
                    np.array([classes.index(f.parent.name) for f in files[part]], np.int64),
                    ((str(f.relative_to(path)), f) for f in files[part]),
                )
                for part in files
            }

        return Splits(**decoded(path.name or "folder", key, encoded, shape, self.on_error))

    def classes(self, path: Path | None) -> list[str] | None:
        return self.named

    def _files(self, path: Path) -> dict[str, list[Path]]:
        """Image files of each split, in an order that depends on names alone."""
        given = {part: _images(path / part) for part in Splits._fields if (path / part).is_dir()}
        if given and (others := [p.name for p in _visible(path) if p.name not in given]):
            _log.warning(f"data.path={path}: beside {', '.join(given)}, left out: {some(others)}")
        pool = given.get("train") if given else _images(path)
        if not pool:
            inside = some(sorted(p.name for p in path.iterdir())) or "nothing"
            raise DataError(
                f"data.path={path}: expected <class>/<image> or train/<class>/<image>, with names "
                f"that end in {' '.join(sorted(SUFFIXES))}; found {inside}"
            )
        shares = {"test": self.test, "validation": self.validation}
        missing = {part: share for part, share in shares.items() if part not in given}
        for part in missing:
            given[part] = []
        given["train"] = []
        for file in pool:
            u = _position(file)
            for part, share in missing.items():
                if u < share:
                    given[part].append(file)
                    break
                u -= share
            else:
                given["train"].append(file)
        return {part: given[part] for part in Splits._fields}

    def _enough(self, path: Path, files: Mapping[str, Sequence[Path]]) -> None:
        """Warns of a split that was carved out and is so small that its mean says little.

        Raises:
            DataError: a split is empty.
        """
        shares = {"validation": self.validation, "test": self.test}
        carved = {part: share for part, share in shares.items() if not (path / part).is_dir()}
        pool = sum(len(files[part]) for part in ("train", *carved))
        sizes = ", ".join(f"{len(files[part])} for {part}" for part in Splits._fields)
        said = ", ".join(f"data.source.{part}={share}" for part, share in carved.items())
        by = f": of {pool} images, by their names and {said}, {sizes}" if carved else ""
        give = f"give more images, other shares, or folders {', '.join(Splits._fields)}"
        for part in Splits._fields:
            if not files[part]:
                raise DataError(f"data.path={path}: no images for {part}{by}; {give}")
            if part in carved and len(files[part]) < FEW:
                _log.warning(f"data.path={path}: few images for {part}{by}; {give}")


def _classes(files: Mapping[str, Sequence[Path]]) -> list[str]:
    return sorted({file.parent.name for part in files.values() for file in part})


def _images(folder: Path) -> list[Path]:
    """<class>/<image>, by name."""
    found, elsewhere = [], []
    for place in _visible(folder):
        if not place.is_dir():
            elsewhere += [place] if _image(place) else []
            continue
        for file in _visible(place):
            if _image(file) and file.is_file():
                found.append(file)
            elif file.is_dir():
                elsewhere += [deep for deep in file.rglob("*") if _image(deep)]
    if elsewhere:
        names = some(sorted(str(each.relative_to(folder)) for each in elsewhere))
        _log.warning(f"{folder}: no <class>/<image>, so left out: {names}")
    return found


def _visible(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if not each.name.startswith("."))


def _image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _position(file: Path) -> float:
    """A number in [0, 1) from class and name."""
    digest = hashlib.sha256(f"{file.parent.name}/{file.name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
