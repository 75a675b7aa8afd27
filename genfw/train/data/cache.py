"""Image files are decoded once, into one uint8 array per split, and mapped from disk ever after.

Measured on 28x28 images, one thread: 8 to 12 thousand a second are decoded, hundreds of thousands
are mapped. An entry is a folder `<cache>/data/<name>-<key>` with `<split>.images.npy`,
`<split>.labels.npy` and `about.json`. It is built in a folder of its own and renamed when complete,
under a lock: of many starts at once one builds, and an entry that is there is whole. An entry, or
the whole folder, may be removed whenever no run uses it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image

from genfw.train.data.images import DataError, Split

OnError = Literal["fail", "skip"]

_LAYOUT = 2  # of an entry, and of what is refused; a new number leaves old entries alone
_log = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """Image files of one split, not yet decoded."""

    labels: np.ndarray
    """int64 (n,)"""
    files: Iterable[tuple[str, Path | bytes]]
    """n times: the file's name, for messages, and where or what it is."""


def cache_folder() -> Path:
    """`$GENFW_CACHE`, else `~/.cache/genfw`."""
    return Path(os.environ.get("GENFW_CACHE") or "~/.cache/genfw").expanduser()


def fingerprint(*facts: object) -> str:
    """A short key for an entry, from whatever its contents depend on."""
    return hashlib.sha256(repr((_LAYOUT, *facts)).encode()).hexdigest()[:20]


def decoded(
    name: str,
    key: str,
    encoded: Callable[[Path], Mapping[str, Encoded]],
    shape: tuple[int, int, int],
    on_error: OnError = "fail",
) -> dict[str, Split]:
    """The splits of entry `name`-`key`, built if it is not there.

    Args:
        encoded: what to build from; called with a temporary folder only if there is something to
            build.
        shape: (C, H, W) of every image.
        on_error: `fail` names the first unreadable images and counts them; `skip` leaves them out
            and says so.

    Raises:
        DataError: unreadable images under `fail`; a split without a usable one, which is not kept;
            a cache folder that cannot be written.
    """
    entry = cache_folder() / "data" / f"{name}-{key}"
    if not entry.exists():
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(entry.with_name(entry.name + ".lock")):
                if not entry.exists():
                    _build(entry, name, encoded, shape, on_error)
        except OSError as error:
            raise DataError(
                f"{name}: the decoded images cannot be kept in {entry.parent} ({error}): "
                "set GENFW_CACHE to a folder with room"
            ) from error
    about = json.loads((entry / "about.json").read_text())
    for part, bad in about["skipped"].items():
        if bad:
            _log.warning(_report(f"{name}, {part} split: skipped", bad, about["files"][part]))
    return {
        part: Split(
            _mapped(entry / f"{part}.images.npy"),
            np.load(entry / f"{part}.labels.npy"),
            len(about["skipped"][part]),
        )
        for part in about["files"]
    }


def _build(
    entry: Path,
    name: str,
    encoded: Callable[[Path], Mapping[str, Encoded]],
    shape: tuple[int, int, int],
    on_error: OnError,
) -> None:
    work = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        (scratch := work / "scratch").mkdir()
        sources = encoded(scratch)
        count = {part: len(e.labels) for part, e in sources.items()}
        _log.info(f"{name}: decoding {sum(count.values()):,} images, once, into {entry}")
        skipped = {part: _decode_split(work, part, e, shape) for part, e in sources.items()}
        if on_error == "fail" and (bad := [line for lines in skipped.values() for line in lines]):
            raise DataError(
                _report(f"{name}: cannot use", bad, sum(count.values()))
                + "\n  remove them, or leave them out with data.source.on_error=skip"
            )
        for part, bad in skipped.items():
            if len(bad) == count[part]:
                raise DataError(_report(f"{name}, {part} split: cannot use", bad, count[part]))
        (work / "about.json").write_text(json.dumps({"files": count, "skipped": skipped}, indent=1))
        shutil.rmtree(scratch)
        os.replace(work, entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _decode_split(
    work: Path, part: str, encoded: Encoded, shape: tuple[int, int, int]
) -> list[str]:
    """Writes the two arrays of one split; returns a line for each image that could not be used."""
    bad: list[str] = []
    good = np.zeros(len(encoded.labels), bool)
    with (work / f"{part}.images.npy").open("wb") as file:
        _header(file, (len(good), *shape))
        for i, (name, source) in enumerate(encoded.files):
            try:
                file.write(decode(source, shape).tobytes())
                good[i] = True
            except DataError as error:
                bad.append(f"{name}: {error}")
        _header(file, (int(good.sum()), *shape))
    np.save(work / f"{part}.labels.npy", encoded.labels[good].astype(np.int64))
    return bad


def _header(file: io.BufferedWriter, shape: tuple[int, ...]) -> None:
    """At the beginning; numpy pads it, so that a later one with another count fits in its place."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )


def _mapped(path: Path) -> np.ndarray:
    """As a plain array, whose indexing is quicker."""
    return np.load(path, mmap_mode="r").view(np.ndarray)


def _report(what: str, bad: list[str], count: int, shown: int = 5) -> str:
    more = [f"... and {len(bad) - shown} more"] if len(bad) > shown else []
    return "\n  ".join([f"{what} {len(bad)} of {count} images:", *bad[:shown], *more])


_MODES = {1: ("L", "1", "LA"), 3: ("RGB", "RGBA")}
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


def decode(source: Path | bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """One image file as uint8 (C, H, W), without loss: nothing is resized, rounded or blended.

    A palette is looked up, and an alpha channel dropped where it is opaque everywhere.

    Raises:
        DataError: a file that is no image or is cut short, another size or number of channels,
            transparency, more than 8 bits per channel, CMYK and other colour spaces, several
            frames.
    """
    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            frames = getattr(image, "n_frames", 1)
            depth = _another_depth(image)
            image.load()
    except (
        Exception
    ) as error:  # Pillow's plug-ins raise whatever the broken bytes make them stumble over
        reason = (
            "no bytes"
            if source == b""
            else str(error).splitlines()[0]
            if str(error)
            else type(error).__name__
        )
        raise DataError(f"not a readable image ({reason})") from error
    if frames > 1:
        raise DataError(f"animated, {frames} frames: expected one image")
    if image.size != (width, height):
        raise DataError(
            f"expected {height}x{width} pixels (height x width), got {image.height}x{image.width}"
        )
    if depth:
        raise DataError(f"{depth}: convert it to 8 bits per channel first")
    if image.mode == "P" or "transparency" in image.info:
        image = _without_palette(image, channels)
    if image.mode not in ("L", "1", "LA", "RGB", "RGBA"):
        raise DataError(f"colour space {image.mode}: convert it to RGB or grey first")
    if image.mode not in _MODES[channels]:
        raise DataError(
            f"expected {_named(channels)}, got {_named(3 if image.mode[0] == 'R' else 1)}"
        )
    if image.mode in ("LA", "RGBA"):
        if np.asarray(image.getchannel("A")).min() < 255:
            raise DataError("transparent: put it on a background first")
        image = image.convert(image.mode[:-1])
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image, np.uint8)
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def _another_depth(image: Image.Image) -> str | None:
    """What an opened file has in place of 8 bits per channel. Of colours Pillow makes 8 bits when
    it reads them, and its mode does not tell."""
    if image.mode in _DEEP:
        return f"more than 8 bits per channel (mode {image.mode})"
    for codec, _, _, how in getattr(image, "tile", []):
        if codec.startswith("ppm") and isinstance(how, tuple) and how[-1] != 255:
            return f"values up to {how[-1]}"
        if re.search(r";16[BLN]", str(how)):
            return f"more than 8 bits per channel ({how})"
    return None


def _without_palette(image: Image.Image, channels: int) -> Image.Image:
    """RGBA, or LA for a palette of greys where grey is expected."""
    colour = image.convert("RGBA")
    r, g, b, _ = np.asarray(colour).transpose(2, 0, 1)
    grey = channels == 1 and bool((r == g).all() and (g == b).all())
    return colour.convert("LA") if grey else colour


def _named(channels: int) -> str:
    return {1: "1 channel (grey)", 3: "3 channels (RGB)"}[channels]
