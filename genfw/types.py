"""The arrays genfw speaks of, by name and shape.

Batch first, always. Everything measured in nats has one value per example.
"""

from jaxtyping import Float, Integer, Num
from torch import Tensor

Image = Num[Tensor, "b *dims"]
"""Data as given: integers 0..K-1 (real numbers only under a density likelihood)."""

Data = Float[Tensor, "b *dims"]
"""Real-valued: normalized images, latents, noise, network outputs."""

Time = Float[Tensor, "..."]
"""t in [0, 1]: 0 is the data side, 1 the noise side. One per example, or a scalar."""

Nats = Float[Tensor, " b"]
"""Log-likelihood terms, summed over dimensions, one per example, in nats."""

Labels = Integer[Tensor, " b"]
"""Class labels 0..classes-1; to a model, `classes` itself is "no label"."""
