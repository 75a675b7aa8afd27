"""What README and docs say can be typed is typed."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from genfw import Parameterization
from genfw.train.compose import compose
from genfw.train.overrides import jobs
from genfw.train.session import session

ROOT = Path(__file__).parents[1]
TEXT = "\n".join(file.read_text() for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
COMMANDS = sorted(
    set(re.findall(r"python -m genfw (?!-|sweep=|resume=)([^`#\n]+)|(--multirun [^`#\n]+)", TEXT))
)
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("command", sorted({"".join(found).strip() for found in COMMANDS}))
def test_commands_compose(command):
    words = shlex.split(command.replace("--multirun", "").replace("<folder of parquet files>", "x"))
    words = [
        word for word in words if not word.startswith("param._target_")
    ]  # test_plugins runs it
    with session():
        made = jobs(words)
        for job in made[:: max(1, len(made) - 1)]:  # the first and the last
            compose(job)


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_run(block):
    exec(block, {"__name__": "readme"})
    Parameterization.registry.pop("velocity", None)


def test_yaml_of_a_model_is_the_examples():
    (block,) = re.findall(r"```yaml\n# conf/(model/\w+.yaml)\n(.*?)```", TEXT, re.S)
    (file,) = (ROOT / "examples" / "plugin").rglob(block[0])
    assert yaml.safe_load(block[1]) == yaml.safe_load(file.read_text())
