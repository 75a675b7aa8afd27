"""Frechet distance against scipy, its bytes, sums, ranks and cache; extractors and refusals."""

import io
import logging
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors import safe_open
from torch import nn

from genfw.train import features as features_module
from genfw.train.data import Digits, HubImages, Split
from genfw.train.features import (
    DigitsFeatures,
    FeatureExtractor,
    FeaturesUnavailable,
    InceptionFeatures,
    MNISTFeatures,
    choose,
    to_bytes,
)
from genfw.train.fit_features import accuracy, digits, labelled
from genfw.train.frechet import FrechetDistance

BINS = 17


class Projection(FeatureExtractor):
    """Eight random features with a mean of 100: sums in float32 would show."""

    name, key, dim, takes = "projection", "fd_projection", 8, "images of 16 pixels"

    def __init__(self, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(16, 8, generator=draw).double())
        self.seen = []

    @classmethod
    def fits(cls, shape):
        return shape == (1, 4, 4)

    def features(self, images):
        time.sleep(0.001)  # others may come in between
        self.seen.append(images)
        return 100 + torch.tanh((images.double().flatten(1) / 127.5 - 1) @ self.weight)


def random_images(n, seed, bins=BINS):
    draw = torch.Generator().manual_seed(seed)
    bright = torch.rand(n, 1, 1, 1, generator=draw) * torch.rand(1, 1, 4, 4, generator=draw)
    noise = torch.rand(n, 1, 4, 4, generator=draw)
    return ((bright + noise) / 2 * bins).long().clamp(0, bins - 1)


@pytest.fixture
def open_distance(tmp_path):
    def open_distance(extractor=None, bins=BINS):
        return FrechetDistance(extractor or Projection(), bins, cache=tmp_path / "cache")

    return open_distance


def refer(distance, images, **facts):
    images = images.numpy()
    content_hash = Split(images, np.zeros(len(images))).hash
    distance.reference(images, **{"split": "train", "content_hash": content_hash, **facts})


def value(distance, *batches):
    distance.reset()
    for batch in batches:
        distance.update(batch)
    return distance.compute()


def scipy_frechet(first, second):
    mean = first.mean(0) - second.mean(0)
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    return mean @ mean + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)


# The distance


def test_equals_scipy(open_distance):
    extractor, distance = Projection(), open_distance()
    real, generated = random_images(300, 1), random_images(200, 2)
    refer(distance, real)
    expected = scipy_frechet(
        extractor(to_bytes(real, BINS)).numpy(), extractor(to_bytes(generated, BINS)).numpy()
    )
    assert value(distance, generated) == pytest.approx(expected, rel=1e-6)


def test_batches_do_not_matter(open_distance):
    distance, generated = open_distance(), random_images(200, 2)
    refer(distance, random_images(300, 1))
    whole = value(distance, generated)
    assert value(distance, *generated.split([1, 150, 49])) == pytest.approx(whole, rel=1e-9)


def test_equal_sets_are_at_distance_zero(open_distance):
    images = random_images(100, 1)
    distance = open_distance()
    refer(distance, images)
    assert abs(value(distance, images)) < 1e-8


def test_record_states_what_the_distance_depends_on(open_distance):
    distance = open_distance()
    refer(distance, random_images(30, 1), split="test")
    found = value(distance, random_images(20, 2))
    record = distance.record
    assert (record.key, record.value, record.extractor) == ("fd_projection", found, "projection")
    assert (record.reference, record.reference_count, record.generated_count) == ("test", 30, 20)


def test_few_images_are_warned_of_once(open_distance, caplog):
    caplog.set_level(logging.WARNING)
    distance = open_distance()
    refer(distance, random_images(30, 1))
    value(distance, random_images(9, 2))
    assert not caplog.records
    value(distance, random_images(8, 2))
    value(distance, random_images(8, 2))
    (record,) = caplog.records
    assert "8 images in 8 features" in record.getMessage()


def test_without_reference_or_images_says_so(open_distance):
    distance = open_distance()
    distance.update(random_images(5, 1))
    with pytest.raises(RuntimeError, match="5 generated images and 0 of the reference"):
        distance.compute()


def test_autocast_changes_nothing(tmp_path):
    train, test = digits()
    distance = FrechetDistance(DigitsFeatures(), 256, cache=tmp_path)
    refer(distance, train.images)
    plain = value(distance, test.images.long())
    with torch.autocast("cpu", torch.bfloat16):
        assert value(distance, test.images.long()) == plain


def test_is_no_module_so_that_checkpoints_stay_clean(open_distance):
    owner = nn.Module()
    owner.distance = open_distance()
    assert not owner.state_dict()
    assert not list(owner.modules())[1:]


# Bytes


@pytest.mark.parametrize("bins", [2, 5, 17, 100, 256])
def test_bytes_are_rounded(bins):
    exact = [round(Fraction(255 * x, bins - 1)) for x in range(bins)]
    found = to_bytes(torch.arange(bins).view(1, 1, 1, -1), bins)
    assert found.dtype == torch.uint8
    assert found.flatten().tolist() == exact


def test_distance_rounds_and_does_not_truncate(open_distance):
    extractor = Projection()
    open_distance(extractor).update(torch.full((2, 1, 4, 4), 8))
    assert extractor.seen[-1].unique().tolist() == [128]  # 127.5


def test_values_outside_the_bins_are_refused():
    with pytest.raises(IndexError):
        to_bytes(torch.full((1, 1, 1, 1), 17), bins=17)


# Ranks


def _rank(rank, folder, shards):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    distance = FrechetDistance(Projection(), BINS, cache=folder / "cache")
    refer(distance, random_images(300, 1))
    for _ in range(2):  # the second round shows that nothing of the first is left
        distance.reset()
        if len(shards[rank]):
            distance.update(shards[rank])
        found = distance.compute()
    torch.save((found, distance.record.generated_count), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", [101, 201], ids=["uneven", "one rank without images"])
def test_two_ranks_give_what_one_gives(first, tmp_path, open_distance):
    generated = random_images(201, 2)
    shards = generated[:first], generated[first:]
    torch.multiprocessing.start_processes(
        _rank, args=(tmp_path, shards), nprocs=2, start_method="fork"
    )
    distance = open_distance()
    refer(distance, random_images(300, 1))
    expected = value(distance, generated)
    for rank in range(2):
        found, count = torch.load(tmp_path / f"{rank}.pt")
        assert count == 201
        assert found == pytest.approx(expected, rel=1e-9)


# The cache


def test_cached_statistics_equal_recomputed_ones(open_distance):
    real, generated = random_images(300, 1), random_images(200, 2)
    first, second = open_distance(), open_distance()
    refer(first, real)
    refer(second, real)
    assert len(torch.cat(first.extractor.seen)) == 300
    assert not second.extractor.seen
    assert value(first, generated) == value(second, generated)


def test_cache_is_asked_for_these_images_only(open_distance):
    def computed(images, extractor=None, bins=BINS, **facts):
        distance = open_distance(extractor or Projection(), bins)
        refer(distance, images, **facts)
        return bool(distance.extractor.seen)

    real = random_images(50, 1)
    assert computed(real)
    assert not computed(real)
    assert not computed(real.clone())
    changed = real.clone()
    changed[17, 0, 2, 2] = (changed[17, 0, 2, 2] + 1) % BINS
    assert computed(changed)
    assert computed(real[:49])
    assert computed(real, split="test")
    assert computed(real, extractor=Projection(seed=1))
    assert computed(real, bins=BINS + 1)
    assert computed(real, content_hash="given")
    assert not computed(changed, content_hash="given")


def test_of_many_runs_one_makes_the_statistics(open_distance):
    real, ready = random_images(50, 1), threading.Barrier(4)

    def run(_):
        distance = open_distance()
        ready.wait()
        refer(distance, real)
        return len(distance.extractor.seen)

    with ThreadPoolExecutor(4) as pool:
        assert sorted(map(bool, pool.map(run, range(4)))) == [False, False, False, True]


def test_damaged_cache_is_made_anew(open_distance, tmp_path, caplog):
    real, generated = random_images(300, 1), random_images(200, 2)
    distance = open_distance()
    refer(distance, real)
    expected = value(distance, generated)
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    again = open_distance()
    refer(again, real)
    assert value(again, generated) == expected
    assert "made anew" in caplog.text
    third = open_distance()
    refer(third, real)
    assert not third.extractor.seen


def test_a_cache_that_cannot_be_written_costs_only_the_cache(tmp_path, caplog):
    (tmp_path / "file").touch()
    distance = FrechetDistance(Projection(), BINS, cache=tmp_path / "file" / "cache")
    refer(distance, random_images(300, 1))
    assert value(distance, random_images(200, 2)) > 0
    assert "not cached" in caplog.text


# Extractors


@pytest.mark.parametrize("extractor", FeatureExtractor.registry.values())
def test_only_inception_is_called_fid(extractor):
    prefix = "fid" if extractor is InceptionFeatures else "fd"
    assert extractor.key == f"{prefix}_{extractor.name}"


def test_refusals_say_why():
    assert "(1, 8, 8), and these are (3, 32, 32)" in DigitsFeatures.refusal((3, 32, 32), 256)
    assert "grey or RGB" in InceptionFeatures.refusal((5, 32, 32), 256)
    for extractor in FeatureExtractor.registry.values():
        assert "real-valued" in extractor.refusal((1, 8, 8), None)
    assert DigitsFeatures.accepts((1, 8, 8), 17)
    with pytest.raises(ValueError, match="fd_digits takes grey digits"):
        DigitsFeatures()(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))


def test_choice_of_an_extractor():
    assert choose("auto", (1, 8, 8), 17) is DigitsFeatures
    assert choose("auto", (1, 28, 28), 256) is choose("auto", (1, 28, 28), 2) is MNISTFeatures
    assert choose("auto", (3, 32, 32), 256) is InceptionFeatures
    assert choose("inception", (1, 8, 8), 17) is InceptionFeatures
    with pytest.raises(ValueError, match="fd_digits takes"):
        choose("digits", (3, 32, 32), 256)
    with pytest.raises(ValueError, match="digits, mnist, inception"):
        choose("inceptoin", (3, 32, 32), 256)
    with pytest.raises(ValueError, match="no feature extractor takes"):
        choose("auto", (2,), 256)


SHIPPED = [(DigitsFeatures, 447, 0.97), (MNISTFeatures, 10_000, 0.985)]
MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"


@pytest.mark.parametrize(("extractor", "count", "least"), SHIPPED, ids=["digits", "mnist"])
def test_shipped_weights_say_what_they_are(extractor, count, least):
    """How good, on what, trained on what, by which command; and the page says the same."""
    file = extractor.file()
    with safe_open(file, "pt") as weights:
        said = weights.metadata()
    assert float(said["accuracy"]) >= least
    assert said["accuracy of"] == f"{count} test images of {extractor.name}"
    assert f"training images of {extractor.name}" in said["trained on"]
    assert said["made by"] == f"python -m genfw.train.fit_features {extractor.name} --seed 0"
    assert f"{100 * float(said['accuracy']):.1f} %" in " ".join(extractor.__doc__.split())
    assert file.stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("extractor", "source", "bins"),
    [(DigitsFeatures, Digits(), 17), (MNISTFeatures, HubImages("ylecun/mnist"), 256)],
    ids=["digits", "mnist"],
)
def test_a_shipped_classifier_is_as_good_as_it_says(extractor, source, bins):
    """To one image on the border where all are asked, to five standard errors of a thousand."""
    path = MNIST if extractor is MNISTFeatures else None
    if path and not path.is_dir():
        pytest.skip(f"{path} is not there")
    split = source.read(extractor.shape, path).test
    with safe_open(extractor.file(), "pt") as weights:
        said = weights.metadata()
    assert said["accuracy of"].startswith(f"{len(split)} test images")
    stated, n = float(said["accuracy"]), min(len(split), 1000)
    found = accuracy(extractor().classifier, labelled(split.part(None, n), bins))
    error = 1.5 / n if n == len(split) else 5 * (stated * (1 - stated) / n) ** 0.5
    assert abs(found - stated) < error


def test_digits_features_have_full_rank():
    _, test = digits()
    spectrum = torch.linalg.eigvalsh(torch.cov(DigitsFeatures()(test.images).T))
    assert len(spectrum) == DigitsFeatures.dim <= 64
    assert spectrum[0] > 1e-4 * spectrum[-1]


def test_real_digits_are_near_and_noise_is_far(tmp_path):
    train, test = digits()
    distance = FrechetDistance(DigitsFeatures(), 256, cache=tmp_path)
    refer(distance, train.images)
    noise = torch.randint(256, (447, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    shuffled = test.images.flatten(1)[:, torch.randperm(64)].view(-1, 1, 8, 8)
    assert value(distance, test.images) < 1.5
    assert value(distance, noise) > 25
    assert value(distance, shuffled) > 10


# What is missing costs a line in the log, never the run


def test_without_torch_fidelity(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(FeaturesUnavailable):
        InceptionFeatures()
    assert FrechetDistance.open("auto", (3, 32, 32), 256) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "fid_inception" in record.getMessage()
    assert "make fid-check" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_real_valued_data_have_no_distance(caplog):
    assert FrechetDistance.open("auto", (2,), None) is None
    assert "real-valued" in caplog.text


def test_an_extractor_asked_for_by_name_must_fit():
    with pytest.raises(ValueError, match="fd_digits takes"):
        FrechetDistance.open("digits", (3, 32, 32), 256)


@pytest.fixture
def fidelity(monkeypatch, tmp_path):
    """torch-fidelity as far as InceptionFeatures knows it, and an empty torch.hub."""

    class Network(nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path):
            super().__init__()
            torch.load(feature_extractor_weights_path, weights_only=False)

    module = SimpleNamespace(
        URL_INCEPTION_V3="https://host.invalid/weights-6726825d.pth",
        FeatureExtractorInceptionV3=Network,
    )
    monkeypatch.setattr(features_module, "_torch_fidelity", lambda: module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return module


def test_without_network(fidelity, monkeypatch, caplog, tmp_path):
    def refuse(url, timeout):
        raise URLError("Name or service not known")

    monkeypatch.setattr(features_module, "urlopen", refuse)
    assert FrechetDistance.open("auto", (3, 32, 32), 256) is None
    assert fidelity.URL_INCEPTION_V3 in caplog.text
    assert "metrics.fid.weights=<file>" in caplog.text


def test_a_damaged_download_is_not_kept(fidelity, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(features_module, "urlopen", lambda url, timeout: io.BytesIO(b"<html>"))
    assert FrechetDistance.open("auto", (3, 32, 32), 256) is None
    assert "damaged" in caplog.text
    assert not list((tmp_path / "checkpoints").iterdir())


def test_weights_with_code_in_them_are_not_run(fidelity, tmp_path, caplog):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    file = tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps(Payload(), protocol=2))
    assert FrechetDistance.open("inception", (3, 32, 32), 256, weights=file) is None
    assert str(file) in caplog.text
    assert not (tmp_path / "owned").exists()


def test_torch_fidelity_without_torchvision_does_not_break_the_import(tmp_path):
    """torch-fidelity imports torchvision; torchmetrics imports torch-fidelity wherever it is."""
    package = tmp_path / "torch_fidelity"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch_fidelity.feature_extractor_inceptionv3, torch_fidelity.helpers\n"
        "import torch_fidelity.interpolate_compat_tensorflow\n"
        "raise ModuleNotFoundError(\"No module named 'torchvision'\")\n"
    )
    (package / "helpers.py").write_text("vassert = None")
    (package / "interpolate_compat_tensorflow.py").write_text(
        "interpolate_bilinear_2d_like_tensorflow1x = None"
    )
    (package / "feature_extractor_inceptionv3.py").write_text(
        "import torch\nclass FeatureExtractorInceptionV3(torch.nn.Module): ..."
    )
    installed = tmp_path / "torch_fidelity-0.4.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch-fidelity\nVersion: 0.4.0"
    )
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from genfw.train.frechet import FrechetDistance\n"
        "import torchmetrics; torchmetrics.MeanMetric\n"
        "print(FrechetDistance.open('auto', (3, 32, 32), 256))\n"
        "print(FrechetDistance.open('auto', (1, 8, 8), 17).key)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["None", "fd_digits"]
    assert "torchvision" in ran.stderr
