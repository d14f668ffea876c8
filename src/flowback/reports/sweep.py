"""How a flow draws best: samples at several temperatures, priors and guidances, measured against held-out images.

Options are swept one after the other, each at the best of those before it: the prior, the temperature, the guidance, and
the temperature again. Best is the lowest FID of those whose recall is not far below the best recall: FID alone prefers few
and typical images.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowback.core.errors import InputError
from flowback.core.files import check_place, read_json
from flowback.data import ImageSet
from flowback.flow.defaults import FILE as DEFAULTS
from flowback.flow.defaults import Defaults
from flowback.flow.guidance import RULES
from flowback.flow.io import fingerprint
from flowback.latents import Flow
from flowback.reports.evaluate import DRAWING, EvaluationConfig, Fidelity, write_json

FILE = "sweep.json"
STANDARD = {"temperature": 1.0, "prior": "standard", "guidance": 0.0, "guidance_rule": "linear"}


@dataclass(frozen=True)
class SweepConfig:
    """What to try.

    Args:
        temperatures: standard deviations of z, as multiples of the prior's.
        guidances: scales; left out for flows without classes.
        rules: of guidance: linear, product.
        samples: images drawn at each setting, and compared with as many held-out ones.
        recall: share of the best recall that the chosen setting has at least.
        extractor: of the features, as in `flowback evaluate`.
        extractor_weights: a local file of the extractor's weights.
        seed: of the samples.

    Raises:
        InputError: if a value is impossible.
    """

    temperatures: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0)
    guidances: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    rules: tuple[str, ...] = RULES
    samples: int = 1000
    recall: float = 0.8
    extractor: str = "efficientnet_lite0"
    extractor_weights: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.recall <= 1:
            raise InputError(f"recall must be a share from 0 to 1, got {self.recall}")
        for temperature in self.temperatures:
            self.point(STANDARD | {"temperature": temperature})
        for guidance in self.guidances:
            self.point(STANDARD | {"guidance": guidance})
        for rule in self.rules:
            self.point(STANDARD | {"guidance_rule": rule})

    def point(self, setting: dict[str, Any]) -> EvaluationConfig:
        """The evaluation of one setting."""
        return EvaluationConfig(
            metrics=("fid", "prc"),
            samples=self.samples,
            reference="held_out",
            extractor=self.extractor,
            extractor_weights=self.extractor_weights,
            seed=self.seed,
            **setting,
        )


def sweep(
    flow: Flow,
    data: ImageSet,
    config: SweepConfig,
    folder: Path,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Defaults:
    """Try settings, and store the best as the flow's defaults in its folder; what was measured is in `sweep.json` there.

    Settings that `sweep.json` has are not measured again, so that a sweep that was interrupted goes on.

    Args:
        flow: with averaged weights; its `core.defaults` are set.
        data: whose held-out images are compared with.
        config: what to try.
        folder: of the flow.
        report: called with each row.

    Raises:
        InputError: if the folder cannot be written, or there are too few held-out images.
    """
    if config.samples > len(data.held_out):
        raise InputError(f"samples must be at most the {len(data.held_out)} held-out images, got {config.samples}")
    check_place(folder / DEFAULTS)
    weights = fingerprint(flow.core.state_dict())
    prior = flow.core.fitted_prior
    of = {
        "weights": weights,
        "prior": prior and fingerprint(dict(prior.named_buffers())),
        "held_out": data.held_out.fingerprint(),
    }
    of |= {name: getattr(config, name) for name in ("samples", "extractor", "extractor_weights", "seed")}
    rows = _known(folder / FILE, of)

    def best() -> dict[str, Any]:
        enough = config.recall * max(row["recall"] for row in rows)
        row = min((row for row in rows if row["recall"] >= enough), key=lambda row: row["fid"])
        return {name: row[name] for name in DRAWING}

    def measure(setting: dict[str, Any]) -> None:
        if any(all(row[name] == value for name, value in setting.items()) for row in rows):
            return
        found = Fidelity(flow, data, config.point(setting), folder).measure()
        rows.append({name: found[name] for name in (*DRAWING, "fid", "precision", "recall")})
        report(rows[-1])
        write_json(folder / FILE, {"of": of, "rows": rows})

    measure(STANDARD)
    axes: list[list[dict[str, Any]]] = [[{"prior": "fitted"}]] if prior is not None else []
    temperatures = [{"temperature": temperature} for temperature in config.temperatures]
    scales = [{"guidance": w, "guidance_rule": rule} for rule in config.rules for w in config.guidances if w]
    for axis in (*axes, temperatures, scales if flow.num_classes else [], temperatures):
        at = best()
        for change in axis:
            measure(at | change)
    flow.core.defaults = Defaults(**best(), weights=weights)
    flow.core.defaults.save(folder)
    return flow.core.defaults


def _known(file: Path, of: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier sweep of the same."""
    try:
        content = read_json(file)
        return content["rows"] if content["of"] == json.loads(json.dumps(of)) else []
    except (OSError, ValueError, TypeError, KeyError):
        return []
