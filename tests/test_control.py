"""Metrics of control, on images of which everything is known: the data's own."""

import pytest
import torch
from safetensors import safe_open

from genfw.train.control import Control
from genfw.train.data import Digits
from genfw.train.errors import GenfwError
from genfw.train.features import DigitsFeatures, FeatureExtractor
from genfw.train.frechet import FrechetDistance


@pytest.fixture(scope="module")
def splits():
    return Digits().read((1, 8, 8))


@pytest.fixture(scope="module")
def control(splits, tmp_path_factory):
    cache = tmp_path_factory.mktemp("frechet")
    made = Control(FrechetDistance(DigitsFeatures(), 17, cache), classes=10)
    train = splits.train
    made.reference(train.images, train.labels, "train", train.hash)
    return made


def measured(control, split, shift=0):
    labels = (torch.tensor(split.labels) + shift) % 10
    return control(torch.tensor(split.images), labels)


def test_test_images_are_recognised_as_often_as_the_weights_file_says(control, splits):
    with safe_open(DigitsFeatures.file(), "pt") as weights:
        known = float(weights.metadata()["accuracy"])
    assert measured(control, splits.test).accuracy == pytest.approx(known, abs=1e-4)
    assert known > 0.99


def test_asked_for_the_wrong_class_only_what_is_mistaken_for_it_counts(control, splits):
    assert measured(control, splits.test, shift=1).accuracy < 0.01


def test_the_reference_itself_is_at_distance_zero_in_every_class(control, splits):
    """Of other classes, each is far away, while all together are the same images as before."""
    found = measured(control, splits.train)
    assert abs(found.distance) < 1e-6 and max(map(abs, found.per_class)) < 1e-6
    wrong = measured(control, splits.train, shift=1)
    assert abs(wrong.distance) < 1e-6
    assert min(wrong.per_class) > 10 and wrong.within_class == sum(wrong.per_class) / 10


def test_each_class_is_measured_by_itself(control, splits):
    """Replacing the images of one class moves that class's distance, and no other."""
    images, labels = torch.tensor(splits.test.images), torch.tensor(splits.test.labels)
    before = control(images, labels)
    images[labels == 3] = 16 - images[labels == 3]
    after = control(images, labels)
    moved = [k for k in range(10) if abs(before.per_class[k] - after.per_class[k]) > 1e-6]
    assert moved == [3] and after.per_class[3] > before.per_class[3]
    assert after.accuracy < before.accuracy


def test_features_of_no_classifier_have_no_accuracy(tmp_path):
    class Pixels(FeatureExtractor, name="pixels_of_this_test"):
        key, dim, takes = "fd_pixels", 64, "anything"

        @classmethod
        def fits(cls, shape):
            return False

        def features(self, images):
            return images.flatten(1).float()

    FeatureExtractor.registry.pop("pixels_of_this_test")
    with pytest.raises(GenfwError, match=r"fd_pixels has none: .*fit_features"):
        Control(FrechetDistance(Pixels(), 17, tmp_path), 10)
