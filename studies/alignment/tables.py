"""The tables and figures of RESULTS.md from results/*.json.

    python studies/alignment/tables.py [--check]

A table stands there between `<!-- NAME -->` and `<!-- end -->` and is written anew; figures are the PNGs beside it.
`--check` writes nothing and fails if a table is not what the results say.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
PAGE = HERE / "RESULTS.md"
sys.path.append(str(HERE.parent))

from common import T95, filled, half_width
from common import markdown as table

GREYS, COLOURS = "#6b7280", ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2")

Result = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A figure of a run.

    Args:
        title: in tables and figures.
        final: of a finished run.
        point: of a measuring point.
        larger: whether more is better.
        margin: a difference that nobody would mind; with `relative` as a share of the plain figure.
        digits: after the point.
    """

    title: str
    final: Callable[[Result], float]
    point: Callable[[Result], float] | None
    larger: bool
    margin: float
    digits: int
    relative: bool = False


def accuracy(rule: str, title: str) -> Metric:
    """Accuracy by a rule, in percent."""
    return Metric(
        title, lambda r: 100 * r["accuracy"][rule], lambda p: 100 * p["curve_accuracy"][rule], True, margin=1.0, digits=1
    )


SINGLE = accuracy("single_gradient", "single gradient, %")
Z_SCORE = accuracy("z_score", "z_score, %")
DEFAULT = accuracy("shortlist_3", "shortlist_3, %")
EXACT = accuracy("exact", "exact, %")
FID = Metric("FID, judge", lambda r: r["judge_final"]["fid"], lambda p: p["judge"]["fid"], False, 0.02, 1, relative=True)
FID_ENCODER = Metric("FID, EfficientNet", lambda r: r["encoder_final"]["fid"], None, False, 0.02, 1, relative=True)
PRECISION = Metric("precision, judge", lambda r: r["judge_final"]["precision"], None, True, 0.01, 3)
RECALL = Metric("recall, judge", lambda r: r["judge_final"]["recall"], None, True, 0.01, 3)
SEEN = Metric("class seen, %", lambda r: 100 * r["judge"]["right"], lambda p: 100 * p["judge"]["right"], True, 1.0, 1)
NATS = Metric("nats/dim", lambda r: r["nats_per_dim"], lambda p: p["nats_per_dim"], False, 0.002, 4)

MAIN = ("one_step", "detach", "forward", "neumann_2", "exact")
CONTROLS = ("random_encoder", "shuffled_targets", "same_seconds")
STRENGTH = ("weight_0.03", "weight_0.1", "one_step", "weight_1", "weight_3")
PLACES = ("early_blocks", "block_3", "block_4", "all_blocks", "layer_1", "one_step", "layer_3")
VARIANTS = ("one_step", "conv", "spatial_norm", "irepa", "irepa_forward", "ends_halfway")
CANDIDATES = ("irepa", "irepa_forward")
LONG = ("long_one_step", "long_irepa", "long_irepa_forward")


class Results:
    """All finished runs, by arm and seed."""

    def __init__(self, folder: Path) -> None:
        self.arms: dict[str, dict[int, Result]] = {}
        self.failed: list[Result] = []
        for file in sorted(folder.glob("*-*.json")):
            result = json.loads(file.read_text())
            if "failed" in result:
                self.failed.append(result)
                continue
            self.arms.setdefault(result["arm"], {})[result["seed"]] = result
        real = folder / "real.json"
        self.real: Result = json.loads(real.read_text()) if real.is_file() else {}

    def has(self, *arms: str) -> list[str]:
        """Those of the arms that have a finished run."""
        return [arm for arm in arms if arm in self.arms]

    def timed(self, arm: str) -> dict[int, Result]:
        """Seed -> run, of those whose seconds count: results in which `"disturbed": true` was written do not."""
        return {seed: run for seed, run in sorted(self.arms.get(arm, {}).items()) if not run.get("disturbed")}

    def values(self, arm: str, metric: Metric, at: int | None = None) -> dict[int, float]:
        """Seed -> a figure of an arm, of its end or of one of its measuring points."""
        runs = self.arms.get(arm, {}).items()
        if at is None:
            return {seed: metric.final(run["final"]) for seed, run in runs}
        assert metric.point is not None
        return {seed: metric.point(run["points"][at]) for seed, run in runs}

    def differences(self, arm: str, base: str, metric: Metric, at: int | None = None) -> list[float]:
        """Arm minus base, seed by seed."""
        own, other = self.values(arm, metric, at), self.values(base, metric, at)
        return [own[seed] - other[seed] for seed in sorted(set(own) & set(other))]

    def noise(self, metric: Metric) -> float:
        """Deviation over seeds of one_step minus plain: what a single difference may be by chance."""
        found = self.differences("one_step", "plain", metric)
        return stdev(found) if len(found) > 1 else math.nan


def base_of(arm: str) -> str:
    """The plain arm of the same length."""
    return "long_plain" if arm.startswith("long_") else "plain"


def verdict(results: Results, arm: str, base: str, metric: Metric, at: int | None = None) -> str:
    """Yes, no or open, as README.md says what counts; the promise is that the arm is better."""
    found = results.differences(arm, base, metric, at)
    centre = mean(found) * (1 if metric.larger else -1)
    half = half_width(found) if len(found) > 1 else T95[3] * results.noise(metric)
    margin = metric.margin * (abs(mean(results.values(base, metric, at).values())) if metric.relative else 1)
    if centre - half > 0:
        return "yes"
    if centre + half < 0 or (abs(centre) + half <= margin and len(found) > 1):
        return "no"
    return "open"


def difference(results: Results, arm: str, base: str, metric: Metric, at: int | None = None) -> str:
    """Mean difference with its interval and verdict, as a cell."""
    found = results.differences(arm, base, metric, at)
    if not found:
        return ""
    text = f"{mean(found):+.{metric.digits}f}"
    if len(found) > 1:
        text += f" ± {half_width(found):.{metric.digits}f}"
    return f"{text} {verdict(results, arm, base, metric, at)}"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and deviation over seeds, as a cell."""
    return f"{mean(values):.{digits}f}" + (f" ({stdev(values):.{digits}f})" if len(values) > 1 else "")


def absolute(results: Results, arms: Sequence[str], metrics: Sequence[Metric]) -> str:
    """Figures of arms: mean over seeds, deviation in brackets."""
    rows = [
        [f"`{arm}`", str(len(results.arms[arm])), *(spread([*results.values(arm, m).values()], m.digits) for m in metrics)]
        for arm in results.has(*arms)
    ]
    return table(["arm", "seeds", *(m.title for m in metrics)], rows)


def relative(results: Results, pairs: Sequence[tuple[str, str]], metrics: Sequence[Metric]) -> str:
    """Differences, seed by seed, with 95 % intervals and verdicts."""
    rows = [
        [f"`{arm}` - `{base}`", *(difference(results, arm, base, m) for m in metrics)]
        for arm, base in pairs
        if results.has(arm) and results.has(base) and results.differences(arm, base, metrics[0])
    ]
    return table(["difference", *(m.title for m in metrics)], rows)


def relative_by_point(results: Results, pairs: Sequence[tuple[str, str]]) -> str:
    """Differences at each measuring point."""
    rows = [
        [f"`{arm}` - `{base}`", str(step), *(difference(results, arm, base, m, i) for m in CURVES)]
        for arm, base in pairs
        if results.has(arm) and results.has(base)
        for i, step in enumerate(steps_of(results, arm))
    ]
    return table(["difference", "step", *(m.title for m in CURVES)], rows)


def steps_of(results: Results, arm: str) -> list[int]:
    """The measuring points of an arm."""
    return [point["step"] for point in next(iter(results.arms[arm].values()))["points"]]


def crossing(run: Result, target: float, metric: Metric, against: str) -> float | None:
    """Where a run first passes a value, linear between its points; None if it never does."""
    assert metric.point is not None
    sign = 1 if metric.larger else -1
    before: tuple[float, float] | None = None
    for point in run["points"]:
        x, gap = point[against], sign * (metric.point(point) - target)
        if gap >= 0:
            return x if before is None else before[0] + (x - before[0]) * -before[1] / (gap - before[1])
        before = (x, gap)
    return None


def speed_ups(results: Results, arm: str, metric: Metric, against: str) -> list[float | None]:
    """By seed: the plain run's final step (or second) over where the arm passes its final figure."""
    assert metric.point is not None
    base, ratios = base_of(arm), []
    runs = results.timed(arm) if against == "seconds" else results.arms[arm]
    for seed, run in sorted(runs.items()):
        plain = results.arms.get(base, {}).get(seed)
        if plain is not None:
            end = plain["points"][-1]
            where = crossing(run, metric.point(end), metric, against)
            ratios.append(None if where is None else end[against] / where)
    return ratios


CURVES = (SINGLE, DEFAULT, EXACT, FID, NATS)


def sooner(results: Results, arms: Sequence[str]) -> str:
    """Speed-ups of arms, each seed by itself; a dash where the plain flow's figure is never passed.

    A plain flow has one, too, if its figure was as good before its end.
    """

    def cell(arm: str, metric: Metric, against: str) -> str:
        return ", ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in speed_ups(results, arm, metric, against))

    rows = [
        [f"`{arm}`", against, *(cell(arm, metric, against) for metric in CURVES)]
        for arm in results.has(*arms)
        for against in ("step", "seconds")
        if against == "step" or results.timed(arm)
    ]
    return table(["arm", "in", *(metric.title for metric in CURVES)], rows)


def by_point(results: Results, arms: Sequence[str]) -> str:
    """The accuracies of the first reading at each point: single gradient / exact, mean over seeds."""
    rows: list[list[str]] = []
    steps: list[int] = []
    for arm in results.has(*arms):
        runs = list(results.arms[arm].values())
        steps = steps_of(results, arm)
        cells = [
            " / ".join(f"{mean(m.point(run['points'][i]) for run in runs):.1f}" for m in (SINGLE, EXACT) if m.point)
            for i in range(len(steps))
        ]
        rows.append([f"`{arm}`", *cells])
    return table(["arm", *(f"step {step}" for step in steps)], rows)


def costs(results: Results, arms: Sequence[str]) -> str:
    """Seconds of training, and over those of the plain run of the same seed."""
    rows = []
    for arm in results.has(*arms):
        runs, plain = results.timed(arm), results.timed(base_of(arm))
        if not runs:
            continue
        seconds = {seed: run["final"]["seconds"] for seed, run in runs.items()}
        ratios = [s / plain[seed]["final"]["seconds"] for seed, s in seconds.items() if seed in plain]
        rows.append([f"`{arm}`", f"{runs[min(runs)]['steps']}", spread([*seconds.values()], 0), spread(ratios, 2)])
    return table(["arm", "steps", "seconds of training", "times the plain run's"], rows)


def inside(results: Results, arms: Sequence[str]) -> str:
    """Best probe and where it is, sweeps and movement block by block."""
    rows = []
    for arm in results.has(*arms):
        runs = [run["final"] for run in results.arms[arm].values() if "probe" in run["final"]]
        probes = probe_means(runs)
        best = max(probes, key=lambda place: probes[place])
        blocks = sorted(runs[0]["sweeps"])
        sweeps = " / ".join(f"{mean(run['sweeps'][t] for run in runs):.1f}" for t in blocks)
        moved = " / ".join(f"{mean(run['blocks'][t]['moved'] for run in runs):.2f}" for t in blocks)
        rows.append([f"`{arm}`", f"{100 * probes[best]:.1f} % (block {best[0]}, layer {best[1]})", sweeps, moved])
    return table(["arm", "best probe", "sweeps, blocks 1 / 2 / 3 / 4", "moved, blocks 1 / 2 / 3 / 4"], rows)


def probe_means(runs: Sequence[Result]) -> dict[tuple[int, int], float]:
    """(block, layer) -> accuracy of its probe, mean over runs."""
    rows = [{(row["block"], row["layer"]): row["accuracy"] for row in run["probe"]} for run in runs]
    return {place: mean(row[place] for row in rows) for place in rows[0]}


def rates(results: Results) -> str:
    """The choice of the learning rate."""
    found = {arm: run["final"]["nats_per_dim"] for arm, runs in results.arms.items() for s, run in runs.items() if s == 100}
    rates = sorted((float(arm.removeprefix("rate_")), nats) for arm, nats in found.items() if arm.startswith("rate_"))
    return table(
        ["learning rate", *(f"{rate:g}" for rate, _ in rates)],
        [["nats/dim", *(f"{nats:.4f}" for _, nats in rates)]],
    )


def warmups(results: Results) -> str:
    """The choice of the long runs' warm-up: the training loss around its end, and held-out nats."""
    steps, rows = (60, 100, 140, 200, 400), []
    for title, arm in (("50 steps", "rate_0.008"), ("200 steps", "warmup_200")):
        if results.has(arm):
            run = results.arms[arm][100]
            nats = {int(row["step"]): row["nll"] for row in run["training"]}
            rows.append([title, *(f"{nats[step]:.2f}" for step in steps), f"{run['final']['nats_per_dim']:.4f}"])
    return table(["warm-up", *(f"loss, step {step}" for step in steps), "nats/dim"], rows)


def failed(results: Results) -> str:
    """Runs without an end."""
    return table(["run without an end", "why"], [[f"`{r['arm']}`, seed {r['seed']}", r["failed"]] for r in results.failed])


def real(results: Results) -> str:
    """What real images get."""
    r = results.real
    rows = [
        [name, f"{r[name]['fid']:.1f}", f"{r[name]['precision']:.3f}", f"{r[name]['recall']:.3f}"]
        for name in ("judge", "judge_final", "encoder_final")
    ]
    titles = {"judge": "judge, 1,000 images", "judge_final": "judge, 2,000", "encoder_final": "EfficientNet, 2,000"}
    return table(["real training images", "FID", "precision", "recall"], [[titles[row[0]], *row[1:]] for row in rows])


QUALITY = (SINGLE, Z_SCORE, DEFAULT, EXACT, NATS)
SHOWN = (SINGLE, Z_SCORE, EXACT, FID, FID_ENCODER, NATS)
SAMPLES = (FID, FID_ENCODER, PRECISION, RECALL, SEEN)
FAMILY = [
    ("one_step", "detach"),
    ("one_step", "forward"),
    ("neumann_2", "one_step"),
    ("exact", "one_step"),
    ("cached", "detach"),
]
CANDIDATE_PAIRS = [
    ("irepa", "one_step"),
    ("irepa_forward", "forward"),
    ("irepa", "irepa_forward"),
    ("irepa", "same_seconds"),
    ("irepa_forward", "same_seconds"),
]
LONG_PAIRS = [*((arm, "long_plain") for arm in LONG), ("long_irepa", "long_one_step")]
RATES = [("one_step", "plain"), ("one_step_0.004", "plain_0.004"), ("plain_0.004", "plain"), ("one_step_0.004", "one_step")]
LATER = [("one_step", "early_blocks"), ("block_4", "block_3"), ("one_step", "block_4"), ("one_step", "all_blocks")]

TABLES: dict[str, Callable[[Results], str]] = {
    "rates": rates,
    "warm-up": warmups,
    "rate differences": lambda r: relative(r, RATES, SHOWN),
    "failed": failed,
    "real": real,
    "main quality": lambda r: absolute(r, ("plain", *MAIN, "cached"), QUALITY),
    "main samples": lambda r: absolute(r, ("plain", *MAIN, "cached"), SAMPLES),
    "main differences": lambda r: relative(r, [(arm, "plain") for arm in MAIN], SHOWN),
    "family": lambda r: relative(r, FAMILY, SHOWN),
    "points": lambda r: by_point(r, ("plain", *MAIN)),
    "speed-up": lambda r: sooner(r, ("plain", *MAIN)),
    "costs": lambda r: costs(r, ("plain", *MAIN, *CANDIDATES, "same_seconds")),
    "long costs": lambda r: costs(r, ("long_plain", *LONG)),
    "candidates": lambda r: relative(r, CANDIDATE_PAIRS, SHOWN),
    "weights": lambda r: relative(r, [(arm, "plain") for arm in STRENGTH], SHOWN),
    "places": lambda r: relative(r, [(arm, "plain") for arm in PLACES], SHOWN),
    "later": lambda r: relative(r, LATER, SHOWN),
    "variants": lambda r: relative(r, [(arm, "plain") for arm in VARIANTS], SHOWN),
    "controls": lambda r: relative(
        r,
        [(arm, "plain") for arm in ("one_step", *CONTROLS)] + [("one_step", arm) for arm in CONTROLS],
        SHOWN,
    ),
    "inside": lambda r: inside(r, ("plain", *MAIN, "irepa", *CONTROLS)),
    "long quality": lambda r: absolute(r, ("long_plain", *LONG), QUALITY),
    "long samples": lambda r: absolute(r, ("long_plain", *LONG), SAMPLES),
    "long differences": lambda r: relative(r, LONG_PAIRS, SHOWN),
    "long differences by point": lambda r: relative_by_point(r, [(arm, "long_plain") for arm in LONG]),
    "long points": lambda r: by_point(r, ("long_plain", *LONG)),
    "long speed-up": lambda r: sooner(r, ("long_plain", *LONG)),
}


def finish(panel: Axes, title: str, x: str) -> None:
    """Title, axes and grid of a panel."""
    panel.set_title(title, fontsize=9.5, loc="left")
    panel.set_xlabel(x, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def colour(arm: str, arms: Sequence[str]) -> str:
    """Grey for plain runs, else one of the palette."""
    others = [other for other in arms if not other.endswith("plain")]
    return GREYS if arm.endswith("plain") else COLOURS[others.index(arm) % len(COLOURS)]


def draw_curves(results: Results, arms: Sequence[str]) -> Figure:
    """Four figures against steps and against seconds: means over seeds, and the range as a band."""
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    shown = (SINGLE, EXACT, FID, NATS)
    for row, against in enumerate(("step", "seconds")):
        for column, metric in enumerate(shown):
            panel: Axes = figure.add_subplot(2, len(shown), row * len(shown) + column + 1)
            assert metric.point is not None
            for arm in results.has(*arms):
                runs = list((results.arms[arm] if against == "step" else results.timed(arm)).values())
                if not runs:
                    continue
                x = [mean(run["points"][i][against] for run in runs) for i in range(len(runs[0]["points"]))]
                y = [[metric.point(run["points"][i]) for run in runs] for i in range(len(x))]
                own = colour(arm, arms)
                panel.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=own, alpha=0.15, lw=0)
                panel.plot(x, [mean(v) for v in y], "o-", ms=3, lw=1.3, color=own, label=arm)
            finish(panel, metric.title, against if against == "step" else "seconds of training")
            if row == 0 and column == 0:
                panel.legend(fontsize=7.5, frameon=False)
    return figure


def draw_speed_ups(results: Results, arms: Sequence[str]) -> Figure:
    """Speed-ups in steps and seconds, a dot a seed; a cross at 1 where the figure is never passed."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for panel, against in zip(figure.subplots(1, 2, sharey=True), ("step", "seconds"), strict=True):
        for j, arm in enumerate(results.has(*arms)):
            for i, metric in enumerate(CURVES):
                found = speed_ups(results, arm, metric, against)
                place = i + 0.12 * (j - 2)
                passed = [ratio for ratio in found if ratio is not None]
                panel.plot([place] * len(passed), passed, "o", ms=4, color=colour(arm, arms), label=arm if i == 0 else None)
                panel.plot(
                    [place] * (len(found) - len(passed)),
                    [0.9] * (len(found) - len(passed)),
                    "x",
                    ms=4,
                    color=colour(arm, arms),
                )
        panel.axhline(1, color=GREYS, lw=0.8)
        panel.axhline(3.3, color=GREYS, lw=0.8, ls="--")
        finish(panel, f"speed-up in {'steps' if against == 'step' else against} (x: never passed; dashed: published)", "")
        panel.set_xticks(range(len(CURVES)), [metric.title for metric in CURVES], fontsize=8)
    figure.axes[0].legend(fontsize=7.5, frameon=False)
    return figure


def draw_differences(results: Results, arms: Sequence[str], base: str = "plain") -> Figure:
    """Differences from the base, a dot a seed, a line at their mean."""
    shown, arms = (SINGLE, EXACT, FID, FID_ENCODER), results.has(*arms)
    figure = Figure(figsize=(12, 0.8 + 0.36 * len(arms)), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        for y, arm in enumerate(arms):
            found = results.differences(arm, base, metric)
            own = COLOURS[1] if arm == "one_step" else COLOURS[0]
            panel.plot(found, [y] * len(found), "o", ms=4, color=own, alpha=0.7)
            panel.plot([mean(found)] * 2, [y - 0.3, y + 0.3], color=own, lw=2)
        panel.axvline(0, color=GREYS, lw=0.8)
        finish(panel, metric.title, f"minus {base} ({'right' if metric.larger else 'left'} is better)")
        panel.set_yticks(range(len(arms)), arms, fontsize=8)
    figure.axes[0].invert_yaxis()
    return figure


def draw_inside(results: Results, arms: Sequence[str]) -> Figure:
    """Probes by layer, sweeps and movement by block."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[1.6, 1, 1])
    arms = results.has(*arms)
    for j, arm in enumerate(arms):
        runs = [run["final"] for run in results.arms[arm].values() if "probe" in run["final"]]
        probes, own = probe_means(runs), colour(arm, arms)
        panels[0].plot(
            [f"{t}.{layer}" for t, layer in probes], [100 * p for p in probes.values()], "o-", ms=3, color=own, label=arm
        )
        for t in runs[0]["sweeps"]:
            place = int(t) + 0.09 * (j - len(arms) / 2)
            panels[1].plot([place] * len(runs), [run["sweeps"][t] for run in runs], "o", ms=3, color=own)
            panels[2].plot([place] * len(runs), [run["blocks"][t]["moved"] for run in runs], "o", ms=3, color=own)
    finish(panels[0], "linear probe, %", "block.layer")
    finish(panels[1], "Jacobi sweeps until within 1e-4", "block")
    finish(panels[2], "how far a block moves its input", "block")
    for panel in panels[1:]:
        panel.set_xticks([1, 2, 3, 4])
    panels[1].legend(*panels[0].get_legend_handles_labels(), fontsize=7.5, frameon=False, loc="upper left")
    return figure


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "curves": lambda r: draw_curves(r, ("plain", *MAIN)),
    "speed_up": lambda r: draw_speed_ups(r, MAIN),
    "where": lambda r: draw_differences(r, (*STRENGTH, *(arm for arm in PLACES if arm != "one_step"))),
    "variants": lambda r: draw_differences(r, VARIANTS),
    "controls": lambda r: draw_differences(r, ("one_step", *CONTROLS)),
    "inside": lambda r: draw_inside(r, ("plain", "one_step", "irepa", "forward", "random_encoder", "shuffled_targets")),
    "long": lambda r: draw_curves(r, ("long_plain", *LONG)),
}


def anew(page: str, results: Results) -> str:
    """The page with every table written anew."""
    return filled(page, {name: partial(make, results) for name, make in TABLES.items()})


def main() -> None:
    """Write, or check."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true")
    o = options.parse_args()
    results = Results(HERE / "results")
    page = PAGE.read_text()
    new = anew(page, results)
    if o.check:
        if new != page:
            sys.exit(f"{PAGE} is not what the results say; allowed: what `python studies/alignment/tables.py` writes")
        return
    PAGE.write_text(new)
    for name in re.findall(r"\(([a-z_]+)\.png\)", page):
        FIGURES[name](results).savefig(HERE / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
