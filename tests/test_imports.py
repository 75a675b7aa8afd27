"""Imports never run upward, and the ground floor does not know the top floor."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "genfw"

BASE = {
    *("check", "types", "values", "registry", "noise", "amplitudes"),
    *("elbo", "distributions", "discretized", "bayes"),
}
INTERFACES = {"model", "likelihood", "schedule", "parameterization"}
MODELS = {"models", "objective", "estimators"}

# What each part of genfw may import of genfw. A part is a module or a package at the top.
MAY = {
    **dict.fromkeys(BASE, BASE),
    **dict.fromkeys(INTERFACES, BASE),
    "diffusion": BASE | INTERFACES | {"diffusion"},
    **dict.fromkeys(MODELS, BASE | INTERFACES | {"diffusion"}),
    "nets": {"check", "types", "values", "registry", "nets"},
    "testing": BASE | INTERFACES | MODELS | {"diffusion", "nets", "testing"},
    "train": BASE | INTERFACES | MODELS | {"diffusion", "nets", "train"},
    **dict.fromkeys(
        ("__main__", "classifier", "evaluate", "export", "sample"),
        BASE | INTERFACES | MODELS | {"diffusion", "nets", "train"},
    ),
    "__init__": BASE | INTERFACES | MODELS | {"diffusion", "nets", "testing"},
}

# The estimator that knows one model: it solves a flow that a VDM alone has.
BESIDE = {"estimators/ode.py": {"genfw.models.vdm"}}

HEAVY = {"lightning", "torchmetrics", "wandb", "hydra", "omegaconf", "pytorch_lightning"}
COMMANDS = ("__main__.py", "classifier.py", "evaluate.py", "export.py", "sample.py")
HYDRA = {
    *("train/plugins.py", "train/overrides.py", "train/session.py", "train/explain.py"),
    *("train/compose.py", "train/jobs.py", "train/sweep.py"),
    *COMMANDS,
}

FILES = sorted(file.relative_to(ROOT).as_posix() for file in ROOT.rglob("*.py"))


def imported(file: str) -> set[str]:
    """Every absolute module a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            names = {f"{module}.{each.name}" for each in node.names}
            found |= names if module == "genfw" else {module}
    return found


@pytest.mark.parametrize("file", FILES)
def test_imports_run_downward(file):
    part = file.split("/")[0].removesuffix(".py")
    assert part in MAY, f"{file} has no place in the table of layers"
    beside, names = BESIDE.get(file, set()), imported(file)
    assert beside <= names, f"{file} imports less than it is allowed: {sorted(beside - names)}"
    parts = {name.split(".")[1] for name in names - beside if name.startswith("genfw.")}
    assert parts <= MAY[part] | {part}, f"{file} imports upward: {sorted(parts - MAY[part])}"


@pytest.mark.parametrize("file", FILES)
def test_only_the_top_floor_knows_the_stack(file):
    packages = {name.split(".")[0] for name in imported(file)}
    if not file.startswith(("train/", *COMMANDS)):
        assert not packages & HEAVY
    elif file not in HYDRA:
        assert "hydra" not in packages


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after running this."""
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_genfw_loads_nothing_heavy():
    assert not loaded("import genfw") & (HEAVY | {"torch", "numpy"})


def test_no_public_name_loads_the_top_floor():
    names = loaded("import genfw\nfor name in dir(genfw): getattr(genfw, name)")
    assert "torch" in names
    assert not names & HEAVY


def test_configuration_is_checked_without_torch():
    modules = (
        "config",
        "schema",
        "compose",
        "plugins",
        "jobs",
        "run_folder",
        "help",
        "errors",
        "resolvers",
    )
    code = "\n".join(f"import genfw.train.{module}" for module in modules)
    code += "\nimport genfw.__main__"
    assert not loaded(code) & {"torch", "lightning", "wandb", "torchmetrics"}
