"""python -m genfw.evaluate run=<folder>: the test NLL of a finished run, computed again.

The same images, weights and random numbers as at the run's end, so the same number; another
estimator may be chosen, `estimator=importance_weighted` (one of your own YAMLs too, with
`--config-dir=<folder>`), and settings of the run's config.yaml changed, `estimator.k=500`. Written
to `<folder>/evaluation.json`, which keeps one entry per estimator, weights and other change, those
of weights that a run going on has replaced too:
{"importance_weighted(k=500) of best at step 2600, model.steps=100": {"kind": ..., "test/nll": ...,
"certificate": {...}}}.

`estimator=annealed simulated=100` also says how loose that estimate is: of 100 images that the
model made itself, log p(x) is bounded from both sides (bidirectional Monte Carlo), and
`test/looseness` is how far apart the two are in the mean, in nats.

How samples are drawn (sampler, grid, guidance) is refused: an NLL is of the bare model. So is what
only training read, and the groups that a model was made of: its schedule is changed where the model
has it, `model.denoiser.schedule.log_snr_max=12`.

`verify=true` computes a number again that was written down, and compares: the run's own, in
certificate.json and results.json; with the arguments that gave an entry of evaluation.json, that
entry (but for its looseness, which no certificate is about). What the run's config.yaml says anyhow
may be said again, `seed=0`, and asks for no other number. Other `data.` and `trainer.` may be
added, such as `trainer.accelerator=cpu`: the certificate says whether they matter. Exit code 0
where everything holds, 1 and a line for each that does not.

`wandb=true` also logs the entry to W&B, as a run of its own (job type "evaluate") in the trained
run's group or, where it has none, one of its id; the same entry computed again goes on with the
same run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from genfw.train.entries import claim, compare, keep, named, news
from genfw.train.errors import ConfigError, GenfwError, not_finite
from genfw.train.runs import all_but, checkpoint, command, read, unguided
from genfw.train.schema import nodes

if TYPE_CHECKING:
    from genfw.train.loggers import Wandb
    from genfw.train.module import LatentModule

USAGE = """python -m genfw.evaluate run=<folder> [checkpoint=best] [verify=true] [simulated=100]
  [wandb=true] [key=value ...]
Example: python -m genfw.evaluate run=outputs/2026-11-23_10-15-42_k3f9ab estimator.strata=128"""

CHANGES = ("estimator", "model", "data", "trainer", "seed", "trusted")
"""Of a run's configuration, what a number is computed from. The groups a model was made of stand in
config.yaml a second time, by themselves, where nothing reads them any more."""


def evaluate(arguments: Sequence[str]) -> None:
    defaults = {"checkpoint": "best", "verify": False, "simulated": 0, "wandb": False}
    folder, config, options = read(arguments, defaults, USAGE, keeps=_no_matter)
    _can_be_simulated(config, options.simulated)
    loggers = _asked_loggers(config, options)

    from rich.console import Console

    from genfw.train.certificate import certify, given, kind, versions
    from genfw.train.config import build
    from genfw.train.parts import restore, served
    from genfw.train.process import prepare
    from genfw.train.run_table import table

    prepare()
    weights = checkpoint(folder, options.checkpoint)
    unguided(config)
    module, data = restore(config, weights)
    served(module.model, module.estimator)
    changed = news(arguments, folder, config, defaults)
    asked = (module.estimator, f"{options.checkpoint} at step {module.reached}", changed)
    claimed = claim(folder, *asked) if options.verify else None
    trainer = build(
        config.trainer,
        logger=False,
        callbacks=[],
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=str(folder),
    )
    tested = trainer.test(module, data, verbose=False)[0]
    found = certify(module, data, tested, weights)
    conditions = {f"test/{name}": said for name, said in given(module).items()}
    results = {**tested, **conditions, **versions()}
    if claimed is not None:
        said = compare(claimed, found, tested)
        if trainer.is_global_zero:
            print(said)
        return
    name = named(*asked)
    if trainer.is_global_zero:
        Console().print(name, table(results, module, found["data"].get("of")), sep="\n")
    try:
        if options.simulated:
            results |= looseness(module, options.simulated)
            if trainer.is_global_zero:
                print(
                    f"on {options.simulated} simulated images the two bounds are apart by "
                    f"{results['test/looseness']:.3f} ± {results['test/looseness_stderr']:.3f} nats"
                )
    finally:  # also without the looseness, which takes as long again
        if trainer.is_global_zero:
            held = {"kind": kind(module), "changed": changed, **results, "certificate": found}
            keep(folder, name, held)
            for node in loggers:
                log(build(node, folder=folder), config, name, held)
    if wrong := not_finite(results):
        raise GenfwError(f"{wrong}: there is no number to report")


def _can_be_simulated(config: DictConfig, n: int) -> None:
    """Refuses simulated images that only annealing could use, and too few of them."""
    if n and config.estimator._target_ != "genfw.Annealed":
        raise ConfigError(
            f"simulated={n}: only estimator=annealed bounds log p(x) of simulated images from both "
            "sides: add estimator=annealed"
        )
    if n < 0 or n == 1:
        raise ConfigError(f"simulated={n}: expected at least 2 images, or 0")


def _asked_loggers(config: DictConfig, options: DictConfig) -> list[DictConfig]:
    """W&B's nodes, where wandb=true asks for them."""
    if not options.wandb:
        return []
    if options.verify:
        raise ConfigError(
            "wandb=true, verify=true: what is only compared is not logged; leave out one of the two"
        )
    loggers = list(nodes(config.get("logger"), "genfw.train.loggers.Wandb"))
    if not loggers:
        raise ConfigError(
            "wandb=true: the run has no W&B logger (logger=wandb); its numbers stay in its folder"
        )
    return loggers


def log(logger: Wandb, config: DictConfig, name: str, entry: Mapping[str, Any]) -> None:
    """An entry of evaluation.json to W&B, as a run of its own."""
    from genfw.train.loggers import git_commit

    resolved: Any = OmegaConf.to_container(config, resolve=True)
    logger.evaluates(name)
    logger.log_hyperparams({**resolved, "evaluation": name, "git": git_commit()})
    logger.summarize(entry)
    logger.finish()
    print(logger.where)


def _no_matter(key: str) -> str | None:
    """What an NLL does not depend on."""
    if key.partition(".")[0] in ("sampler", "grid", "guidance"):
        return (
            "says how samples are drawn, and an NLL is of the bare model: leave it to "
            "python -m genfw.sample"
        )
    return all_but(CHANGES)(key)


def looseness(module: LatentModule, n: int) -> dict[str, float]:
    """How far the bounds of annealed importance sampling on log p(x) are apart, the truth between
    them: the mean over n images that the model made, in nats, and its standard error."""
    import torch

    from genfw.estimators.annealed import Annealed
    from genfw.noise import Noise, mix
    from genfw.train.pictures import in_turn

    assert isinstance(module.estimator, Annealed)
    with module.evaluating() as model:
        index = torch.arange(n, device=model.device)
        noise = Noise(mix(module.seed, "simulated"), index)
        both = module.estimator.bidirectional(model, n, in_turn(model, index), noise=noise)
    gap = both.upper - both.lower
    return {
        "test/looseness": float(gap.mean()),
        "test/looseness_stderr": float(gap.std() / n**0.5),
    }


if __name__ == "__main__":
    sys.exit(command(evaluate))
