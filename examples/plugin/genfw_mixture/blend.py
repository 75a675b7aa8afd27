r"""A parameterization between x0 and eps: where noise is little predict it, else the data.

.. math:: \text{target} = \sigma^p x - \alpha^p \epsilon

p = 1 is minus v; a larger p changes sides faster.
"""

from genfw import LinearParameterization


class Blend(LinearParameterization, name="blend"):
    """sigma^p x - alpha^p eps.

    Args:
        power: p, above 0.

    Raises:
        ValueError: p is not above 0.
    """

    def __init__(self, power: float = 2.0):
        super().__init__()
        if not power > 0:
            raise ValueError(f"power: expected a number above 0, got {power}")
        self.power = power

    def coefficients(self, alpha, sigma):
        return sigma**self.power, -(alpha**self.power)

    def extra_repr(self) -> str:
        return f"sigma^{self.power:g} x - alpha^{self.power:g} eps"
