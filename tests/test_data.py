"""Data: the right images in the right splits and the lawful order, or one clear sentence."""

import io
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
import zlib
from itertools import chain
from pathlib import Path
from unittest.mock import Mock

import datasets
import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from PIL import Image

from genfw.train import resolvers
from genfw.train.batches import EvaluationBatches, TrainingBatches
from genfw.train.certificate import _data as facts
from genfw.train.data import (
    Batch,
    DataError,
    Digits,
    Folder,
    HubImages,
    ImageData,
    Source,
    Split,
    Splits,
)
from genfw.train.data import folder as folders
from genfw.train.data.cache import decode
from genfw.train.data.hub import _reachable
from genfw.train.errors import ConfigError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CONF = Path(__file__).resolve().parents[1] / "conf" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENFW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def random_split(n, shape=(1, 4, 4), bins=256, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, bins, (n, *shape)).astype(np.uint8)
    return Split(images, rng.integers(0, classes, n))


class Given(Source):
    """Splits as they are given."""

    def __init__(self, train, validation=None, test=None):
        self.splits = Splits(train, validation or random_split(5), test or random_split(7))

    def read(self, shape, path):
        return self.splits


def given(train, **kwargs):
    facts = {"shape": (1, 4, 4), "bins": 256, "classes": 3, "batch_size": 4, **kwargs}
    return ImageData(Given(train), **facts)


def flat(lists):
    return list(chain.from_iterable(lists))


def rows(batches):
    return [batch.index.tolist() for batch in batches]


# ---------------------------------------------------------------------------------------- sources


def test_digits_are_the_textbook_split():
    splits = Digits().read((1, 8, 8))
    assert [len(split) for split in splits] == [1000, 350, 447]
    whole = np.concatenate([split.images for split in splits])
    assert whole.dtype == np.uint8
    assert whole.shape == (1797, 1, 8, 8)
    assert np.unique(whole).tolist() == list(range(17))
    from sklearn.datasets import load_digits

    assert (whole[:, 0] == load_digits().images).all()
    assert (np.concatenate([split.labels for split in splits]) == load_digits().target).all()
    assert splits.test.hash == "0f9a39c2172a4b89edc769c9f6c37d43b596d6c2e5cf64458de1fa3591f3ef6e"


def test_hash_sees_every_pixel_label_and_the_order():
    split = random_split(9)
    pixel, label = split.images.copy(), split.labels.copy()
    pixel[4, 0, 1, 2] ^= 1
    label[3] += 1
    others = [
        Split(pixel, split.labels),
        Split(split.images, label),
        Split(split.images[::-1], split.labels[::-1]),
        Split(split.images.reshape(9, 1, 2, 8), split.labels),
        split.part(0, 8),
    ]
    assert len({split.hash, *(other.hash for other in others)}) == 6
    assert Split(split.images.copy(), split.labels.copy()).hash == split.hash


@pytest.mark.parametrize(
    ("name", "counts", "mean", "std", "labels"),
    [
        ("mnist", (50000, 10000, 10000), [0.1307], [0.3081], [5, 0, 4, 1, 9]),
        (
            "cifar10",
            (45000, 5000, 10000),
            [0.49140, 0.48216, 0.44655],
            [0.24703, 0.24349, 0.26159],
            None,
        ),
    ],
)
def test_published_sets(name, counts, mean, std, labels):
    """Pixels are the published ones: mean and standard deviation of train, as quoted everywhere."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there")
    from hydra.utils import instantiate

    data = instantiate(compose(name, f"data.path={SHARED / name}"))
    splits = data.raw  # compared with the facts in conf/
    assert tuple(len(split) for split in splits) == counts
    train = np.concatenate([splits.train.images, splits.validation.images])
    np.testing.assert_allclose(train.mean((0, 2, 3)) / 255, mean, atol=5.1e-5)
    np.testing.assert_allclose(train.std((0, 2, 3)) / 255, std, atol=5.1e-5)
    if labels:
        assert splits.train.labels[:5].tolist() == labels
    count = np.bincount(splits.test.labels)
    assert len(count) == data.classes
    assert train.max() == data.bins - 1
    if name == "cifar10":
        assert (count == 1000).all()


def png(pixels, mode=None, **save):
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, "png", **save)
    return file.getvalue()


def write_parquet(folder, name, split, image="image", label="label"):
    encoded = [{"bytes": png(i.squeeze(0)), "path": None} for i in split.images]
    rows = datasets.Dataset.from_dict({image: encoded, label: split.labels.tolist()})
    folder.mkdir(exist_ok=True, parents=True)
    rows.cast_column(image, datasets.Image()).to_parquet(folder / f"{name}.parquet")


@pytest.fixture
def parquet(tmp_path):
    train, test = random_split(30, seed=1), random_split(11, seed=2)
    write_parquet(tmp_path / "set", "train-00000-of-00002", train.part(0, 20), "img")
    write_parquet(tmp_path / "set", "train-00001-of-00002", train.part(20, 30), "img")
    write_parquet(tmp_path / "set", "test-00000-of-00001", test, "img")
    return tmp_path / "set", train, test


def test_parquet_in_order_and_validation_from_the_end(parquet):
    path, train, test = parquet
    splits = HubImages("set", validation=6).read((1, 4, 4), path)
    assert splits.train.hash == train.part(0, 24).hash
    assert splits.validation.hash == train.part(24, 30).hash
    assert splits.test.hash == test.hash


@pytest.mark.parametrize(
    ("add", "remove", "says"),
    [
        ((), ("train-00001-of-00002",), "train-00000-of-00002 to train-00001-of-00002, each once"),
        (("train-00000-of-00001",), (), "got train-00000-of-00001, train-00000-of-00002, "),
        (
            ("test",),
            (),
            "each once, got test-00000-of-00001, test: ",
        ),
        (("test-00000-of-00001-ab",), (), "each once, got test-00000-of-00001-ab, test-0"),
    ],
    ids=["missing", "of two generations", "and the whole", "twice"],
)
def test_a_split_is_read_whole_and_once(parquet, add, remove, says):
    path, train, _ = parquet
    for name in add:
        write_parquet(path, name, train.part(0, 2), "img")
    for name in remove:
        (path / f"{name}.parquet").unlink()
    with pytest.raises(DataError, match=says):
        HubImages("set", validation=6).read((1, 4, 4), path)


def test_names_with_a_hash_are_shards_too(parquet):
    path, train, _ = parquet
    for i in range(2):
        (path / f"train-0000{i}-of-00002.parquet").rename(
            path / f"train-0000{i}-of-00002-a8{i}.parquet"
        )
    assert len(HubImages("set", validation=6).read((1, 4, 4), path).train) == len(train) - 6


def test_own_validation_split(parquet):
    path, train, _ = parquet
    held_out = random_split(4, seed=3)
    write_parquet(path, "validation", held_out, "img")
    splits = HubImages("set", validation=0).read((1, 4, 4), path)
    assert splits.train.hash == train.hash
    assert splits.validation.hash == held_out.hash


def test_decoded_once(parquet, cache, monkeypatch):
    path, _, _ = parquet
    source = HubImages("set", validation=6)
    first = source.read((1, 4, 4), path)
    entry = next(p for p in (cache / "data").iterdir() if p.is_dir())
    assert not list(entry.glob("scratch"))
    monkeypatch.setattr("genfw.train.data.cache.decode", None)  # would raise
    again = source.read((1, 4, 4), path)
    assert [s.hash for s in first] == [s.hash for s in again]
    assert not again.train.images.flags.writeable
    assert again.train.images.flags.c_contiguous


def test_changed_files_are_read_anew(parquet):
    path, _, _ = parquet
    source = HubImages("set", validation=6)
    source.read((1, 4, 4), path)
    other = random_split(11, seed=5)
    write_parquet(path, "test-00000-of-00001", other, "img")
    assert source.read((1, 4, 4), path).test.hash == other.hash


def _read(path):
    return HubImages("set", validation=6).read((1, 4, 4), path).train.hash


@pytest.mark.slow
def test_many_starts_build_one_entry(parquet, cache):
    path, train, _ = parquet
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        hashes = pool.map(_read, [path] * 4, chunksize=1)
    assert set(hashes) == {train.part(0, 24).hash}
    assert len([p for p in (cache / "data").iterdir() if p.is_dir()]) == 1


def test_hub_out_of_reach_is_known_within_seconds(monkeypatch, tmp_path):
    """`datasets` alone tries for 23 s. In a process of its own: modules remember the answer."""
    code = (
        "from genfw.train.data import HubImages, DataError\n"
        "import time, datasets\n"
        "start = time.time()\n"
        "try: HubImages('ylecun/mnist').read((1, 28, 28), None)\n"
        "except DataError as error: print(time.time() - start, error)\n"
    )
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1")  # reserved: nobody answers
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    seconds, message = out.stdout.strip().split(" ", 1)
    assert float(seconds) < 4, out
    assert "\n" not in message
    assert "data.path=" in message
    assert "ylecun/mnist" in message


def test_probe_gives_up_in_time():
    start = time.time()
    assert not _reachable("http://192.0.2.1", seconds=0.3)
    assert time.time() - start < 1


def fill(folder, split, names="abc"):
    for i, (image, label) in enumerate(zip(split.images, split.labels)):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        (folder / names[label] / f"{i:04d}.png").write_bytes(png(image.squeeze(0)))


def contents(split):
    return {(image.tobytes(), int(label)) for image, label in zip(split.images, split.labels)}


def test_folder_with_splits(tmp_path):
    parts = [random_split(n, seed=n) for n in (20, 8, 9)]
    for name, split in zip(Splits._fields, parts):
        fill(tmp_path / "set" / name, split)
    for split, expected in zip(Folder().read((1, 4, 4), tmp_path / "set"), parts):
        assert contents(split) == contents(expected)


def test_folder_is_split_by_name(tmp_path):
    whole = random_split(400)
    fill(tmp_path / "set", whole)
    source = Folder(validation=0.2, test=0.1)
    before = source.read((1, 4, 4), tmp_path / "set")
    assert set.union(*map(contents, before)) == contents(whole)
    assert sum(map(len, before)) == 400
    for split, share in zip(before, (0.7, 0.2, 0.1)):
        assert abs(len(split) - 400 * share) < 4 * math.sqrt(400 * share * (1 - share))
    for i in range(400, 430):
        (tmp_path / "set" / "a" / f"{i:04d}.png").write_bytes(png(np.zeros((4, 4), np.uint8)))
    after = source.read((1, 4, 4), tmp_path / "set")
    assert sum(map(len, after)) == 430
    assert all(contents(old) <= contents(new) for old, new in zip(before, after))


def test_a_folder_names_what_it_leaves_out_and_knows_no_hidden_names(tmp_path, caplog):
    place = tmp_path / "set"
    fill(place, random_split(60), "abc")
    before = Folder().read((1, 4, 4), place)
    image = next((place / "a").iterdir()).read_bytes()
    for name in (".ipynb_checkpoints/0.png", "a/._0.png", "a/.deep/0.png"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(image)
    source = Folder()
    assert list(map(len, source.read((1, 4, 4), place))) == list(map(len, before))
    assert source.classes(place) == ["a", "b", "c"]
    assert "left out" not in caplog.text
    for name in ("top.png", "a/deep/z.png"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(image)
    assert list(map(len, Folder().read((1, 4, 4), place))) == list(map(len, before))
    assert "set: no <class>/<image>, so left out: a/deep/z.png, top.png" in caplog.text


def test_a_folder_beside_the_splits_is_left_out_aloud(tmp_path, caplog):
    for name in ("train", "test", "val"):
        fill(tmp_path / "set" / name, random_split(60), "abc")
    Folder().read((1, 4, 4), tmp_path / "set")
    assert "set: beside train, test, left out: val" in caplog.text


def test_folder_carves_what_is_missing_out_of_train(tmp_path):
    fill(tmp_path / "set" / "train", random_split(200))
    fill(tmp_path / "set" / "test", random_split(9, seed=1))
    splits = Folder(validation=0.2).read((1, 4, 4), tmp_path / "set")
    assert len(splits.test) == 9
    assert len(splits.train) + len(splits.validation) == 200
    assert 15 < len(splits.validation) < 70


def test_a_folder_says_where_its_images_went(tmp_path, caplog):
    """One image has one split; a tiny test set is told of, and one that somebody made is theirs."""
    fill(tmp_path / "one", random_split(1))
    with pytest.raises(DataError) as caught:
        Folder(validation=0.5, test=0.4).read((1, 4, 4), tmp_path / "one")
    said = str(caught.value)
    assert re.search(
        r"one: no images for \w+: of 1 images, by their names and data.source.val", said
    )
    assert sum(int(n) for n in re.findall(r"(\d+) for ", said)) == 1
    fill(tmp_path / "few", random_split(60))
    splits = Folder(validation=0.4).read((1, 4, 4), tmp_path / "few")
    assert len(splits.test) < 10 <= len(splits.validation)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "few images for test: of 60 images" in warning
    assert f"{len(splits.train)} for train, {len(splits.validation)} for val" in warning
    caplog.clear()
    for part in Splits._fields:
        fill(tmp_path / "made" / part, random_split(2))
    Folder().read((1, 4, 4), tmp_path / "made")
    assert not caplog.records or all(each.levelname == "INFO" for each in caplog.records)
    for file in (tmp_path / "made" / "test").glob("*/*"):
        file.unlink()
    with pytest.raises(DataError, match="made: no images for test; give"):
        Folder().read((1, 4, 4), tmp_path / "made")


GREY = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
RGB = np.stack([GREY, GREY[::-1], GREY.T], -1)


def saved(image, fmt="png", **save):
    file = io.BytesIO()
    image.save(file, fmt, **save)
    return file.getvalue()


def opaque(alpha):
    return np.concatenate([RGB, np.full((4, 4, 1), alpha, np.uint8)], -1)


BAD = {
    "text.png": (b"this is no image", "not a readable image"),
    "empty.png": (b"", "not a readable image"),
    "cut.png": (
        png(np.random.default_rng(0).integers(0, 255, (4, 4)).astype(np.uint8))[:-30],
        "not a readable",
    ),
    "deep.png": (saved(Image.fromarray(GREY.astype(np.uint16) * 200)), "more than 8 bits"),
    "few.pgm": (b"P5 4 4 3\n" + bytes(range(4)) * 4, "values up to 3"),
    "ink.jpg": (saved(Image.fromarray(RGB).convert("CMYK"), "jpeg"), "colour space CMYK"),
    "glass.png": (png(opaque(128)), "expected 1 channel (grey), got 3 channels (RGB)"),
    "film.gif": (
        saved(
            Image.fromarray(GREY),
            "gif",
            save_all=True,
            append_images=[Image.fromarray(255 - GREY)],
        ),
        "animated, 2 frames",
    ),
    "wide.png": (png(GREY[:3]), "expected 4x4 pixels (height x width), got 3x4"),
    "colour.png": (png(RGB), "expected 1 channel (grey), got 3 channels (RGB)"),
}


def deep(colour, channels):
    """A PNG of 16 bits per channel, as Pillow writes none."""
    pixels = np.full((4, 1 + 4 * channels), 0xFF01, ">u2").tobytes()
    rows = b"".join(
        b"\0" + pixels[i : i + 8 * channels] for i in range(0, 32 * channels, 8 * channels)
    )

    def part(kind, data):
        whole = kind + data
        return len(data).to_bytes(4, "big") + whole + zlib.crc32(whole).to_bytes(4, "big")

    header = (4).to_bytes(4, "big") * 2 + bytes((16, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", header)
        + part(b"IDAT", zlib.compress(rows))
        + part(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (deep(2, 3), "more than 8 bits"),
        (deep(6, 4), "more than 8 bits"),
        (b"P6 4 4 65535\n" + bytes(96), "values up to 65535"),
        (b"P6 4 4 1023\n" + bytes(96), "values up to 1023"),
        (b"P3 4 4 7\n" + b"1 " * 48, "values up to 7"),
    ],
    ids=["rgb", "rgba", "16-bit ppm", "10-bit ppm", "3-bit ppm in words"],
)
def test_colours_of_other_depths_are_refused(data, says):
    """Pillow makes 8 bits of them, and says nothing."""
    with pytest.raises(DataError, match=says):
        decode(data, (3, 4, 4))
    plain = b"P6 4 4 255\n" + RGB.tobytes()
    assert (decode(plain, (3, 4, 4)) == RGB.transpose(2, 0, 1)).all()


def test_images_decoded_before_their_depth_was_looked_at_are_decoded_anew(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": deep(2, 3), "path": None}] * 3, "label": [0, 1, 2]}
    ).cast_column("image", datasets.Image())
    for part in Splits._fields:
        rows.to_parquet(tmp_path / "set" / f"{part}.parquet")
    with monkeypatch.context() as before:
        before.setattr("genfw.train.data.cache._LAYOUT", 1)
        before.setattr("genfw.train.data.cache._another_depth", lambda _: None)
        HubImages("set", validation=0).read((3, 4, 4), tmp_path / "set")
    with pytest.raises(DataError, match="more than 8 bits"):
        HubImages("set", validation=0).read((3, 4, 4), tmp_path / "set")


@pytest.mark.parametrize("name", BAD)
def test_images_that_cannot_be_used_say_why(name):
    data, reason = BAD[name]
    with pytest.raises(DataError) as caught:
        decode(data, (1, 4, 4))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("data", "shape", "expected"),
    [
        (png(GREY), (1, 4, 4), GREY[None]),
        (png(RGB), (3, 4, 4), RGB.transpose(2, 0, 1)),
        (png(opaque(255)), (3, 4, 4), RGB.transpose(2, 0, 1)),
        (saved(Image.fromarray(RGB).quantize(16)), (3, 4, 4), RGB.transpose(2, 0, 1)),
        (saved(Image.fromarray(GREY).convert("P")), (1, 4, 4), GREY[None]),
        (saved(Image.fromarray(GREY > 99)), (1, 4, 4), 255 * (GREY > 99)[None]),
        (saved(Image.fromarray(GREY).convert("LA")), (1, 4, 4), GREY[None]),
    ],
    ids=["grey", "rgb", "opaque rgba", "palette", "grey palette", "one bit", "opaque grey"],
)
def test_images_without_loss(data, shape, expected):
    assert (decode(data, shape) == expected).all()


def test_transparency_is_refused():
    with pytest.raises(DataError, match="transparent"):
        decode(png(opaque(128)), (3, 4, 4))
    with pytest.raises(DataError, match="expected 3 channels"):
        decode(png(GREY), (3, 4, 4))


def test_folder_with_bad_images(tmp_path, caplog):
    good = random_split(40)
    fill(tmp_path / "set", good)
    for name, (data, _) in BAD.items():
        (tmp_path / "set" / "a" / f"x-{name}").write_bytes(data)
    with pytest.raises(DataError) as caught:
        Folder().read((1, 4, 4), tmp_path / "set")
    message = str(caught.value)
    assert "cannot use 10 of 50 images" in message
    assert sum("a/x-" in line for line in message.splitlines()) == 5
    assert "and 5 more" in message
    assert "on_error=skip" in message

    for _ in range(2):  # said again when the images come from the cache
        caplog.clear()
        splits = Folder(on_error="skip").read((1, 4, 4), tmp_path / "set")
        assert set.union(*map(contents, splits)) == contents(good)
        assert sum(map(len, splits)) == 40
        skipped = [said for r in caplog.records if "skipped " in (said := r.getMessage())]
        assert sum(int(text.split("skipped ")[1].split(" of ")[0]) for text in skipped) == 10


def test_a_folder_of_the_same_names_sizes_and_times_is_another(tmp_path):
    for place, value in (("one", 10), ("two", 200)):
        for part in Splits._fields:
            file = tmp_path / place / "set" / part / "a" / "x.pgm"
            file.parent.mkdir(parents=True)
            file.write_bytes(b"P5 4 4 255\n" + bytes([value]) * 16)
            os.utime(file, (0, 0))
    for place, value in (("one", 10), ("two", 200)):
        assert (Folder().read((1, 4, 4), tmp_path / place / "set").test.images == value).all()
    file.write_bytes(b"P5 4 4 255\n" + bytes([90]) * 16)  # in its place, with its old time
    os.utime(file, (0, 0))
    assert (Folder().read((1, 4, 4), tmp_path / "two" / "set").test.images == 90).all()


@pytest.mark.parametrize("binarize", ["none", "static"])
def test_a_certificate_says_how_many_test_images_were_skipped(tmp_path, binarize):
    for part in Splits._fields:
        fill(tmp_path / "set" / part, random_split(20))
    bad = sorted((tmp_path / "set" / "test").glob("*/*"))[:7]
    for file in bad:
        file.write_bytes(b"")
    data = ImageData(
        Folder(on_error="skip"),
        (1, 4, 4),
        2 if binarize == "static" else 256,
        3,
        raw_bins=256,
        path=tmp_path / "set",
        binarize=binarize,
    )
    held = facts(data, 13)
    assert (held["count"], held["of"], held["skipped"]) == (13, 13, 7)


def test_a_split_without_a_usable_image_is_not_kept(tmp_path, cache):
    for part in Splits._fields:
        fill(tmp_path / "set" / part, random_split(3))
    for file in (tmp_path / "set" / "test").glob("*/*"):
        file.write_bytes(b"")
    for source in (Folder(on_error="skip"), Folder()):
        with pytest.raises(DataError, match=r"cannot use 3 of [39] images"):
            source.read((1, 4, 4), tmp_path / "set")
        assert [each for each in (cache / "data").iterdir() if each.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("source", "path", "says"),
    [
        (Digits(), "here", "drop data.path="),
        (Folder(), None, "data.path=<folder"),
        (Folder(), "nowhere", "no such folder"),
        (Folder(), "empty", "expected <class>/<image>"),
        (HubImages("set"), "nowhere", "no such folder"),
        (HubImages("set"), "empty", "found no parquet file"),
        (HubImages("set", validation=30), "set", "train has 30"),
        (HubImages("set", validation=0), "set", "expected splits test, train, validation"),
        (HubImages("set", label="class"), "set", "give data.source.label="),
        (HubImages("set", label="img"), "set", "column 'img' holds"),
        (HubImages("set"), "two", "choose one of a, b"),
        (HubImages("set"), "broken", "cannot be read"),
        (HubImages("set"), "named", "expected splits test, train, found data.parquet, more-1.par"),
    ],
)
def test_sources_say_what_is_missing(source, path, says, parquet, tmp_path, cache):
    """Also of somebody's own files, which are no repository; nothing is kept of them."""
    (tmp_path / "empty").mkdir()
    places = ("two/a", "two/b", "broken")
    broken = [f"{place}/{part}-0" for place in places for part in Splits._fields]
    for name in (*broken, "named/data", "named/more-1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError) as caught:
        source.read((1, 4, 4), path and tmp_path / path)
    assert says in str(caught.value)
    if path and path != "here":
        assert str(tmp_path / path) in str(caught.value)
    kept = [each for each in (cache / "data").glob("*") if each.suffix != ".lock"]
    assert path == "set" or not kept


def test_a_repository_without_a_split_is_not_decoded(monkeypatch, cache):
    """Of one that was decoded, the splits it had are remembered."""
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(GREY), "path": None}] * 2, "label": [0, 1]}
    )
    monkeypatch.setattr(HubImages, "_download", lambda _: {"train": rows, "unsupervised": rows})
    with pytest.raises(DataError, match=r"^a/b: expected splits test, train, found train, unsup"):
        HubImages("a/b").read((1, 4, 4), None)
    assert [each.suffix for each in (cache / "data").iterdir()] == [".lock"]
    monkeypatch.setattr(HubImages, "_download", lambda _: {"train": rows, "test": rows})
    assert len(HubImages("a/b", validation=1).read((1, 4, 4), None).train) == 1
    with pytest.raises(DataError, match="test, train, validation, found train, test: hold out"):
        HubImages("a/b", validation=0).read((1, 4, 4), None)


def test_cache_that_cannot_be_written(parquet, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GENFW_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set GENFW_CACHE"):
        HubImages("set", validation=6).read((1, 4, 4), parquet[0])


# ---------------------------------------------------------------------------------------- facts


def broken(**change):
    split = random_split(20)
    arrays = {"images": split.images, "labels": split.labels, **change}
    return Split(arrays["images"], arrays["labels"])


@pytest.mark.parametrize(
    ("train", "facts", "says"),
    [
        (random_split(0), {}, "no images"),
        (random_split(20, (1, 4, 5)), {}, "the images are (1, 4, 5)"),
        (random_split(20, (3, 4, 4)), {}, "the images are (3, 4, 4)"),
        (broken(images=random_split(20).images / np.float32(255)), {}, "not to be scaled"),
        (broken(images=np.full((20, 1, 4, 4), np.nan)), {}, "as uint8, got float64"),
        (broken(images=random_split(20).images.astype(np.int64)), {}, "as uint8, got int64"),
        (
            broken(images=np.full((20, 1, 4, 4), 17, np.uint8)),
            {"bins": 17},
            "expected pixels 0..16",
        ),
        (broken(labels=np.full(20, 3)), {}, "expected labels 0..2"),
        (broken(labels=np.full(20, -1)), {}, "found -1"),
        (broken(labels=np.zeros(19, np.int64)), {}, "20 images, but labels of shape (19,)"),
        (broken(labels=np.zeros(20)), {}, "expected integer labels"),
    ],
)
def test_facts_are_compared_with_the_data(train, facts, says):
    with pytest.raises(DataError) as caught:
        given(train, **facts).setup()
    assert says in str(caught.value)
    assert "train split" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_split_is_checked():
    for part in ("validation", "test"):
        data = ImageData(
            Given(random_split(20), **{part: random_split(3, (1, 5, 5))}), (1, 4, 4), 256, 3
        )
        with pytest.raises(DataError, match=f"{part} split"):
            data.setup()


@pytest.mark.parametrize("classes", [2, 4])
def test_a_folder_has_as_many_classes_as_folders(classes, tmp_path):
    """Also a label that only the test has counts."""
    split = random_split(40)
    fill(tmp_path / "set" / "train", Split(split.images, split.labels % 2), "ab")
    fill(tmp_path / "set" / "test", Split(split.images, np.full(40, 0)), "c")
    facts = {"path": tmp_path / "set", "name": "folder"}
    ImageData(Folder(), (1, 4, 4), 256, 3, **facts).setup()
    with pytest.raises(DataError) as caught:
        ImageData(Folder(), (1, 4, 4), 256, classes, **facts).setup()
    said = f"folder: data.classes={classes}, and there are 3: a, b, c. Give data.classes=3"
    assert str(caught.value) == said


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    """A million names over a network take their time."""
    fill(tmp_path / "train", random_split(60), "abc")
    fill(tmp_path / "test", random_split(9), "abc")
    listed, images = [], folders._images
    monkeypatch.setattr(folders, "_images", lambda place: listed.append(place) or images(place))
    ImageData(Folder(), (1, 4, 4), 256, 3, path=tmp_path).setup()
    assert sorted(listed) == [tmp_path / "test", tmp_path / "train"]


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"bins": 2}, "expected 256 with data.raw_bins=256 and data.binarize=none"),
        ({"bins": 256, "binarize": "dynamic"}, "expected 2 with"),
        ({"bins": 300, "raw_bins": 300}, "expected 2 to 256 values"),
        ({"bins": 256, "shape": (4, 4)}, "expected (channels 1 or 3, height, width)"),
        ({"bins": 256, "shape": (2, 4, 4)}, "expected (channels 1 or 3, height, width)"),
    ],
)
def test_facts_that_contradict_each_other(facts, says):
    with pytest.raises(DataError) as caught:
        given(random_split(20), **{"raw_bins": 256, **facts})
    assert says in str(caught.value)


def test_batch_larger_than_the_data():
    with pytest.raises(
        DataError, match="batch larger than the data: a step takes 21 images, train has 20"
    ):
        given(random_split(20), batch_size=21).train_dataloader()
    with pytest.raises(DataError, match="a step takes 4 x 3 ranks x 2 accumulated images"):
        TrainingBatches(20, 4, 0, world=3, accumulate=2)
    assert len(TrainingBatches(20, 20, 0)) == 1


@pytest.mark.parametrize("short", ["validation", "test"])
def test_every_rank_has_an_image_to_evaluate(short):
    """Lightning leaves out the evaluation of a rank that has none, and the others wait for it."""
    splits = {"train": random_split(40), "validation": random_split(6), "test": random_split(6)}
    data = ImageData(Given(**splits | {short: random_split(5)}), (1, 4, 4), 256, 3, batch_size=4)
    facts = {f"limit_{each}_batches": 1.0 for each in ("train", "val", "test")}
    trainer = Mock(spec=L.Trainer, global_rank=0, world_size=5, accumulate_grad_batches=1, **facts)
    trainer.strategy = Mock(root_device=torch.device("cpu"))
    data.check(trainer)
    trainer.world_size = 6
    with pytest.raises(DataError, match=f"{short} has 5 images, and here are 6 ranks: "):
        data.check(trainer)


@pytest.mark.parametrize(
    "few", ["limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"]
)
def test_a_fraction_of_the_batches_is_one_batch_at_least(few, tmp_path):
    splits = Splits(random_split(40), random_split(40), random_split(40))
    data = ImageData(Given(*splits), (1, 4, 4), 256, 3, batch_size=4, eval_batch_size=4)

    def trainer(share):
        return L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, **{few: share})

    data.check(trainer(0.1))
    with pytest.raises(DataError, match=rf"^trainer.{few}=0.09: of 10 batches this is less than"):
        data.check(trainer(0.09))


def test_an_epoch_ends_with_a_whole_step_and_no_later_than_its_validation(tmp_path):
    splits = Splits(random_split(40), random_split(40), random_split(40))
    data = ImageData(Given(*splits), (1, 4, 4), 256, 3, batch_size=4, eval_batch_size=4)

    def trainer(**options):
        return L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, **options)

    for limit in (4, 0.4, 1.0, 99):
        data.check(trainer(limit_train_batches=limit, accumulate_grad_batches=2))
    for limit in (3, 0.3):
        with pytest.raises(ConfigError, match=f"limit_train_batches={limit}: .* 3 micro-batches"):
            data.check(trainer(limit_train_batches=limit, accumulate_grad_batches=2))
    with pytest.raises(ConfigError, match=r"trainer.overfit_batches=3: .* multiple of"):
        data.check(trainer(overfit_batches=3, accumulate_grad_batches=2))
    data.check(trainer(fast_dev_run=True, accumulate_grad_batches=2))
    for good in ({"val_check_interval": 10}, {"val_check_interval": 1.0}):
        data.check(trainer(check_val_every_n_epoch=2, **good))
    data.check(trainer(check_val_every_n_epoch=None, val_check_interval=11))
    with pytest.raises(ConfigError, match=r"n_epoch=2 .* 10 batches.*val_check_interval=1\.0"):
        data.check(trainer(check_val_every_n_epoch=2, val_check_interval=11))


# ---------------------------------------------------------------------------------------- order


def chunks(epoch=0, start=0, **kwargs):
    batches = TrainingBatches(101, 6, 7, **kwargs)
    return [chunk.rows.tolist() for chunk in batches.chunks(epoch, start)]


def test_an_epoch_sees_each_image_once_and_drops_only_the_rest():
    seen = flat(chunks())
    assert len(seen) == len(set(seen)) == 96
    assert set(seen) <= set(range(101))
    assert {len(chunk) for chunk in chunks()} == {6}
    dropped = [frozenset(range(101)) - set(flat(chunks(epoch))) for epoch in range(20)]
    assert len(set(dropped)) == 20


def test_order_is_a_function_of_seed_and_epoch():
    assert chunks(epoch=3) == chunks(epoch=3)
    assert chunks(epoch=3) != chunks(epoch=4)
    assert chunks(epoch=3) != [c.rows.tolist() for c in TrainingBatches(101, 6, 8).chunks(3)]


def test_order_is_uniform():
    """Where image 0 stands: mean of a uniform position, within 4 standard errors."""
    batches = TrainingBatches(50, 1, 0)
    place = [[c.rows.item() for c in batches.chunks(epoch)].index(0) for epoch in range(300)]
    assert abs(np.mean(place) - 24.5) < 4 * math.sqrt((50**2 - 1) / 12 / 300)


def test_ranks_are_disjoint_and_together_one_rank_with_accumulation():
    one = chunks(accumulate=2)
    two = [chunks(rank=rank, world=2) for rank in range(2)]
    assert one == [chunk for step in zip(*two) for chunk in step]
    four = [chunks(rank=rank, world=2, accumulate=2) for rank in range(2)]
    assert chunks(accumulate=4) == [chunk for step in zip(*four) for chunk in step]
    assert len(one) % 2 == 0
    assert len(chunks(accumulate=4)) % 4 == 0
    three = [set(flat(chunks(rank=rank, world=3))) for rank in range(3)]
    assert len(set.union(*three)) == sum(map(len, three))


def test_start_goes_on_exactly():
    batches = TrainingBatches(101, 6, 7)
    whole = [c.rows.tolist() for epoch in range(3) for c in batches.chunks(epoch)]
    assert [c.rows.tolist() for _ in range(3) for c in batches] == whole
    batches.set_epoch(1, start=5)
    assert len(batches) == 16
    assert [c.rows.tolist() for _ in range(2) for c in batches] == whole[16 + 5 :]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 12])
def test_evaluation_counts_every_image_once(world, count):
    ranks = [EvaluationBatches(count, 4, rank=rank, world=world) for rank in range(world)]
    seen = [[chunk.rows for chunk in batches] for batches in ranks]
    assert [len(batches) for batches in ranks] == [len(list_) for list_ in seen]
    assert all((torch.cat(list_) % world == r).all() for r, list_ in enumerate(seen) if list_)
    assert sorted(torch.cat(flat(seen)).tolist()) == list(range(count))
    assert all(1 <= len(index) <= 4 for list_ in seen for index in list_)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"rank": 2, "world": 2}, {"rank": -1}])
def test_impossible_batches(wrong):
    with pytest.raises(ValueError, match="expected"):
        EvaluationBatches(**{"count": 9, "batch_size": 4, **wrong})


# ---------------------------------------------------------------------------------------- loaders


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_images_of_their_indices(num_workers):
    train = random_split(22)
    data = given(train, num_workers=num_workers, eval_batch_size=3)
    loader = data.train_dataloader()
    assert len(loader) == 5
    for turn, batch in enumerate(batches := iter(loader)):
        if num_workers:  # the worker that made this batch: a signal to the run's group is the run's
            worker = batches._workers[turn % num_workers]
            assert os.getpgid(worker.pid) == worker.pid != os.getpgrp()
        assert isinstance(batch, Batch)
        assert (batch.image.dtype, batch.label.dtype, batch.index.dtype) == (
            torch.uint8,
            torch.int64,
            torch.int64,
        )
        assert (batch.image.numpy() == train.images[batch.index]).all()
        assert (batch.label.numpy() == train.labels[batch.index]).all()
    for loader, split in ((data.val_dataloader(), "validation"), (data.test_dataloader(), "test")):
        batches = list(loader)
        assert flat(rows(batches)) == list(range(len(data.split(split))))
        assert (torch.cat([b.image for b in batches]).numpy() == data.split(split).images).all()


def test_epochs_differ_and_seeds_decide():
    train = random_split(22)
    loader = given(train).train_dataloader()
    first, second = rows(loader), rows(loader)
    assert first != second
    assert rows(given(train).train_dataloader()) == first
    assert rows(given(train, seed=1).train_dataloader()) != first


def in_order(loader):
    """Images of one epoch, by index."""
    images = torch.zeros(len(loader.dataset), *next(iter(loader.dataset.split.images)).shape)
    for batch in loader:
        images[batch.index] = batch.image.float()
    return images


def binarized(train, **kwargs):
    facts = {"bins": 2, "raw_bins": 5, "binarize": "dynamic", "batch_size": 4, **kwargs}
    return ImageData(
        Given(train, random_split(5, bins=5), random_split(7, bins=5)),
        (1, 4, 4),
        classes=3,
        **facts,
    )


def test_dynamic_binarization_is_bernoulli():
    """Over epochs, each pixel is 1 with probability v/(K-1); neighbours are independent."""
    train, epochs = random_split(40, bins=5), 400
    loader = binarized(train).train_dataloader()
    draws = torch.stack([in_order(loader) for _ in range(epochs)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = torch.from_numpy(train.images).double() / 4
    z = (draws.double().mean(0) - p) / (p * (1 - p) / epochs).sqrt()
    assert (draws[:, p == 0] == 0).all()
    assert (draws[:, p == 1] == 1).all()
    z = z[(p > 0) & (p < 1)]
    assert z.abs().max() < 5
    assert abs(z.square().mean() - 1) < 4 * math.sqrt(2 / len(z))

    r = (draws.double() - p) / (p * (1 - p)).sqrt()
    inner = ((p > 0) & (p < 1)).float()
    for a, b, mask in (
        (r[1:], r[:-1], inner.expand(epochs - 1, *inner.shape)),
        (r[..., 1:], r[..., :-1], (inner[..., 1:] * inner[..., :-1]).expand(epochs, 40, 1, 4, 3)),
        (r[:, 1:], r[:, :-1], (inner[1:] * inner[:-1]).expand(epochs, 39, 1, 4, 4)),
    ):
        product = (a * b)[mask.bool()]
        assert abs(product.mean()) < 4 * product.std() / math.sqrt(len(product))


def test_binarization_does_not_depend_on_the_batch():
    """Nor on ranks: the same epoch in other batches has the same pixels."""
    train = random_split(40, bins=5)
    first = in_order(binarized(train, batch_size=4).train_dataloader())
    assert (first == in_order(binarized(train, batch_size=40).train_dataloader())).all()
    assert (first != in_order(binarized(train, seed=1).train_dataloader())).any()


def test_evaluation_is_binarized_once():
    train = random_split(40, bins=5)
    one, other = binarized(train), binarized(train, seed=1, eval_batch_size=2)
    for name in ("val_dataloader", "test_dataloader"):
        images = in_order(getattr(one, name)())
        assert set(images.unique().tolist()) == {0.0, 1.0}
        assert (images == in_order(getattr(one, name)())).all()
        assert (images == in_order(getattr(other, name)())).all()
    again = binarized(train, evaluation_seed=1)
    assert one.split("test").hash == other.split("test").hash != again.split("test").hash
    p = one.raw.test.images / 4
    assert (one.split("test").images[p == 1] == 1).all()
    assert (one.split("test").images[p == 0] == 0).all()


def test_splits_have_draws_of_their_own():
    same = random_split(20, bins=5)
    data = ImageData(Given(same, same, same), (1, 4, 4), 2, 3, raw_bins=5, binarize="static")
    assert len({data.split(name).hash for name in Splits._fields}) == 3


def test_static_binarization_is_the_same_in_every_epoch_and_run():
    train = random_split(40, bins=5)
    loader = binarized(train, binarize="static").train_dataloader()
    first = in_order(loader)
    assert (first == in_order(loader)).all()
    assert (first == in_order(binarized(train, binarize="static", seed=1).train_dataloader())).all()
    assert (first.numpy() == binarized(train, binarize="static").split("train").images).all()
    many = random_split(3000, bins=5)  # more than one block of the draw
    drawn = binarized(many, binarize="static").split("train").images
    p = many.images / 4
    assert abs((drawn - p).mean()) < 4 * np.sqrt((p * (1 - p)).sum()) / p.size


def test_flip_mirrors_half_of_the_training_images():
    train, epochs = random_split(40), 200
    data = given(train, flip=True)
    loader = data.train_dataloader()
    images = torch.from_numpy(train.images).float()
    flipped = []
    for _ in range(epochs):
        epoch = in_order(loader)
        mirrored = (epoch == images.flip(-1)).flatten(1).all(1)
        assert (mirrored | (epoch == images).flatten(1).all(1)).all()
        flipped.append(mirrored)
    share = torch.stack(flipped).double()
    assert abs(share.mean() - 0.5) < 4 * 0.5 / math.sqrt(share.numel())
    assert (share.mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(epochs)
    assert (in_order(data.test_dataloader()).numpy() == data.raw.test.images).all()


# ---------------------------------------------------------------------------------------- Lightning


class Recorder(L.LightningModule):
    """Notes what it is given."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.image.flatten().tolist())
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, resume=None, epochs=3, **kwargs):
    module = Recorder()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)]
        if resume is None
        else [],
        enable_checkpointing=resume is None,
        **kwargs,
    )
    trainer.fit(module, binarized(random_split(22, bins=5), flip=True), ckpt_path=resume)
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "per_epoch"),
    [({}, 5), ({"limit_train_batches": 3}, 3), ({"accumulate_grad_batches": 2}, 4)],
)
def test_a_run_goes_on_where_it_stopped(tmp_path, options, per_epoch):
    """From a checkpoint of any step, in mid-epoch or at its end: the same images and coins."""
    whole = fit(tmp_path, **options)
    assert len(whole) == 3 * per_epoch
    assert len({str(batch) for batch in whole}) == len(whole)
    micro = options.get("accumulate_grad_batches", 1)
    for step in range(1, len(whole) // micro):
        rest = fit(tmp_path, resume=tmp_path / f"step={step}.ckpt", **options)
        assert rest == whole[step * micro :], step


# ---------------------------------------------------------------------------------------- conf


def compose(name, *overrides):
    resolvers.register()
    data = OmegaConf.load(CONF / f"{name}.yaml")
    config = OmegaConf.create({"seed": 0, "data": data})
    return OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides))).data


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_conf_states_every_argument(file):
    """One key per constructor argument, so that a typo is known without importing anything."""
    import inspect

    from hydra.utils import get_class

    node = compose(file.stem)
    for part in (node, node.source):
        signature = inspect.signature(get_class(part._target_))
        assert {str(key) for key in part} == {"_target_", *signature.parameters}


@pytest.mark.parametrize(("binarize", "bins"), [("none", 17), ("dynamic", 2), ("static", 2)])
def test_binarize_alone_is_enough(binarize, bins):
    from hydra.utils import instantiate

    node = compose("digits", f"data.binarize={binarize}")
    assert node.bins == bins
    data = instantiate(node)
    assert data.bins == bins
    batch = next(iter(data.train_dataloader()))
    assert batch.image.max() == bins - 1


def test_resolvers():
    resolvers.register()
    config = OmegaConf.create({"bins": 256, "top": "${log_snr_max:${bins}}"})
    # half a bin, 1/K, is 3.02 sigma_0/alpha_0 = 3.02 exp(-lambda_max/2)
    assert 3.02 * math.exp(-config.top / 2) == pytest.approx(1 / 256, rel=1e-12)


def test_names_load_no_more_than_they_need():
    code = (
        "import json, sys, genfw.train.data\n"
        "first = [m for m in ('torch', 'numpy', 'lightning', 'datasets') if m in sys.modules]\n"
        "from genfw.train.data import Batch, Folder, HubImages, Digits\n"
        "heavy = ('lightning', 'datasets', 'sklearn', 'hydra', 'omegaconf')\n"
        "print(json.dumps([first, [m for m in heavy if m in sys.modules]]))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == [[], []]
