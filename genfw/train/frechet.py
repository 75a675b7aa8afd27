r"""Frechet distance between two sets of images, in named features.

.. math:: d^2 = \lVert \mu - \mu' \rVert^2
    + \operatorname{tr}(\Sigma + \Sigma' - 2 (\Sigma \Sigma')^{1/2})

with the means and covariances of the features of the two sets. Images are integers 0..K-1 and reach
the extractor as bytes, round(255 x / (K-1)): truncation would darken one of the sets. All sums are
float64 and are reduced by adding, so that neither batches nor ranks change the result. The distance
is biased upward, the more so the fewer the images: compare only distances of equal counts,
extractor and reference.

References:
    GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium,
    Heusel et al., 2017, https://arxiv.org/abs/1706.08500.

    Effectively Unbiased FID and Inception Score and where to find them, Chong, Forsyth, 2020,
    https://arxiv.org/abs/1911.07023 (the bias).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Integer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from genfw.train.data.cache import cache_folder
from genfw.train.features import FeatureExtractor, FeaturesUnavailable, choose, to_bytes

try:
    from torchmetrics.image.fid import FrechetInceptionDistance
except Exception:
    # torch-fidelity is installed without a torchvision that fits torch. By now it has left the
    # modules that torchmetrics wants of it in sys.modules, and a second import succeeds; whether
    # Inception can be used is for features.py to say.
    from torchmetrics.image.fid import FrechetInceptionDistance

log = logging.getLogger(__name__)

Statistics = dict[str, Tensor]
"""Sum, sum of outer products and count of features, by the names of torchmetrics' states."""

_BATCH = 128
"""Images the extractor sees at a time: about 2 GB at Inception's 299 x 299."""

_STATES = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")


@dataclass(frozen=True)
class FrechetRecord:
    """A distance with everything it depends on."""

    key: str
    value: float
    extractor: str
    reference: str
    reference_count: int
    generated_count: int

    def __str__(self) -> str:
        return (
            f"{self.key} {self.value:.4g} ({self.generated_count} generated against "
            f"{self.reference_count} of {self.reference}, features: {self.extractor})"
        )


class FrechetDistance:
    """Frechet distance of generated images from a reference set.

    `reference` once; then `update` with generated images, `compute`, `reset`, as often as wanted.
    Under several ranks each updates with its own images and all call `compute`, which adds them up.

    It is deliberately no `nn.Module`: held by a LightningModule, it stays out of checkpoints and
    averaged weights.

    Args:
        extractor: what is compared.
        bins: K, the images' values are 0..K-1.
        cache: folder for the statistics of references; None: genfw's.

    Example:
        >>> from genfw.train.features import DigitsFeatures
        >>> folder = getfixture("tmp_path")
        >>> images = torch.randint(17, (200, 1, 8, 8))
        >>> distance = FrechetDistance(DigitsFeatures(), bins=17, cache=folder)
        >>> distance.reference(images.numpy(), split="train", content_hash="these")
        >>> distance.update(images)
        >>> abs(distance.compute()) < 1e-6
        True
    """

    def __init__(self, extractor: FeatureExtractor, bins: int, cache: Path | None = None):
        self.extractor = extractor
        self.bins = bins
        self.cache = cache or cache_folder() / "frechet"
        self.record: FrechetRecord | None = None
        self._metric = FrechetInceptionDistance(
            extractor, sync_on_compute=False, compute_with_cache=False
        )
        self._metric.orig_dtype = torch.float64  # a rank without images computes too
        self._reference: Statistics = {}
        self._split, self._warned = "", False

    @classmethod
    def open(
        cls,
        extractor: str,
        shape: Sequence[int],
        bins: int | None,
        weights: str | Path | None = None,
    ) -> FrechetDistance | None:
        """The distance in the features of this name; None, and a line in the log, if unavailable.

        Args:
            extractor: a name, or `auto` (see `genfw.train.features.choose`).
            shape: of the images, (C, H, W).
            bins: of the images; None: real-valued.
            weights: of the extractor; None: its own.

        Raises:
            ValueError: an extractor asked for by name does not exist or cannot take these images.
        """
        try:
            chosen = choose(extractor, shape, bins)
        except ValueError as error:
            if extractor != "auto":
                raise
            log.warning("No Frechet distance: %s.", error)
            return None
        try:
            assert bins is not None  # no extractor takes real numbers
            return cls(chosen(weights), bins)
        except FeaturesUnavailable as error:
            log.warning("No %s in this run: %s.", chosen.key, error)
            return None

    @property
    def key(self) -> str:
        """The metric's name: fd_<features>, or fid_inception."""
        return self.extractor.key

    @property
    def device(self) -> torch.device:
        return self._metric.device

    def to(self, device: torch.device | str) -> FrechetDistance:
        """Moves network and sums; images are moved by `update`."""
        self._metric.to(device)
        return self

    def reference(self, images: np.ndarray, split: str, content_hash: str) -> None:
        """Takes the reference set's statistics, from the cache if they are there.

        Args:
            images: (n, C, H, W) integers 0..bins-1: a split, or its first n images.
            split: its name.
            content_hash: of the whole split (`Split.hash`).
        """
        self._split = split
        if not _first_rank():  # counted once: the ranks' sums are added
            return
        file = self._file(images, split, content_hash)
        with _built_once(file):
            try:
                self._reference = load_file(file)
            except Exception as error:
                if file.exists():
                    log.warning("Statistics in %s are not readable (%s): made anew.", file, error)
                self._reference = self._statistics(images)
                _save(self._reference, file)

    def update(self, images: Integer[Tensor, "b c h w"]) -> None:
        """Adds generated images, integers 0..bins-1."""
        self._add(images, real=False)

    def compute(self) -> float:
        """The squared distance d^2, over all ranks; `record` then states what it depends on.

        Raises:
            RuntimeError: no reference, or fewer than two generated images.
        """
        metric = self._metric
        for state in _STATES:
            zero = torch.zeros_like(getattr(metric, state))
            setattr(metric, state, self._reference.get(state, zero).to(metric.device))
        with torch.autocast(metric.device.type, enabled=False), metric.sync_context():
            reference = int(metric.real_features_num_samples)
            generated = int(metric.fake_features_num_samples)
            if reference < 2 or generated < 2:
                raise RuntimeError(
                    f"{self.key} of {generated} generated images and {reference} of the reference: "
                    "call reference() and update() first, with at least two images each"
                )
            value = float(metric.compute())
        self._warn(min(reference, generated))
        self.record = FrechetRecord(
            self.key, value, self.extractor.name, self._split, reference, generated
        )
        return value

    def reset(self) -> None:
        """Forgets the generated images, keeps the reference."""
        self._metric.reset()

    def _add(self, images: Integer[Tensor, "b c h w"], real: bool) -> None:
        for some in images.split(_BATCH):
            self._metric.update(to_bytes(some.to(self.device), self.bins), real=real)

    def _statistics(self, images: np.ndarray) -> Statistics:
        log.info("%s: features of %d images of %s, once", self.key, len(images), self._split)
        self._metric.reset()
        for start in range(0, len(images), _BATCH):
            self._add(torch.tensor(images[start : start + _BATCH]), real=True)
        statistics = {state: getattr(self._metric, state).cpu().clone() for state in _STATES}
        self._metric.reset()
        return statistics

    def _file(self, images: np.ndarray, split: str, content_hash: str) -> Path:
        facts = (content_hash, split, len(images), self.bins, self.extractor.fingerprint())
        digest = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
        return self.cache / f"{self.key}-{split}-{len(images)}-{digest}.safetensors"

    def _warn(self, count: int) -> None:
        if count <= self.extractor.dim and not self._warned:
            self._warned = True
            log.warning(
                "%s from %d images in %d features: the covariance is singular and the distance far "
                "too large. Take several times as many images as features.",
                self.key,
                count,
                self.extractor.dim,
            )


def _first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def _built_once(file: Path) -> Iterator[None]:
    """Of many runs that miss a file one makes it; where there can be no lock, each."""
    with ExitStack() as held:
        if not file.exists():
            with suppress(OSError, NotImplementedError):
                file.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(f"{file}.lock"))
        yield


def _save(statistics: Statistics, file: Path) -> None:
    """Whole or not at all; a folder that cannot be written costs the cache, not the run."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent) as folder:
            partial = Path(folder, file.name)
            save_file(statistics, partial)
            os.replace(partial, file)
    except Exception as error:
        log.warning("Statistics of the reference are not cached (%s).", error)
