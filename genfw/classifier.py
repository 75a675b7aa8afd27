"""python -m genfw.classifier [data=digits] [key=value ...]: a classifier of noisy images.

python -m genfw.classifier resume=<folder>: goes on with one that was interrupted.

For `python -m genfw.sample run=<a diffusion model's> guidance=classifier
guidance.classifier=<this run's folder> label=7`. Its settings stand in conf/classifier.yaml. The
run folder holds config.yaml, checkpoints/, metrics.csv (accuracy by log SNR) and results.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from omegaconf import open_dict

from genfw.train import resume
from genfw.train.compose import compose
from genfw.train.errors import ConfigError
from genfw.train.rules.data import data_are_there
from genfw.train.run_folder import locked, noted, own_folder
from genfw.train.runs import command
from genfw.train.session import session


def classify(arguments: Sequence[str]) -> None:
    if flags := [each for each in arguments if each.startswith("-")]:
        raise ConfigError(f"{flags[0]}: expected group=option or key=value: see --help")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `_target_: my_file.Net` may name a file beside the person
    if resume.asked(arguments):
        resume.resume(arguments)
        return
    with session(overrides=arguments):
        config = compose(arguments, "classifier")
        data_are_there(config)
        folder = own_folder(config, "hydra.run.dir")
        with open_dict(config):
            config.pop("hydra")

    from genfw.train.classifier_job import run

    with locked(folder), noted(folder):
        run(config, folder)


if __name__ == "__main__":
    sys.exit(command(classify))
