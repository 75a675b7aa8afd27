"""What a class named by `_target_` can be given, read without importing it.

The defaults in the class's own conf file are its types: `steps: 250` takes an integer, `raw: false`
a truth value, `lr: 1.0e-3` any number. A comment that begins with types says more than a default
can:

    steps: null                        # int | None: None is continuous time
    log_snr_max: ${log_snr_max:...}    # float

    binarize: none                     # none | dynamic | static

A null or an interpolation without such a comment takes anything. A class without a conf file is
imported, and its signature read in the same way.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
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
_COMMENT = re.compile(
    rf"^\s*(\w+):.*?\s#\s*((?:{'|'.join(TYPES)})(?:\s*\|\s*(?:{'|'.join(TYPES)}))*)\s*(?::|$)", re.M
)
_CHOICES = re.compile(r"^\s*(\w+):\s*(\w+)\s+#\s*(\w+(?:\s*\|\s*\w+)+)", re.M)
_TARGET = re.compile(r"^\s*(?:- )?_target_:\s*['\"]?([\w.]+)", re.M)


@dataclass(frozen=True)
class Argument:
    """One argument: the types and values it takes (None: any), and whether it must be given."""

    types: frozenset[str] | None = None
    elements: frozenset[str] | None = None
    choices: tuple[str, ...] | None = None
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
                for target in dict.fromkeys(_TARGET.findall(file.read_text())):
                    self.files.setdefault(target, []).append(file)

    def schema(self, target: str) -> Schema | None:
        """All arguments that a conf file gives to this class, its own file first; None where no
        file names it."""
        found: dict[str, Argument] = {}
        complete = target.startswith("genfw.")
        loaded = [(OmegaConf.load(file), file) for file in self.files.get(target, [])]
        loaded.sort(key=lambda each: OmegaConf.select(each[0], "_target_") != target)
        for content, file in loaded:
            comments = _Comments(file.read_text())
            for node in nodes(content, target):
                complete |= node is content  # the class's own file
                for key in node:
                    if key not in (*RESERVED, "defaults"):
                        found.setdefault(str(key), _argument(node, str(key), comments))
        if not complete:
            found = {key: replace(argument, required=False) for key, argument in found.items()}
        return Schema(found, complete) if target in self.files else None


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
    """
    init = getattr(made, "__init__", None)
    if getattr(init, "__module__", None) == "torch.nn.modules.module":
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
    """What the comments of a conf file say of types and values."""

    def __init__(self, text: str):
        self.types = {key: _parse(types) for key, types in _COMMENT.findall(text)}
        self.choices = {
            key: found
            for key, default, listed in _CHOICES.findall(text)
            if default in (found := tuple(each.strip() for each in listed.split("|")))
        }


def _argument(node: DictConfig, key: str, comments: _Comments) -> Argument:
    types = comments.types.get(key)
    if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
        return Argument(types, required=types is None or "None" not in types)
    default = node[key]
    if types or default is None:
        return Argument(types, default=default)
    elements = None
    if isinstance(default, ListConfig) and len(default):
        kinds = [type_of(each) for each in default]
        if None not in kinds:
            elements = frozenset[str]().union(*(kind for kind in kinds if kind))
    return Argument(type_of(default), elements, comments.choices.get(key), default)


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
