"""Which samples few steps are measured by, and what they are compared with."""

import json
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
from matplotlib.figure import Figure
from omegaconf import OmegaConf

import genfw
from genfw.train.data import Split
from genfw.train.errors import ConfigError
from genfw.train.features import DigitsFeatures
from genfw.train.frechet import FrechetDistance

SCALED = partial(genfw.EpsilonScaling, scale=1.3, interval=[-1.0, 2.5])
SAID = "epsilon_scaling (scale=1.3, interval=[-1.0, 2.5])"


class Data:
    def split(self, name):
        return Split(np.zeros((2, 1, 8, 8), np.uint8), np.zeros(2, int))


@pytest.fixture
def few_steps(monkeypatch, tmp_path):
    """The command, of a tiny model that is guided, whose distances are those of its guidance: 2
    without and 1 with, and i hundredths for set i. It returns the lines of its ledger."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import few_steps

    @contextmanager
    def trained(*_):
        model = tiny.vdm()
        model.guidance = SCALED
        yield model, tiny.module(), Data()

    def measured(model, distance, seed, i, options):
        return (1 if isinstance(model.guided(), genfw.EpsilonScaling) else 2) + i / 100

    def read(arguments, defaults, usage, keeps):
        return tmp_path, None, OmegaConf.create({**defaults, **arguments})

    distance = FrechetDistance(DigitsFeatures(), 17)
    for name, stand_in in {
        "trained_vdm": trained,
        "measured": measured,
        "read": read,
        "extracted": lambda config: distance,
        "origin": lambda *_: "a model",
        "plot": lambda *_: Figure(),
    }.items():
        monkeypatch.setattr(few_steps, name, stand_in)

    def run(**arguments):
        given = {"sets": 2, "samplers": ["ddim"], "evaluations": [4], **arguments}
        few_steps.few_steps(given)
        text = (tmp_path / "few_steps" / "few_steps.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    yield run
    for name in ("few_steps", "ledger", "trained"):
        del sys.modules[name]


@pytest.mark.parametrize(
    ("against", "reference", "says"),
    [
        ("guided", f"ancestral, under {SAID}", "+0.0 %, +0.000"),
        ("plain", "ancestral", "-49.9 %, -1.000"),
    ],
)
def test_samples_are_guided_and_the_reference_as_it_was_asked_for(
    few_steps, against, reference, says, tmp_path, capsys
):
    lines = few_steps(against=against)
    guidance = [line["setting"]["guidance"]["is"] for line in lines]
    first = "none" if against == "plain" else "epsilon_scaling"
    assert guidance == [first] * 2 + ["epsilon_scaling"] * 4
    assert [line["setting"]["calls"] for line in lines] == [1000] * 2 + [20] * 2 + [4] * 2
    text = (tmp_path / "few_steps" / "few_steps.md").read_text()
    row = f"dpm_solver, under {SAID}, uniform, 20 calls"
    assert f"{row} against {reference}, uniform, 1000 calls: {says}" in text
    assert text in capsys.readouterr().out
    assert few_steps(against=against) == lines, "what is known is not measured again"


def test_a_table_holds_both_guidances(few_steps, tmp_path):
    few_steps(against="guided")
    lines = few_steps(against="plain")
    assert len(lines) == 6 + 2
    text = (tmp_path / "few_steps" / "few_steps.md").read_text()
    assert "; ancestral, uniform, 1000 calls: 2.005 ± 0.005 (2 sets)" in text
    assert f"| ancestral, under {SAID} | uniform |  |  | 1.005 ± 0.005 |" in text


def test_another_comparison_is_refused(few_steps):
    with pytest.raises(ConfigError, match="against=both: expected guided or plain"):
        few_steps(against="both")
