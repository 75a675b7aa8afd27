"""A run that can be: its length, precision, and strategy."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from genfw.train.errors import ConfigError
from genfw.train.nodes import target_of

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true", "32", "bf16", "16", "64", "None")

BY_ELEMENT = [
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "SGD",
]
"""Those of torch.optim that move every weight by its own past alone, and so weights in parts."""


def run_can_be(config: DictConfig) -> None:
    """Refuses a run without steps, end, test or checkpoints, and strategies they do not know."""
    for key in ("trainer.val_check_interval", "trainer.devices"):
        value = OmegaConf.select(config, key)
        share = key == "trainer.val_check_interval" and isinstance(value, float) and 0 < value <= 1
        all_of_them = key == "trainer.devices" and value == -1
        wrong = isinstance(value, float) or (isinstance(value, int) and value < 1)
        if wrong and not (share or all_of_them):
            raise ConfigError(f"{key}={value}: expected an integer of at least 1")
    for key in ("trainer.limit_train_batches", "trainer.limit_test_batches"):
        if OmegaConf.select(config, key) == 0:
            raise ConfigError(f"{key}=0: expected at least one batch, or null for all of them")
    seed = OmegaConf.select(config, "seed")
    if isinstance(seed, int) and seed < 0:
        raise ConfigError(f"seed={seed}: expected an integer of at least 0")
    steps, epochs = (
        OmegaConf.select(config, f"trainer.max_{each}") for each in ("steps", "epochs")
    )
    if steps == 0:
        raise ConfigError(
            "trainer.max_steps=0: expected at least 1; without a step nothing is tested"
        )
    if isinstance(steps, int) and steps < 0 and (epochs is None or epochs < 0):
        raise ConfigError(
            f"trainer.max_steps={steps}: this run has no end; give trainer.max_steps or "
            "trainer.max_epochs"
        )
    strategy = str(OmegaConf.select(config, "trainer.strategy"))
    if strategy != "fsdp2" and strategy.startswith(("fsdp", "deepspeed", "model_parallel")):
        raise ConfigError(
            f"trainer.strategy={strategy}: averages, evaluation and checkpoints do not know "
            "weights in these parts: use trainer=fsdp (trainer.strategy=fsdp2), or trainer=ddp"
        )
    if OmegaConf.select(config, "trainer.enable_checkpointing") is False:
        raise ConfigError(
            "trainer.enable_checkpointing=false: the best weights are what is tested; leave it true"
        )


def weights_are_float32(config: DictConfig) -> None:
    """Refuses weights narrower than float32, and precisions that nobody knows."""
    precision = str(OmegaConf.select(config, "trainer.precision"))
    if precision.endswith("16-true") or precision.startswith("transformer-engine"):
        raise ConfigError(
            f"trainer.precision={precision}: weights and their average must be float32 or better, "
            "as reported numbers are: use trainer.precision=bf16-mixed"
        )
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision={precision}: expected one of {', '.join(PRECISIONS)}")


def weights_can_be_divided(config: DictConfig) -> None:
    """Refuses trainer=fsdp where precision, optimizer or model need whole weights."""
    if OmegaConf.select(config, "trainer.strategy") != "fsdp2":
        return
    precision = str(OmegaConf.select(config, "trainer.precision"))
    if precision in ("16", "16-mixed"):
        raise ConfigError(
            f"trainer=fsdp, trainer.precision={precision}: ranks would scale the loss each on its "
            "own: use trainer.precision=bf16-mixed"
        )
    module, _, name = str(target_of(config, "optimizer")).rpartition(".")
    if module == "torch.optim" and name not in BY_ELEMENT:
        raise ConfigError(
            f"trainer=fsdp: torch.optim.{name} looks at a weight as a whole, and every rank has a "
            f"part of it: use one of {', '.join(BY_ELEMENT)}, or trainer=ddp"
        )
    if OmegaConf.select(config, "classifier") is not None:
        raise ConfigError("trainer=fsdp divides the weights of a model of data: use trainer=ddp")


RULES = (
    run_can_be,
    weights_are_float32,
    weights_can_be_divided,
)
