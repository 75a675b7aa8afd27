"""A plug-in of genfw: `python -m genfw model=mixture_vae`, `python -m genfw param=blend`.

Importing this module registers both classes. `mixture_vae` brings groups of its own and has a YAML
under conf/; `blend` needs none, its options are those of its signature.
"""

from genfw_mixture.blend import Blend
from genfw_mixture.model import MixtureVAE

__all__ = ["Blend", "MixtureVAE"]
