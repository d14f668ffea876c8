"""flowback: image normalizing flows aligned with vision foundation models."""

from flowback.errors import InputError
from flowback.flows import Guidance, TarFlow

__version__ = "0.1.0"
__all__ = ["Guidance", "InputError", "TarFlow", "__version__"]
