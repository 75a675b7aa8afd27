"""Metrics of control: are samples of the class that was asked for, and do they look like it?

* accuracy: the share of samples that a classifier of clean images, which no model has seen, takes
  for the class asked for;
* distance: the Frechet distance of all samples from all reference images;
* per class: that of the samples of one class from the images of that class.

Accuracy rises with guidance while diversity falls, which the distances see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genfw.train.errors import GenfwError
from genfw.train.features import ClassifierFeatures, to_bytes
from genfw.train.frechet import FrechetDistance
from genfw.types import Image, Labels


@dataclass(frozen=True)
class Controlled:
    """What was measured of one set of samples.

    Attributes:
        accuracy: share recognised.
        distance: Frechet distance, all classes together.
        per_class: Frechet distance of each class.
    """

    accuracy: float
    distance: float
    per_class: tuple[float, ...]

    @property
    def within_class(self) -> float:
        """The mean of `per_class`."""
        return sum(self.per_class) / len(self.per_class)


class Control:
    """Measures samples against labelled reference images.

    Args:
        distance: the Frechet distance to use, whose features are those of a classifier.
        classes: how many.

    Raises:
        GenfwError: the features are no classifier's.
    """

    def __init__(self, distance: FrechetDistance, classes: int):
        if not isinstance(distance.extractor, ClassifierFeatures):
            raise GenfwError(
                f"accuracy needs a classifier of these images, and {distance.key} has none: make "
                "one with python -m genfw.train.fit_features"
            )
        self.classifier, self.distance = distance.extractor, distance
        self.of_class = [
            FrechetDistance(distance.extractor, distance.bins, distance.cache)
            for _ in range(classes)
        ]

    def reference(
        self, images: np.ndarray, labels: np.ndarray, split: str, content_hash: str
    ) -> None:
        """Takes the reference, images (n, C, H, W) of integers and labels (n,), of this split."""
        self.distance.reference(images, split, content_hash)
        for k, distance in enumerate(self.of_class):
            distance.reference(images[labels == k], f"{split}-class-{k}", content_hash)

    def __call__(self, images: Image, asked: Labels) -> Controlled:
        """Of samples (n, C, H, W) and the classes asked for (n,), two of each at least."""
        asked = asked.to(images.device)
        per_class = [_of(each, images[asked == k]) for k, each in enumerate(self.of_class)]
        right = self.recognised(images, asked).double().mean()
        return Controlled(float(right), _of(self.distance, images), tuple(per_class))

    @torch.no_grad()
    def recognised(self, images: Image, asked: Labels) -> Tensor:
        """Whether the classifier agrees, (n,)."""
        pixels = to_bytes(images, self.distance.bins).to(self.distance.device)
        return self.classifier.logits(pixels).argmax(1) == asked.to(pixels.device)


def _of(distance: FrechetDistance, images: Image) -> float:
    distance.reset()
    distance.update(images)
    return distance.compute()
