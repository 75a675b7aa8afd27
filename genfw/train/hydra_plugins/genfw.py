"""The one place where Hydra looks for launchers; what this one does: `genfw.train.sweep.Local`."""

from genfw.train import sweep


class Local(sweep.Local):
    """`hydra/launcher=local`."""
