"""What a class named by `_target_` can be given, read without importing it.

The defaults in the class's own conf file are its types: `steps: 250` takes an integer, `raw: false`
a truth value, `lr: 1.0e-3` any number. A comment that begins with types says more than a default
can:

    steps: null                        # int | None: None is continuous time
    log_snr_max: ${log_snr_max:...}    # float

    binarize: none                     # none | dynamic | static

and so does one that begins with where a number lies (of a list, each), after its types:

    steps: 64                          # >= 1: more steps are no better
    decay: 0.999                       # [0, 1)
    steps: null                        # int | None, >= 1

A list's elements are of the types of those in its default, or of those in the comment:

    latents: [16, 8]                   # list[int | list], >= 1

A null or an interpolation without such a comment takes anything. A class without a conf file is
imported, and its signature read in the same way.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

TYPES = ("bool", "int", "float", "str", "list", "dict", "None")

RESERVED = ("_target_", "_partial_")

_ALIASES = {
    "Sequence": "list",
    "tuple": "list",
    "Mapping": "dict",
    "Path": "str",
    "NoneType": "None",
}
_KEY = re.compile(r"( *)(- )?(\w+):(.*)")
_NAME, _NUMBER = "|".join(TYPES), r"-?[\d.]+"
_TYPE = rf"list\[[^\]]*\]|{_NAME}"
_COMMENT = re.compile(
    rf".*?\s#\s*((?:{_TYPE})(?:\s*\|\s*(?:{_TYPE}))*)?,?\s*"
    rf"(>=?\s*{_NUMBER}|[\[(]{_NUMBER},\s*{_NUMBER}[\])])?\s*(?::|$)"
)
_CHOICES = re.compile(r"\s*(\w+)\s+#\s*(\w+(?:\s*\|\s*\w+)+)")
_TARGET = re.compile(r"^\s*(?:- )?_target_:\s*['\"]?([\w.]+)", re.M)


@dataclass(frozen=True)
class Range:
    """Where a number lies. It is finite.

    Example:
        >>> half = Range.parse("[0, 1)")
        >>> [each in half for each in (-0.1, 0, 0.9, 1, math.nan)]
        [False, True, True, False, False]
        >>> print(half, Range.parse(">= 1"), Range.parse("> 0"), sep="; ")
        in [0, 1); of at least 1; above 0
    """

    low: float
    high: float
    with_low: bool
    with_high: bool

    @classmethod
    def parse(cls, text: str) -> Range:
        """Of `[0, 1)`, `> 0`, or `>= 1`."""
        ends = [float(each) for each in re.findall(_NUMBER, text)]
        low, high = (*ends, math.inf)[:2]
        return cls(low, high, text.startswith(("[", ">=")), text.endswith("]"))

    def __contains__(self, value: int | float) -> bool:
        within = self.low < value < self.high
        at_end = (value == self.low and self.with_low) or (value == self.high and self.with_high)
        return math.isfinite(value) and (within or at_end)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"of at least {self.low:g}" if self.with_low else f"above {self.low:g}"
        left, right = "(["[self.with_low], ")]"[self.with_high]
        return f"in {left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True)
class Argument:
    """One argument: the types and values it takes (None: any), and whether it must be given."""

    types: frozenset[str] | None = None
    elements: frozenset[str] | None = None
    choices: tuple[str, ...] | None = None
    range: Range | None = None
    default: Any = None
    required: bool = False

    def expected(self) -> str:
        return " or ".join(t for t in TYPES if self.types is None or t in self.types)


@dataclass(frozen=True)
class Schema:
    """The arguments of one class.

    Attributes:
        complete: False where other arguments may exist: a conf file that sets only some of a
            foreign class's.
    """

    arguments: Mapping[str, Argument] = field(default_factory=dict)
    complete: bool = True


class ConfFiles:
    """The schemas that conf folders state. A file is parsed when its class is asked for."""

    def __init__(self, folders: Iterable[Path]):
        self.files: dict[str, list[Path]] = {}
        for folder in folders:
            for file in sorted(folder.rglob("*.yaml")):
                for target in dict.fromkeys(_TARGET.findall(_read(file))):
                    self.files.setdefault(target, []).append(file)

    def schema(self, target: str) -> Schema | None:
        """All arguments that a conf file gives to this class, its own file first; None where no
        file names it."""
        found: dict[str, Argument] = {}
        complete = target.startswith("genfw.")
        loaded = [(_parsed(text), text) for text in map(_read, self.files.get(target, []))]
        loaded.sort(key=lambda each: OmegaConf.select(each[0], "_target_") != target)
        for content, text in loaded:
            comments = _Comments(text)
            for node in nodes(content, target):
                complete |= node is content  # the class's own file
                for key in node:
                    if key not in (*RESERVED, "defaults"):
                        found.setdefault(str(key), _argument(node, str(key), comments))
        if not complete:
            found = {key: replace(argument, required=False) for key, argument in found.items()}
        return Schema(found, complete) if target in self.files else None


def _read(file: Path) -> str:
    return _text(file, file.stat().st_mtime_ns)


@functools.cache
def _text(file: Path, modified: int) -> str:
    return file.read_text()


@functools.cache
def _parsed(text: str) -> DictConfig | ListConfig:
    """Not to be changed: every schema reads it."""
    return OmegaConf.create(text)


def from_signature(made: Callable[..., Any]) -> Schema:
    """The same, of something already imported."""
    found: dict[str, Argument] = {}
    complete = True
    for name, parameter in parameters(made).items():
        if parameter.kind is parameter.VAR_KEYWORD:
            complete = False
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            annotated, default = parameter.annotation, parameter.default
            required = default is parameter.empty
            types = None
            if annotated is not parameter.empty:
                text = (
                    annotated if isinstance(annotated, str) else inspect.formatannotation(annotated)
                )
                types = _parse(text)
            elif not required and default is not None:
                types = type_of(default)
            found[name] = Argument(types, default=None if required else default, required=required)
    return Schema(found, complete)


def parameters(made: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """A signature's parameters.

    A module without a constructor of its own inherits `nn.Module`'s (*args, **kwargs): nothing.
    Whose it is, its class says: torch's compiler puts a function of its own there.
    """
    owner = next((each for each in getattr(made, "__mro__", ()) if "__init__" in vars(each)), None)
    if getattr(owner, "__module__", None) == "torch.nn.modules.module":
        return {}
    return inspect.signature(made).parameters


def nodes(content: Any, target: str) -> Iterable[DictConfig]:
    """All nodes below `content` that name this class."""
    if isinstance(content, DictConfig):
        if content.get("_target_") == target:
            yield content
        for key in content:
            if not OmegaConf.is_interpolation(content, str(key)):
                yield from nodes(content._get_node(key), target)
    elif isinstance(content, ListConfig):
        for i in range(len(content)):
            if not OmegaConf.is_interpolation(content, i):
                yield from nodes(content._get_node(i), target)


def type_of(value: Any) -> frozenset[str] | None:
    """The name of a plain value's type; None if it is not plain."""
    if value is None:
        return frozenset({"None"})
    if isinstance(value, (list, tuple, ListConfig)):
        return frozenset({"list"})
    if isinstance(value, (dict, DictConfig)):
        return frozenset({"dict"})
    name = type(value).__name__
    return frozenset({name}) if name in TYPES else None


def fits(value: Any, types: frozenset[str] | None) -> bool:
    """Whether the value is one of these types. An integer is also a float."""
    found = type_of(value)
    if types is None or found is None:
        return True
    return bool(found & types) or (found == {"int"} and "float" in types)


class _Comments:
    """What the comments of a conf file say of types, values and ranges, {dotted key: it}."""

    def __init__(self, text: str):
        self.types: dict[str, frozenset[str] | None] = {}
        self.elements: dict[str, frozenset[str] | None] = {}
        self.choices: dict[str, tuple[str, ...]] = {}
        self.ranges: dict[str, Range] = {}
        for key, line in _lines(text):
            if said := _COMMENT.match(line):
                if said[1]:
                    self.types[key] = _parse(said[1])
                    if within := re.search(r"list\[(.*?)\]", said[1]):
                        self.elements[key] = _parse(within[1])
                if said[2]:
                    self.ranges[key] = Range.parse(said[2])
            if listed := _CHOICES.match(line):
                found = tuple(each.strip() for each in listed[2].split("|"))
                if listed[1] in found:
                    self.choices[key] = found


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """(dotted key, what follows it) of every line of a YAML file that has a key."""
    above: list[tuple[int, str]] = []  # (indent, name), items of lists half a step further in
    items: dict[str, int] = {}
    for line in text.splitlines():
        if not (found := _KEY.match(line)):
            continue
        indent, dash, name, rest = len(found[1]), found[2], found[3], found[4]
        above = [each for each in above if each[0] < indent]
        if dash:
            place = "".join(each for _, each in above)
            items[place] = items.get(place, -1) + 1
            above.append((indent + 1, f"[{items[place]}]"))
            indent += len(dash)
        above.append((indent, f".{name}"))
        yield "".join(each for _, each in above).lstrip("."), rest


def _argument(node: DictConfig, key: str, comments: _Comments) -> Argument:
    at = str(node._get_full_key(key))
    types, within = comments.types.get(at), comments.ranges.get(at)
    elements = comments.elements.get(at)
    if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
        required = types is None or "None" not in types
        return Argument(types, elements, range=within, required=required)
    default = node[key]
    if types or default is None:
        return Argument(types, elements, range=within, default=default)
    if isinstance(default, ListConfig) and len(default):
        kinds = [type_of(each) for each in default]
        if None not in kinds:
            elements = frozenset[str]().union(*(kind for kind in kinds if kind))
    choices = comments.choices.get(at)
    return Argument(type_of(default), elements, choices, within, default)


def _parse(text: str) -> frozenset[str] | None:
    """The type names in an annotation such as `int | None`; None if it says something else too."""
    optional = re.fullmatch(r"(?:typing\.)?Optional\[(.*)\]", text.strip())
    if optional:
        text = f"{optional[1]} | None"
    names = set()
    for part in _split(text):
        name = part.split("[")[0].rsplit(".", 1)[-1].strip()
        name = _ALIASES.get(name, name)
        if name not in TYPES:
            return None
        names.add(name)
    return frozenset(names)


def _split(text: str) -> list[str]:
    """`a[b | c] | d` at its outer bars."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
