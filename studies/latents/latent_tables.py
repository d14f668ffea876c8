"""Tables of results/*.json, as Markdown.

    python studies/latents/latent_tables.py [--results FOLDER]

Of an arm with several seeds the mean, and half the width of the 95 % interval (Student's t); of one seed the value.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HERE = Path(__file__).parent
T95 = {2: 12.706, 3: 4.303}  # Student's t, two-sided, by the number of seeds
Result = dict[str, Any]


def rule(name: str, figure: str = "accuracy") -> Callable[[Result], float]:
    """Percent of a rule of classification."""
    return lambda r: 100 * next(row[figure] for row in r["classification"] if row["rule"] == name)


def best(figure: str) -> Callable[[Result], float]:
    """Of the samples with the lowest FID."""
    return lambda r: min(r["samples"], key=lambda row: row["fid"])[figure]


def space(name: str) -> Callable[[Result], float]:
    """Percent that a simple classifier reads in the space."""
    return lambda r: 100 * r["space"][name]


COLUMNS: dict[str, tuple[Callable[[Result], float], int]] = {  # title: value, digits
    "exact %": (rule("exact"), 1),
    "single gradient %": (rule("single_gradient"), 1),
    "calibration error %": (rule("exact", "ece_after"), 1),
    "linear probe %": (space("linear_flat"), 1),
    "of features %": (space("linear_features"), 1),
    "nearest mean %": (space("nearest_mean"), 1),
    "FID T 1": (lambda r: r["samples"][0]["fid"], 0),
    "FID best": (best("fid"), 0),
    "precision": (best("precision"), 2),
    "recall": (best("recall"), 2),
    "judge right %": (lambda r: 100 * best("right")(r), 0),
    "rFID": (lambda r: r["reconstruction"]["fid"], 0),
    "rFID, noised": (lambda r: r["noised"]["fid"], 0),
    "autoencoder CPU s": (lambda r: r["autoencoder_cpu_seconds"], 0),
    "flow CPU s": (lambda r: r["cpu_seconds"], 0),
}


def load(folder: Path) -> dict[str, list[Result]]:
    """The results of each arm, by seed."""
    arms: dict[str, list[Result]] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        arms.setdefault(result["arm"], []).append(result)
    return arms


def cell(results: list[Result], value: Callable[[Result], float], digits: int) -> str:
    """A figure of an arm: its mean, and the half width of its interval where there are seeds."""
    try:
        values = [value(result) for result in results]
    except (KeyError, StopIteration):  # the space has none
        return ""
    text = f"{mean(values):.{digits}f}"
    if len(values) not in T95:
        return text
    return f"{text} ± {T95[len(values)] * stdev(values) / math.sqrt(len(values)):.{digits}f}"


def table(arms: dict[str, list[Result]]) -> str:
    """All figures of all arms."""
    lines = [f"| arm | seeds | {' | '.join(COLUMNS)} |", "|---|---" + "|---" * len(COLUMNS) + "|"]
    for name, results in arms.items():
        cells = (cell(results, *column) for column in COLUMNS.values())
        lines.append(f"| {name} | {len(results)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--results", type=Path, default=HERE / "results", help="where results are")
    print(table(load(options.parse_args().results)))


if __name__ == "__main__":
    main()
