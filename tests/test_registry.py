from pathlib import Path

import pytest
import tiny
from omegaconf import OmegaConf

import genfw
from genfw import NoiseSchedule, Registered
from genfw.registry import NameTaken
from genfw.train.entries import named
from genfw.train.sample_files import about


def test_a_name_enters_the_registry_of_its_interface_only():
    class Shape(Registered, group="shape_test"): ...

    class Round(Shape, name="round"): ...

    class Oval(Round): ...

    assert Shape.registry == {"round": Round} and Round.name == "round"
    assert "round" not in NoiseSchedule.registry
    assert Registered.groups["shape_test"] is Shape


def test_a_name_is_given_once():
    class Shape(Registered, group="shape_test"): ...

    class Round(Shape, name="round"): ...

    with pytest.raises(NameTaken, match=r"'round' is already .*Round.* give .*Ball another name"):

        class Ball(Shape, name="round"): ...


def test_a_name_needs_an_interface():
    with pytest.raises(TypeError, match="no interface with a registry"):

        class Lost(Registered, name="lost"): ...


class Estimated(genfw.Bound): ...


class Stepped(genfw.Ancestral): ...


class Spaced(genfw.UniformGrid): ...


class Guided(genfw.Unguided):
    title = genfw.Guidance.title


class Minimised(genfw.Elbo): ...


def test_a_class_is_called_by_its_own_name_alone():
    """By the one it is chosen by, or else by its class's: never by that of what it varies."""
    for interface in Registered.groups.values():
        for name, cls in interface.registry.items():
            assert cls.called() == name
    assert genfw.Estimator.called() == "Estimator"
    for cls in (Estimated, Stepped, Spaced, Guided, Minimised):
        assert cls.called() == cls.__name__ and cls.name != cls.__name__


def test_what_has_no_name_is_shown_by_its_class():
    """In an entry of evaluation.json, in what made samples, in messages."""
    assert named(Estimated(2, 8), "best", []) == "Estimated(sets=2, strata=8) of best"
    assert Minimised().title == "Minimised" and genfw.Elbo().title == "objective=elbo"
    model = tiny.vdm()
    model.sampler, model.guidance = Stepped(7, Spaced()), Guided
    options = OmegaConf.create({"checkpoint": "best", "seed": 0})
    shown = about(Path("run"), OmegaConf.create(), options, model, None)
    assert shown["sampler"].startswith("Stepped(steps=7") and shown["grid"] == "Spaced"
    assert shown["guidance"] == "Guided()"
