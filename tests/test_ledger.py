"""A measurement answers for its own setting, and for no other."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
from torch import nn

import genfw
from genfw.train.data import Split
from genfw.train.errors import GenfwError
from genfw.train.features import DigitsFeatures
from genfw.train.frechet import FrechetDistance

DISTANCE = FrechetDistance(DigitsFeatures(), tiny.BINS)


@pytest.fixture
def ledger(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import ledger

    yield ledger
    del sys.modules["ledger"]


def weaker(log_snr_max=4.0):
    """As the model of `setting`, along a schedule of its own."""
    denoiser = tiny.vdm().denoiser
    denoiser.schedule = genfw.Cosine(log_snr_max=log_snr_max, log_snr_min=-6.0)
    return denoiser


def free(**settings):
    return partial(genfw.ClassifierFree, **{"scale": 3.0, **settings})


def beside(log_snr_max=4.0, shift=0.0):
    """Guidance by a weaker model."""
    other = weaker(log_snr_max)
    next(other.parameters()).data += shift
    return partial(genfw.Autoguidance, weaker=other)


def by_classifier(bias):
    classifier = nn.Linear(4, 3)
    nn.init.zeros_(classifier.weight)
    nn.init.constant_(classifier.bias, bias)
    return partial(genfw.ClassifierGuidance, classifier=classifier)


def setting(of, guidance=None, sampler=None, seed=0, samples=4, bins=3, pixel=0, shift=0.0):
    model = tiny.vdm()
    next(model.denoiser.parameters()).data += shift
    model.likelihood, model.classes = genfw.BinsLikelihood(bins), 3
    model.guidance = free() if guidance is None else guidance
    model.sampler = genfw.DDIM(steps=2) if sampler is None else sampler
    images = np.full((2, *tiny.SHAPE), pixel, dtype=np.uint8)
    return of.setting(model, DISTANCE, Split(images, np.zeros(2, int)), seed, samples)


OTHERS = {
    "interval": {"guidance": free(interval=[-3.0, 3.0])},
    "another interval": {"guidance": free(interval=[-3.0, 3.0000001])},
    "rescale": {"guidance": free(rescale=0.7)},
    "scale": {"guidance": free(scale=2.0)},
    "unguided": {"guidance": genfw.Unguided},
    "weaker": {"guidance": beside()},
    "weaker's weights": {"guidance": beside(shift=1e-6)},
    "weaker's schedule": {"guidance": beside(log_snr_max=5.0)},
    "classifier": {"guidance": by_classifier(0.0)},
    "classifier's weights": {"guidance": by_classifier(0.1)},
    "steps": {"sampler": genfw.DDIM(steps=3)},
    "eta": {"sampler": genfw.DDIM(steps=2, eta=0.3)},
    "another eta": {"sampler": genfw.DDIM(steps=2, eta=0.3000001)},
    "sampler": {"sampler": genfw.Heun(steps=2)},
    "grid": {"sampler": genfw.DDIM(steps=2, grid=genfw.KarrasGrid())},
    "rho": {"sampler": genfw.DDIM(steps=2, grid=genfw.KarrasGrid(rho=6.0))},
    "seed": {"seed": 1},
    "samples": {"samples": 5},
    "values": {"bins": 4},
    "reference": {"pixel": 1},
    "weights": {"shift": 1e-6},
}


def test_a_line_answers_for_its_setting_alone(ledger, tmp_path):
    """Of all settings that differ in one thing, each has what was measured in it, and a second
    reader of the file finds the same."""
    settings = [setting(ledger), *(setting(ledger, **other) for other in OTHERS.values())]
    book = ledger.Ledger(tmp_path / "lines.jsonl")
    for value, each in enumerate(settings):
        assert not book.of(each), [*OTHERS][value - 1]
        book.add(each, 0, value=value)
    again = ledger.Ledger(book.file)
    for value, each in enumerate(settings):
        assert again.of(each)[0]["value"] == value and set(again.of(each)) == {0}
    assert again.of(setting(ledger))[0]["value"] == 0


def test_lines_side_by_side_differ_in_what_was_named_alone(ledger, tmp_path):
    book = ledger.Ledger(tmp_path / "lines.jsonl")
    for name in ("seed", "steps", "grid", "weights"):
        book.add(setting(ledger, **OTHERS[name]), 0, name=name)
    found = book.like(setting(ledger), "sampler", "calls")
    assert [line["name"] for line in found] == ["steps", "grid"]


def test_a_line_that_was_cut_is_named(ledger, tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"setting": {}, "set": 0}\n{"setting": {"se')
    with pytest.raises(GenfwError, match=r"lines.jsonl: line 2 is not whole"):
        ledger.Ledger(file)
