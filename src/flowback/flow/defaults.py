"""How a flow draws where nothing else is asked for, as `flowback sweep` chose it; stored with the model."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from flowback.core.errors import InputError
from flowback.core.files import read_record, write_record
from flowback.flow.guidance import Guidance
from flowback.flow.prior import PRIORS

FILE, FORMAT = "sampling.json", 1


@dataclass(frozen=True)
class Defaults:
    """What is taken for options of drawing that are not given.

    Args:
        temperature: standard deviation of z, as a multiple of the prior's.
        prior: "standard" or "fitted".
        guidance: scale; of images with labels.
        guidance_rule: "linear" or "product".
        weights: fingerprint of the flow's weights that they were chosen for; "" for none.

    Raises:
        InputError: if one of them is not as above.
    """

    temperature: float = 1.0
    prior: str = "standard"
    guidance: float = 0.0
    guidance_rule: str = "linear"
    weights: str = ""

    def __post_init__(self) -> None:
        Guidance(self.guidance, rule=self.guidance_rule)
        if self.prior not in PRIORS or not 0 < self.temperature < float("inf"):
            raise InputError(f"prior must be one of {', '.join(PRIORS)}, and temperature above 0, got {self}")

    def of(self, sampler: str) -> "Defaults":
        """These for a sampler: guidance was chosen for the exact decode, and a student has none by default."""
        return self if sampler == "exact" else replace(self, guidance=0.0, guidance_rule="linear")

    def complete(self, labeled: bool, **given: Any) -> dict[str, Any]:
        """The options that are given, and these for those that are None; no guidance where there are no labels."""
        own = asdict(self) | ({} if labeled else {"guidance": 0.0})
        return {name: own[name] if value is None else value for name, value in given.items()}

    def save(self, folder: Path) -> None:
        """Write `sampling.json`."""
        write_record(folder / FILE, FORMAT, asdict(self))

    @classmethod
    def load(cls, folder: Path, weights: str) -> "Defaults":
        """Read `sampling.json`, of a flow with this fingerprint of its weights.

        Raises:
            InputError: if it is something else, or of other weights.
        """
        with read_record(folder / FILE, FORMAT, "delete it, or run `flowback sweep` again") as content:
            found = cls(**content)
            if not all(type(getattr(found, f.name)) is type(f.default) for f in fields(cls)):
                raise ValueError("it has values of other types")
            if found.weights != weights:
                raise ValueError("it is of other weights")
            return found
