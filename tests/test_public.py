"""What `import genfw` offers: what a person needs who writes a class of their own."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import genfw
from genfw import nets, types
from genfw.train import schema

PUBLIC = {name: getattr(genfw, name) for name in genfw.__all__}
CLASSES = {name: made for name, made in PUBLIC.items() if isinstance(made, type)}
FOREIGN = {"Callable", "Mapping", "Module", "None", "Sequence", "SupportsIndex", "Tensor"}


def test_what_a_type_checker_reads_is_what_is_loaded():
    """The two lists of `genfw/__init__.py`: the same names, of the same pages."""
    tree = ast.parse(Path(genfw.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    read = [(node.module, each) for node in block.body for each in node.names]
    assert all(each.name == each.asname for _, each in read)
    loaded = [(home, name) for home, names in genfw._HOMES.items() for name in names]
    assert sorted((home, each.name) for home, each in read) == sorted(loaded)
    assert len({name for _, name in loaded}) == len(loaded)


@pytest.mark.parametrize("name", CLASSES)
def test_what_a_class_is_made_of_is_public_too(name):
    """Its bases, which another may vary, and the types that its constructor takes."""
    cls = CLASSES[name]
    ours = {each.__name__ for each in cls.__mro__ if each.__module__.startswith("genfw.")}
    assert ours <= set(PUBLIC)
    taken = schema.parameters(cls).values() if cls.__init__ is not object.__init__ else ()
    named = re.findall(r"\b[A-Z]\w+", " ".join(str(each.annotation) for each in taken))
    assert set(named) <= {*PUBLIC, *vars(types), *nets.__all__, *FOREIGN}


def test_what_a_class_takes_does_not_change_once_torch_has_compiled(monkeypatch):
    """Its compiler puts a function of its own in the place of nn.Module's constructor."""
    init = torch.nn.Module.__init__

    def tagging(self, *args: Any, **kwargs: Any):
        init(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__init__", tagging)
    assert not schema.parameters(genfw.X0)
    assert "width" in schema.parameters(nets.MLP)
