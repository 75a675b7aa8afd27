"""What genfw uses of other packages and they do not promise to keep: a version without one of them
says so here, and where it is needed, not in the middle of a run."""

import ast
from pathlib import Path

import pytest
import tiny
import torch
from lightning.fabric.strategies.launchers import subprocess_script
from omegaconf import OmegaConf
from torch import nn

ROOT = Path(__file__).parents[1]
PROMISED = {"_exit", "_fields", "_replace", "_target_"}  # of os, of tuples, and Hydra's key


def private():
    """{name: where it is used} of attributes that begin with _ and that genfw gives nothing."""
    given, used = set(PROMISED), {}
    for file in sorted((ROOT / "genfw").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.FunctionDef() | ast.ClassDef():
                    given.add(node.name)
                case ast.Name(ctx=ast.Store()):
                    given.add(node.id)
                case ast.Attribute(attr=name) if name.startswith("_") and name[1] != "_":
                    place = f"{file.relative_to(ROOT)}:{node.lineno}"
                    used.setdefault(name, []).append(place)
                    if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                        given.add(name)
    return {name: places for name, places in used.items() if name not in given}


USED = private()


@pytest.fixture(scope="module")
def holders(tmp_path_factory):
    """{name: what must have it}."""
    trainer = tiny.trainer(tmp_path_factory.mktemp("trainer"))
    loop, observer = trainer.fit_loop, subprocess_script._ChildProcessObserver
    steps = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    node, every = OmegaConf.create({"a": [1]}), {}
    for holder, names in (
        (subprocess_script, "_ChildProcessObserver"),
        (observer(main_pid=0, child_processes=[]), "_child_processes _terminate_all"),
        (loop, "_data_fetcher"),
        (loop.epoch_loop, "_batches_that_stepped _is_training_done _should_check_val_fx"),
        (trainer, "_logger_connector"),
        (trainer._logger_connector, "_first_loop_iter"),
        (steps, "_last_lr"),
        (torch, "_assert_async _foreach_lerp_"),
        (torch.ones(1).untyped_storage(), "_cdata"),
        (nn.Module(), "_modules"),
        (node, "_get_full_key _get_node _get_root _is_missing _is_none"),
        (node.a, "_iter_ex"),
    ):
        every |= dict.fromkeys(names.split(), holder)
    return every


@pytest.mark.parametrize("name", USED)
def test_it_is_there(name, holders):
    assert name in holders, f"{name}, used in {USED[name]}: say here whose it is"
    whose = type(holders[name]).__name__
    assert hasattr(holders[name], name), f"{whose} has no {name}, which {USED[name]} use"


def test_nothing_is_held_that_nobody_uses(holders):
    assert set(holders) == set(USED)
