"""What alignment changes on digits, over seeds: from the reports of several quickstarts.

    for seed in 0 1 2 3 4; do flowback quickstart --seed $seed --run runs/seeds/$seed; done
    python studies/seeds.py runs/seeds/*

A row for each figure: plain, aligned, and the mean of the differences, seed by seed, with half the width of its 95 %
interval (Student's t).
"""

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

from flowback.core.files import read_json

FIGURES = {  # of a run: title -> value
    "exact, %": lambda run: 100 * run["accuracy"]["exact"],
    "single gradient, %": lambda run: 100 * run["accuracy"]["single_gradient"],
    "nats/dim": lambda run: run["nats_per_dim"],
    "seconds of training": lambda run: run["seconds"],
}


def interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of the mean."""
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def rows(reports: list[dict[str, Any]]) -> list[str]:
    """The table, as Markdown."""
    lines = ["| figure | plain | aligned | difference |", "|---|---|---|---|"]
    for title, figure in FIGURES.items():
        plain, aligned = ([figure(report[name]) for report in reports] for name in ("plain", "aligned"))
        gained = [b - a for a, b in zip(plain, aligned, strict=True)]
        digits = 4 if "nats" in title else 1
        cells = [f"{mean(plain):.{digits}f}", f"{mean(aligned):.{digits}f}"]
        lines.append(f"| {title} | {' | '.join(cells)} | {mean(gained):+.{digits}f} ± {interval(gained):.{digits}f} |")
    return lines


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", type=Path, nargs="+", help="folders of quickstarts with different seeds, at least two")
    reports = [read_json(run / "report.json") for run in options.parse_args().runs]
    print("\n".join(rows(reports)))


if __name__ == "__main__":
    main()
