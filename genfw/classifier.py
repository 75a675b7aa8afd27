"""python -m genfw.classifier [data=digits] [key=value ...]: a classifier of noisy images.

For `python -m genfw.sample run=<a diffusion model's> guidance=classifier
guidance.classifier=<this run's folder> label=7`. Its settings stand in conf/classifier.yaml. The
run folder holds config.yaml, checkpoints/, metrics.csv (accuracy by log SNR) and results.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf, open_dict

from genfw.train.compose import compose, session
from genfw.train.config import data_are_there
from genfw.train.errors import ConfigError
from genfw.train.jobs import own_folder
from genfw.train.runs import command

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from genfw.train.job import Results


def classify(arguments: Sequence[str]) -> None:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return
    if flags := [each for each in arguments if each.startswith("-")]:
        raise ConfigError(f"{flags[0]}: expected group=option or key=value: see --help")
    with session():
        config = compose(arguments, "classifier")
        data_are_there(config)
        folder = own_folder(config, "hydra.run.dir")
        with open_dict(config):
            config.pop("hydra")
        run(config, folder)


def run(config: DictConfig, folder: Path) -> Results:
    """Trains, then tests the best weights; what is in results.json."""
    import lightning.pytorch as L

    from genfw.train import job
    from genfw.train.checkpoint import AtomicIO
    from genfw.train.classifier import assemble
    from genfw.train.config import build
    from genfw.train.keeper import Keeper
    from genfw.train.signals import Signals

    job.prepare()
    OmegaConf.save(OmegaConf.create(job.container(config)), folder / "config.yaml")
    L.seed_everything(config.seed, workers=True, verbose=False)
    module, data = assemble(config), build(config.data)
    loggers = [build(node, folder=folder) for node in job.nodes(config.logger)]
    callbacks = [build(node) for node in job.nodes(config.callbacks)]
    print(f"classifier of {module.classifier.extra_repr()}\nrun folder: {folder}", flush=True)
    with Signals() as signals:
        files = AtomicIO()
        keeper = Keeper(folder / "checkpoints", files, signals)
        trainer = job.make_trainer(config, folder, loggers, [signals, *callbacks, keeper], files)
        trainer.fit(module, data)
        trainer.validate(module, data, verbose=False)  # steps after the last validation count
        (tested,) = trainer.test(
            module, data, ckpt_path=keeper.path, weights_only=True, verbose=False
        )
    results: Results = {**tested, **job.versions()}
    job.write(folder / "results.json", results)
    for key, value in tested.items():
        print(f"{key:28}{value:.4f}")
    print(f"run folder: {folder}")
    return results


if __name__ == "__main__":
    sys.exit(command(classify))
