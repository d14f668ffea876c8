"""Outliers, corrupted and doubtful images, by finished flows and by frozen features; then the tables, as Markdown.

    python studies/emoji.py … --output runs/data/emoji                                        # in color, to be made grey
    python studies/outliers/outlier_study.py RUN… --outliers digits,upside_down,noise,runs/data/emoji
    python studies/outliers/outlier_study.py                                                  # the tables alone

Runs are folders named ARM-SEED, such as runs/studies/latents/flow/pixels-0. What is in results/ is not measured
again. Of several seeds there is the mean, with the smallest and the largest value in brackets.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from flowback.reports.evaluate import EvaluationConfig, evaluate

RESULTS = Path(__file__).parent / "results"
Results = dict[tuple[str, int], dict[str, Any]]  # arm, seed -> evaluation.json
Cells = dict[str, dict[str, list[float]]]  # row -> column -> a value a seed


def measure(run: Path, outliers: tuple[str, ...], results: Path) -> None:
    """Measure a run that was not measured before."""
    file = results / f"{run.name}.json"
    if not file.is_file():
        config = EvaluationConfig(
            metrics=("ood", "shift", "coverage"), outliers=outliers, seed=int(run.name.rsplit("-", 1)[1])
        )
        partial = results / "partial" / file.name  # evaluate writes each metric as soon as it is there
        evaluate(run, config, output=partial, device="auto")
        partial.rename(file)


def load(folder: Path) -> Results:
    """All results, by arm and seed."""
    names = sorted((file.stem.rsplit("-", 1), file) for file in folder.glob("*-*.json"))
    return {(arm, int(seed)): json.loads(file.read_text()) for (arm, seed), file in names}


def collected(results: Results, cells: Callable[[str, dict[str, Any]], Iterable[tuple[str, str, float]]]) -> Cells:
    """Rows and columns of a table; what several arms share, like a seed's baselines, counts once a seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for (arm, seed), result in results.items():
        for row, column, value in cells(arm, result):
            found.setdefault((row, column), {})[seed] = value
    table: Cells = {}
    for (row, column), by_seed in found.items():
        table.setdefault(row, {})[column] = list(by_seed.values())
    return table


def outlier_cells(figure: str) -> Callable[[str, dict[str, Any]], Iterable[tuple[str, str, float]]]:
    """Of each score, by set of outliers."""

    def cells(arm: str, result: dict[str, Any]) -> Iterable[tuple[str, str, float]]:
        for row in result["ood"]:
            for name, value in row[figure].items():
                yield f"{arm if row['of'] == 'flow' else row['of']}: {row['score']}", Path(name).name, value

    return cells


def shift_cells(arm: str, result: dict[str, Any]) -> Iterable[tuple[str, str, float]]:
    """Means over the strengths of each corruption."""
    for name in dict.fromkeys(row["corruption"] for row in result["shift"]):
        rows = [row for row in result["shift"] if row["corruption"] == name]
        for figure in ("accuracy", "ece", "aurc"):
            for of in ("flow", "probe"):
                yield arm if of == "flow" else of, f"{name}: {figure}", mean(row[figure][of] for row in rows)


def coverage_cells(arm: str, result: dict[str, Any]) -> Iterable[tuple[str, str, float]]:
    """Risks, and accuracies where classes have other shares."""
    for row in result["coverage"]:
        for figure in ("accuracy", "ece", "aurc", "risk_0.9", "risk_0.8"):
            yield arm if row["of"] == "flow" else row["of"], figure, row[figure]
    for row in result["prior_shift"]:
        for key, value in row["accuracy"].items():
            yield arm if row["of"] == "flow" else row["of"], f"other shares, {key}", value


def markdown(table: Cells) -> str:
    """A table with means and ranges."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in table.items():
        lines.append(f"| {name} | {' | '.join(spread(row[column]) if column in row else '' for column in columns)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """The mean, and the range where there are several values."""
    return f"{mean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs, ARM-SEED")
    parser.add_argument("--outliers", default="digits,upside_down,noise", help="names and folders, with commas")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder")
    o = parser.parse_args()
    for run in sorted(o.runs, key=lambda run: run.name.rsplit("-", 1)[::-1]):  # seed 0 of all arms first
        measure(run, tuple(o.outliers.split(",")), o.results)
    results = load(o.results)
    tables = {"AUROC": outlier_cells("auroc"), "FPR at 95 % TPR": outlier_cells("fpr_at_95_tpr")}
    tables |= {"Corrupted images, means over strengths": shift_cells, "Coverage and other shares": coverage_cells}
    for title, cells in tables.items():
        print(f"{title}, {len(results)} runs\n\n{markdown(collected(results, cells))}\n")


if __name__ == "__main__":
    main()
