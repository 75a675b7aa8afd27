"""How much memory tensors take: a ruler for tests."""

from genfw.estimators.memory import Live as Live
