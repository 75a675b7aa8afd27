import pytest

from genfw import NoiseSchedule, Registered
from genfw.registry import NameTaken


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
