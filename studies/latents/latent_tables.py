"""Writes the tables of docs/latents.md from results/*.json.

    python studies/latents/latent_tables.py [--check]

They stand there between `<!-- NAME -->` and `<!-- end -->`. Of an arm with several seeds the mean, and half the width of
the 95 % interval (Student's t); of one seed the value. `--check` writes nothing and fails if the page is not what the
results say.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from common import T95, filled, interval, markdown

RESULTS, PAGE = HERE / "results", HERE.parents[1] / "docs" / "latents.md"
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


def over(figure: Callable[[Result], float], other: Callable[[Result], float]) -> Callable[[Result], float]:
    """By how many percent one figure of a run is above another."""
    return lambda r: 100 * (figure(r) / other(r) - 1)


COLUMNS: dict[str, tuple[Callable[[Result], float], int]] = {  # title: value, digits
    "exact %": (rule("exact"), 1),
    "exact, 4 draws %": (lambda r: 100 * r["averaged"]["exact"], 1),
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
}
SECONDS: dict[str, tuple[Callable[[Result], float], int]] = {
    "autoencoder CPU s": (lambda r: r["autoencoder_cpu_seconds"], 0),
    "flow CPU s": (lambda r: r["cpu_seconds"], 0),
}
TIMED = ("pca_32_all_reverse", "pca_32_longest_reverse")  # whose runs in results/ were on a CPU, beside all in results/cpu
GAPS: dict[str, tuple[Callable[[Result], float], int]] = {  # of one run: what is left to gain
    "exact - linear probe, points": (lambda r: rule("exact")(r) - space("linear_flat")(r), 1),
    "exact - linear probe of features": (lambda r: rule("exact")(r) - space("linear_features")(r), 1),
    "exact of 4 draws - linear probe": (lambda r: 100 * r["averaged"]["exact"] - space("linear_flat")(r), 1),
    "FID best over rFID, %": (over(best("fid"), lambda r: r["reconstruction"]["fid"]), 0),
    "FID best over rFID, noised, %": (over(best("fid"), lambda r: r["noised"]["fid"]), 0),
    "FID best over rFID, unseen, %": (over(best("fid"), lambda r: r["unseen"]["reconstruction"]["fid"]), 0),
    "FID best over rFID, unseen, noised, %": (over(best("fid"), lambda r: r["unseen"]["noised"]["fid"]), 0),
}
DRAWS: dict[str, Callable[[Result], float]] = {  # exact accuracy by draws of noise, in percent
    "one draw of noise": rule("exact"),
    "4 draws": lambda r: 100 * r["averaged"]["exact"],
    "16 draws": lambda r: 100 * r["averaged_more"]["exact"],
}
PROBES: dict[str, Callable[[Result], float]] = {  # of the same images, in percent
    "linear probe of what the flow sees": lambda r: 100 * r["space_of_all"]["linear_flat"],
    "linear probe of pooled features": lambda r: 100 * r["space_of_all"]["linear_features"],
    "nearest mean of what the flow sees": lambda r: 100 * r["space_of_all"]["nearest_mean"],
}
PROBED = "pca_32_longest_reverse"  # the arm whose probes were fitted to all images, too
READ = (PROBED, "pca_32_wide_0.3")  # arms in the same latents
DIFFERENCES = [name for name in COLUMNS if name in ("exact %", "single gradient %", "FID best", "recall", "judge right %")]
PAIRS = (  # an arm, and the one that its runs are compared with, seed by seed
    *(("pca_32", other) for other in ("pixels", "kl_16", "joint_16")),
    *((compressor, "pca_32") for compressor in ("attention_32", "transformer_32")),
    *((f"{space}_{s}", space) for space in ("pca_32", "kl_16", "joint_16") for s in ("forward", "reverse")),
    *((name, "pixels_all") for name in ("pca_32_all", "pca_32_longest_reverse", "pca_32_wide_0.3")),
    ("pca_32_wide_0.3", "pca_32_longest_reverse"),
)


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
    return interval(values, digits)


def table(arms: dict[str, list[Result]], columns: dict[str, tuple[Callable[[Result], float], int]]) -> str:
    """Figures of all arms, a row for each; columns and arms that have none are left out."""
    rows = {name: [cell(results, *column) for column in columns.values()] for name, results in arms.items()}
    shown = [i for i in range(len(columns)) if any(row[i] for row in rows.values())]
    head = ["arm", "seeds", *(list(columns)[i] for i in shown)]
    filled = {name: [row[i] for i in shown] for name, row in rows.items()}
    return markdown(head, [[name, str(len(arms[name])), *row] for name, row in filled.items() if any(row)])


def readers(arms: dict[str, list[Result]]) -> str:
    """How well flows and the simple classifiers that were fitted to all images read them, and how they differ."""
    probes = {r["seed"]: r for r in arms[PROBED]}  # of the latents, which both flows share
    linear = [name for name in PROBES if name.startswith("linear")]
    rows = []
    for arm in READ:
        for name, value in DRAWS.items():
            gaps = [interval([value(r) - PROBES[probe](probes[r["seed"]]) for r in arms[arm]], 1) for probe in linear]
            rows.append([f"`{arm}`, {name}", interval([value(r) for r in arms[arm]], 1), *gaps])
    for name, value in PROBES.items():
        rows.append([name, interval([value(r) for r in arms[PROBED]], 1), *[""] * len(linear)])
    return markdown(["read by", "%", *(f"less {probe}" for probe in linear)], rows)


def reconstructions(arms: dict[str, list[Result]]) -> str:
    """Run by run, the FID of samples and of reconstructions, of all held-out images and of those not in the reference."""
    rows = []
    for name in READ:
        for r in arms[name]:
            fid, seen, unseen = best("fid")(r), r["reconstruction"]["fid"], r["unseen"]["reconstruction"]["fid"]
            gaps = [f"{100 * (fid / other - 1):.0f}" for other in (seen, unseen)]
            rows.append([f"`{name}`, {r['seed']}", *(f"{v:.1f}" for v in (fid, seen, unseen)), *gaps])
    return markdown(["arm, seed", "FID best", "rFID", "rFID, unseen", "FID over rFID, %", "FID over rFID, unseen, %"], rows)


def differences(arms: dict[str, list[Result]]) -> str:
    """Of each of `PAIRS`: the first arm less the second, seed by seed."""
    rows = []
    for name, other in PAIRS:
        seeds = {r["seed"]: r for r in arms.get(other, [])}
        pairs = [(r, seeds[r["seed"]]) for r in arms.get(name, []) if r["seed"] in seeds]
        if len(pairs) in T95:
            cells = []
            for value, digits in (COLUMNS[figure] for figure in DIFFERENCES):
                cells.append(interval([value(own) - value(its) for own, its in pairs], digits))
            rows.append([f"{name} - {other}", str(len(pairs)), *cells])
    return markdown(["arm less arm", "seeds", *DIFFERENCES], rows)


def told(page: str) -> str:
    """The text of docs/latents.md with its tables written anew."""
    arms = load(RESULTS)
    timed = load(RESULTS / "cpu") | {name: arms[name] for name in TIMED}
    tables = {
        "arms": lambda: table(arms, COLUMNS),
        "gaps": lambda: table(arms, GAPS),
        "reconstructions": lambda: reconstructions(arms),
        "readers": lambda: readers(arms),
        "differences": lambda: differences(arms),
        "seconds": lambda: table(timed, SECONDS),
    }
    return filled(page, tables)


def main() -> None:
    """Write the page, or check it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="write nothing; fail if the page is not of these results")
    page = PAGE.read_text()
    if not options.parse_args().check:
        PAGE.write_text(told(page))
    elif told(page) != page:
        sys.exit(f"{PAGE} is not what the results say; run latent_tables.py")


if __name__ == "__main__":
    main()
