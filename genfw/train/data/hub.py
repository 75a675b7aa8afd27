"""Image data sets of the Hugging Face hub, or of a folder with the same parquet files."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genfw.train.data.cache import Encoded, OnError, decoded, fingerprint
from genfw.train.data.images import DataError, Source, Split, Splits

if TYPE_CHECKING:
    from datasets import Dataset


class HubImages(Source, name="hub"):
    """A data set with a column of images and a column of integer labels, and splits train and test.

    Args:
        repository: its name on the hub, such as ylecun/mnist. The hub is asked once; the decoded
            images are kept.
        revision: a commit of the repository; None: the newest at that time.
        config: which of several data sets in the repository; None: the only one.
        label: name of the column with the labels.
        validation: how many images, from the END of train, are held out for validation; 0: the data
            set has a validation split of its own.
        on_error: what to do with images that cannot be used: `fail`, or `skip` them and say so.
    """

    def __init__(
        self,
        repository: str,
        revision: str | None = None,
        config: str | None = None,
        label: str = "label",
        validation: int = 5000,
        on_error: OnError = "fail",
    ):
        if on_error not in ("fail", "skip"):
            raise ValueError(f"on_error: expected fail or skip, got {on_error!r}")
        if validation < 0:
            raise ValueError(f"validation: expected a number of images >= 0, got {validation}")
        self.repository, self.revision, self.config = repository, revision, config
        self.label, self.validation = label, validation
        self.on_error: OnError = on_error

    def read(self, shape: tuple[int, int, int], path: Path | None) -> Splits:
        if path is None:
            where = self.repository
            origin: object = (self.repository, self.revision, self.config)
            parts = decoded(
                self.repository.replace("/", "--"),
                fingerprint("hub", origin, self.label, shape, self.on_error),
                lambda _: self._encoded(self._download(), where),
                shape,
                self.on_error,
            )
        else:
            where, files = f"data.path={path}", _parquet(path)
            names = [f.name for part in files for f in files[part]]
            self._complete(files, where, f"{_some(names)} (train-*.parquet is train)")
            origin = [(part, f.name, _sha256(f)) for part in files for f in files[part]]
            parts = decoded(
                path.name or "parquet",
                fingerprint("parquet", origin, self.label, shape, self.on_error),
                lambda scratch: self._encoded(_load_parquet(files, scratch), where),
                shape,
                self.on_error,
            )
        self._complete(parts, where, _some(list(parts)))
        return self._splits(parts, where)

    def _complete(self, parts: Collection[str], where: str, found: str) -> None:
        """All splits that are needed are there.

        Raises:
            DataError: one is missing.
        """
        needed = {"train", "test"} | ({"validation"} if self.validation == 0 else set())
        if missing := sorted(needed - set(parts)):
            raise DataError(
                f"{where}: expected splits {', '.join(sorted(needed))}, found {found}"
                + (
                    ": hold out images of train with data.source.validation=<count>"
                    if missing == ["validation"]
                    else ""
                )
            )

    def _splits(self, parts: dict[str, Split], where: str) -> Splits:
        train, test = parts["train"], parts["test"]
        if self.validation == 0:
            return Splits(train, parts["validation"], test)
        if self.validation >= len(train):
            raise DataError(
                f"{where}: {self.validation} images are to be held out for validation "
                f"(data.source.validation), train has {len(train)}"
            )
        cut = len(train) - self.validation
        return Splits(train.part(None, cut), train.part(cut, None), test)

    def _download(self) -> dict[str, Dataset]:
        import datasets  # 1 s
        import datasets.config
        import huggingface_hub.constants

        online = _reachable(huggingface_hub.constants.ENDPOINT)
        if (
            not online
        ):  # or `datasets` tries for 23 s; what it has downloaded earlier it still finds
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        try:
            found = datasets.load_dataset(self.repository, self.config, revision=self.revision)
        except Exception as error:
            reason = (
                (str(error).splitlines() or [type(error).__name__])[0]
                if online
                else f"{huggingface_hub.constants.ENDPOINT} does not answer"
            )
            raise DataError(
                f"{self.repository} cannot be had from the hub ({reason}): "
                "give data.path=<folder with its parquet files, train-*.parquet and test-*.parquet>"
            ) from error
        return {str(part): found[part] for part in found}

    def _encoded(self, found: dict[str, Dataset], where: str) -> dict[str, Encoded]:
        import datasets

        self._complete(found, where, _some(list(found)))
        encoded = {}
        for part in Splits._fields:
            if part not in found:
                continue
            rows = found[part]
            if self.label not in rows.features:
                raise DataError(
                    f"{where}: no column {self.label!r} for the labels, there are "
                    f"{', '.join(rows.features)}: give data.source.label=<column>"
                )
            image = _image_column(rows, where)
            feature = rows.features[self.label]
            if not re.fullmatch(r"u?int\d+", getattr(feature, "dtype", "")):
                raise DataError(f"{where}: column {self.label!r} holds {feature}, not integers")
            labels = np.asarray(rows[self.label], np.int64)
            rows = rows.cast_column(image, datasets.Image(decode=False))
            encoded[part] = Encoded(labels, _bytes(rows, image, part))
        return encoded


def _some(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join([*names[:shown], *([f"{len(names) - shown} more"] if names[shown:] else [])])


def _image_column(rows: Dataset, name: str) -> str:
    import datasets

    columns = [
        column
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
    ]
    if len(columns) != 1:
        raise DataError(
            f"{name}: expected one column of images, found {', '.join(columns) or 'none'}"
        )
    return columns[0]


def _bytes(rows: Dataset, column: str, part: str) -> Iterator[tuple[str, bytes | Path]]:
    i = 0
    for batch in rows.select_columns([column]).iter(batch_size=1000):
        for image in batch[column]:  # type: ignore[index]
            data = image and (image["bytes"] or (image["path"] and Path(image["path"])))
            yield f"{part} row {i}", data or b""
            i += 1


def _parquet(path: Path) -> dict[str, list[Path]]:
    """The files of each split: <path>/<split>-*.parquet, or one folder down, as in a clone."""
    if not path.is_dir():
        raise DataError(f"data.path={path}: no such folder")
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("*/*.parquet"))
    if len(folders := sorted({f.parent.name for f in files})) > 1:
        raise DataError(
            f"data.path={path} holds several data sets: choose one of {', '.join(folders)}"
        )
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(file.stem.split("-")[0], []).append(file)
    if not parts:
        raise DataError(
            f"data.path={path}: expected train-*.parquet and test-*.parquet, found no parquet file"
        )
    for part, named in parts.items():
        _whole(part, [file.stem for file in named], path)
    return parts


def _whole(part: str, names: Sequence[str], path: Path) -> None:
    """Refuses a split of which a file is missing, or there twice: `train-00000-of-00002` says how
    many there are.

    Raises:
        DataError: not each of one number of them, once.
    """
    numbered = [re.fullmatch(r"\D+-(\d+)-of-(\d+)(-\w+)?", name) for name in names]
    known = [each for each in numbered if each]
    if not known:
        return
    of = known[-1][2]
    if [each and (int(each[1]), each[2]) for each in numbered] != [(i, of) for i in range(int(of))]:
        last = f"{int(of) - 1:0{len(of)}}"
        raise DataError(
            f"data.path={path}: expected {part}-{'0' * len(of)}-of-{of} to {part}-{last}-of-{of}, "
            f"each once, got {_some(names)}: fetch what is missing, remove what is of another "
            "version"
        )


def _load_parquet(files: dict[str, list[Path]], scratch: Path) -> dict[str, Dataset]:
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        found: Any = datasets.load_dataset(
            "parquet",
            data_files={part: [str(f) for f in names] for part, names in files.items()},
            cache_dir=str(scratch),
        )
    except Exception as error:
        reason = error.__cause__ or error
        raise DataError(
            f"{next(iter(files.values()))[0].parent}: parquet files that cannot be read ({reason})"
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    return dict(found)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _reachable(address: str, seconds: float = 2.0) -> bool:
    """Whether something answers in time. A thread, for looking up a name knows no time limit."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except OSError:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()
