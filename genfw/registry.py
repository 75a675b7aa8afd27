"""Every interface keeps the list of its implementations.

    class NoiseSchedule(Registered, ABC, group="schedule"): ...   # opens a registry
    class Cosine(NoiseSchedule, name="cosine"): ...               # enters it

There is no central list: a class is registered where it is written, be it here or in somebody
else's package.
"""

from __future__ import annotations

from typing import Any, ClassVar


class NameTaken(TypeError):
    """Another class holds the name; says which, and whose it would be."""


class Registered:
    """Base of every interface whose implementations are chosen by name.

    Args (of the class statement):
        group: opens a registry of this name; given once, by the interface.
        name: enters the class into the registry of its interface; given by each implementation.

    Raises:
        TypeError: a name without an interface.
        NameTaken: a name that another class already holds.

    Example:
        >>> class Greeting(Registered, group="greeting_doctest"): ...
        >>> class Hello(Greeting, name="hello"): ...
        >>> Greeting.registry
        {'hello': <class 'genfw.registry.Hello'>}
    """

    groups: ClassVar[dict[str, type[Registered]]] = {}
    registry: ClassVar[dict[str, type[Any]]]
    group: ClassVar[str]
    name: ClassVar[str]

    def __init_subclass__(
        cls, *, name: str | None = None, group: str | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if group is not None:
            cls.group, cls.registry = group, {}
            Registered.groups[group] = cls
        if name is not None:
            if not hasattr(cls, "registry"):
                raise TypeError(
                    f"{cls.__qualname__} has name={name!r} but no interface with a registry: "
                    "subclass one that was opened with group=..."
                )
            held = cls.registry.get(name)
            if held is not None and _path(held) != _path(cls):
                raise NameTaken(
                    f"{cls.group}={name!r} is already {_path(held)}: give {_path(cls)} another name"
                )
            cls.name = name
            cls.registry[name] = cls

    @classmethod
    def called(cls) -> str:
        """What records and messages call it: the name it is chosen by; its class's where it was
        given none of its own, whatever that of the class it varies."""
        return vars(cls).get("name") or cls.__name__


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
