"""What alignment changes on digits, over seeds: from the reports of several quickstarts.

    for seed in 0 1 2 3 4; do flowback quickstart --seed $seed --run runs/seeds/$seed; done
    python studies/seeds.py runs/seeds/*

A row for each figure: plain, aligned, and the mean of the differences, seed by seed, with half the width of its 95 %
interval (Student's t).
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from common import half_width
from flowback.core.files import read_json
from flowback.runs.log import read_metrics

EARLY = 200  # a step at which accuracies are taken on the way
Run = dict[str, Any]
FIGURES: dict[str, tuple[Callable[[Run], float], int]] = {  # of a run: title -> value, digits
    "exact, %": (lambda run: 100 * run["accuracy"]["exact"], 1),
    "single gradient, %": (lambda run: 100 * run["accuracy"]["single_gradient"], 1),
    f"exact at step {EARLY}, %": (lambda run: 100 * run["early"]["held_out_exact"], 1),
    f"single gradient at step {EARLY}, %": (lambda run: 100 * run["early"]["held_out_single_gradient"], 1),
    "nats/dim": (lambda run: run["nats_per_dim"], 4),
    "seconds of training": (lambda run: run["seconds"], 0),
}


def read(folder: Path) -> dict[str, Run]:
    """The two runs of a quickstart, with the row of their logs at the early step."""
    report = read_json(folder / "report.json")
    logs = {name: read_metrics(folder / name / "metrics.csv") for name in ("plain", "aligned")}
    early = {
        name: next(row for row in rows if row["step"] == EARLY and "held_out_exact" in row) for name, rows in logs.items()
    }
    return {name: report[name] | {"early": early[name]} for name in logs}


def rows(pairs: list[dict[str, Run]]) -> list[str]:
    """The table, as Markdown."""
    lines = ["| figure | plain | aligned | difference |", "|---|---|---|---|"]
    for title, (figure, digits) in FIGURES.items():
        plain, aligned = ([figure(pair[name]) for pair in pairs] for name in ("plain", "aligned"))
        gained = [b - a for a, b in zip(plain, aligned, strict=True)]
        cells = [f"{mean(plain):.{digits}f}", f"{mean(aligned):.{digits}f}"]
        lines.append(f"| {title} | {' | '.join(cells)} | {mean(gained):+.{digits}f} ± {half_width(gained):.{digits}f} |")
    return lines


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", type=Path, nargs="+", help="folders of quickstarts with different seeds, at least two")
    print("\n".join(rows([read(run) for run in options.parse_args().runs])))


if __name__ == "__main__":
    main()
