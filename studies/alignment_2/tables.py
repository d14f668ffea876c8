"""The tables and the figures of the study from results/*.json.

    python studies/alignment_2/tables.py [--check]

Writes RESULTS.md, and the tables of docs/results.md that stand between `<!-- NAME -->` and `<!-- end -->`: of each arm the
means of its seeds, with half the width of the 95 % interval (Student's t); differences from another arm, seed by seed, with
their verdicts; arms against plain training of equal seconds, at the costs of a step that seconds.py measured. What was not
run is a gap, -, and runs that diverged are named. PNGs beside RESULTS.md draw what each question's arms gain, and the
gradients. `--check` writes nothing and fails if a page is not what the results say.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from alignment_2 import study
from common import T95, filled, half_width, interval, markdown

PAGE, STORY = HERE / "RESULTS.md", HERE.parents[1] / "docs" / "results.md"
GAP = "-"
Result = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A figure of a run.

    Args:
        title: in tables.
        value: of a result.
        larger: whether more is better.
        margin: a difference that nobody would mind; with `relative` a share of what is compared with.
        digits: after the point.
        relative: see margin.
    """

    title: str
    value: Callable[[Result], float]
    larger: bool
    margin: float
    digits: int
    relative: bool = False


def _accuracy(rule: str) -> Metric:
    return Metric(f"{rule}, %", lambda r: 100 * r["accuracy"][rule], True, 1.0, 1)


def _samples(where: str) -> list[Metric]:
    return [
        Metric(f"FID, {where}", lambda r: r[where]["fid"], False, 0.02, 1, relative=True),
        Metric(f"precision, {where}", lambda r: r[where]["precision"], True, 0.01, 3),
        Metric(f"recall, {where}", lambda r: r[where]["recall"], True, 0.01, 3),
        Metric(f"class seen, {where}, %", lambda r: 100 * r[where]["right"], True, 1.0, 1),
    ]


HEAD = """# Results of the second study

All tables, written by `tables.py` from `results/*.json`. What came out, in words, is in
[docs/results.md](../../docs/results.md); questions, arms and criteria are in [README.md](README.md). Values are means
over seeds ± half the width of the 95 % interval. Runs are on one H200 that sixteen of them shared, those that were made
later on 2 CPU cores; each result names its machine."""
EXACT = _accuracy("exact")
NATS = Metric("nats/dim", lambda r: r["nats_per_dim"], False, 0.002, 4)
QUALITY = [EXACT, _accuracy("z_score"), _accuracy("single_gradient"), NATS]
SAMPLES = [*_samples("plain"), *_samples("best")]
FID_PLAIN, FID_BEST = SAMPLES[0], SAMPLES[4]
COMPARED = [*QUALITY, FID_PLAIN, FID_BEST]

LAST = ("forward", "detach", "one_step")  # at the last blocks
PAIRS: dict[str, list[tuple[str, str]]] = {  # title: an arm, and what it is compared with
    "1. Color": [
        *((f"emoji_{family}", "emoji_plain") for family in study.FAMILIES),
        *((f"emoji_{kind}reverse", f"emoji_{kind}{other}") for kind in ("", "irepa_") for other in ("forward", "detach")),
        *((f"emoji_irepa_{s}", f"emoji_{s}") for s in ("forward", "detach", "reverse")),
        *((f"cells_{kind}", "cells_plain") for kind in ("irepa_forward", "irepa")),
    ],
    "2. Places": [
        *((name, "cpu/plain") for name in (*(f"cpu/{arm}" for arm in LAST), *study.GROUPS["places"])),
        *((name, "cpu/one_step") for name in ("cpu/forward", "forward_early", "reverse_early", "separate", "paper")),
        *((name, "cpu/detach") for name in ("detach_early", "detach_1", "detach_3")),
    ],
    "5. Encoders": [
        *((name, "emoji_plain") for name in ("emoji_sharper", "emoji_random_encoder", "emoji_shuffled")),
        *(("emoji_irepa_reverse", name) for name in ("emoji_sharper", "emoji_random_encoder", "emoji_shuffled")),
    ],
    "6. Cheaper": [
        *((name, "plain") for name in study.GROUPS["cheaper"]),
        *((name, "irepa") for name in study.GROUPS["cheaper"] if name != "forward_every_2"),
        ("forward_every_2", "irepa_forward"),
    ],
    "7. Exact": [("exact", "one_step"), ("exact_equal_norm", "one_step"), ("exact_equal_norm", "exact")],
    "8. Size": [(f"{size}_irepa", f"{size}_plain") for size in study.SIZES],
    "9. Grey": [
        *((name, "plain") for name in ("one_step", "detach", "forward", "irepa", "irepa_forward", "exact")),
        *(("one_step", name) for name in ("detach", "forward")),
        ("irepa", "irepa_forward"),
    ],
}
TOLD = (EXACT, QUALITY[2], NATS, FID_PLAIN, FID_BEST)  # in docs/results.md
GREY = {"reverse": "one_step", "reverse, irepa": "irepa", "forward": "forward", "forward, irepa": "irepa_forward"}
GREY |= {"detach": "detach", "exact": "exact"}
COLOR = {"reverse": "reverse", "reverse, irepa": "irepa_reverse", "forward": "forward", "forward, irepa": "irepa_forward"}
COLOR |= {"detach": "detach", "detach, irepa": "irepa_detach"}
CELLS = {"reverse, irepa": "irepa", "forward, irepa": "irepa_forward"}
TARGETS = {
    "the stage before the last - plain": ("emoji_sharper", "emoji_plain"),
    "random weights - plain": ("emoji_random_encoder", "emoji_plain"),
    "features of another image - plain": ("emoji_shuffled", "emoji_plain"),
    "the last map - the stage before": ("emoji_irepa_reverse", "emoji_sharper"),
    "the last map - random weights": ("emoji_irepa_reverse", "emoji_random_encoder"),
    "the last map - features of another image": ("emoji_irepa_reverse", "emoji_shuffled"),
}
CHEAPER = {
    "every second step": "every_2",
    "every fourth step": "every_4",
    "until half of the steps": "ends_halfway",
    "forward, every second step": "forward_every_2",
    "forward, then reverse": "forward_first",
    "block 4 alone": "one_block",
}
PLACED = {
    "forward at the last blocks": ("cpu/forward", "cpu/plain"),
    "forward at the first blocks": ("forward_early", "cpu/plain"),
    "reverse at the last blocks": ("cpu/one_step", "cpu/plain"),
    "reverse at the first blocks": ("reverse_early", "cpu/plain"),
    "detach at the last blocks, layer 1": ("detach_1", "cpu/plain"),
    "detach at the last blocks, layer 2": ("cpu/detach", "cpu/plain"),
    "detach at the last blocks, layer 3": ("detach_3", "cpu/plain"),
    "detach at the first blocks, layer 2": ("detach_early", "cpu/plain"),
    "reverse, a projector for each block": ("separate", "cpu/plain"),
    "the papers' settings": ("paper", "cpu/plain"),
}
CURVES = {"color": "emoji_plain", "grey": "plain"}  # plain arms that have longer ones
LADDERS = {  # the curves of question 8: size, with the arms' prefix
    "width": {"64": "width_64_", "96": "", "192": "width_192_"},
    "images": {"2,000": "images_2000_", "20,000": "images_20000_", "60,000": "images_60000_"},
}


class Results:
    """The results, by arm and seed, and the runs that diverged; those of the folder `cpu` have it before the arm's name."""

    def __init__(self, folder: Path) -> None:
        self.arms: dict[str, dict[int, Result]] = {}
        self.failed: list[Result] = []
        for prefix in ("", "cpu/"):
            for file in sorted(folder.glob(f"{prefix}*-*.json")):
                result = json.loads(file.read_text())
                if "failed" in result:
                    self.failed.append(result)
                else:
                    self.arms.setdefault(prefix + result["arm"], {})[result["seed"]] = result
        self.gradients = {file.stem: json.loads(file.read_text()) for file in sorted((folder / "gradients").glob("*.json"))}
        costs = [json.loads(file.read_text()) for file in sorted((folder / "seconds").glob("*.json"))]
        self.seconds: dict[str, dict[str, float]] = {found["machine"]: found["seconds_per_step"] for found in costs}

    def values(self, arm: str, metric: Metric) -> dict[int, float]:
        """Seed -> a figure of an arm."""
        return {seed: metric.value(run) for seed, run in self.arms.get(arm, {}).items()}

    def differences(self, arm: str, other: str, metric: Metric) -> dict[int, float]:
        """Seed -> the figure of one arm less that of another."""
        own, its = self.values(arm, metric), self.values(other, metric)
        return {seed: own[seed] - its[seed] for seed in sorted(set(own) & set(its))}

    def dearness(self, arm: str, plain: str) -> float | None:
        """How many times the seconds of a plain step an arm's step takes, the mean over machines; None if not measured."""
        ratios = [found[arm] / found[plain] for found in self.seconds.values() if arm in found]
        return mean(ratios) if ratios else None


def verdict(found: Sequence[float], metric: Metric, base: float) -> str:
    """What differences say, in README.md's words."""
    if len(found) not in T95:
        return "one seed"
    better, half = mean(found) * (1 if metric.larger else -1), half_width(found)
    margin = metric.margin * (abs(base) if metric.relative else 1)
    if abs(better) > max(half, margin):
        return "better" if better > 0 else "worse"
    return "equal" if abs(better) + half <= margin else "no difference seen"


def difference(found: dict[int, float], metric: Metric, base: Iterable[float]) -> str:
    """A cell: mean, half width, verdict."""
    values = list(found.values())
    return f"{signed(values, metric)} {verdict(values, metric, mean(base))}" if values else GAP


def signed(values: Sequence[float], metric: Metric) -> str:
    """Mean and half width, with a plus where the mean is not negative."""
    return f"{'+' if mean(values) >= 0 else ''}{interval(values, metric.digits)}"


def absolute(results: Results, arms: Sequence[str], metrics: Sequence[Metric]) -> str:
    """Means over seeds and half widths."""
    rows = []
    for arm in arms:
        cells = [interval([*results.values(arm, m).values()], m.digits) if arm in results.arms else GAP for m in metrics]
        rows.append([f"`{arm}`", str(len(results.arms.get(arm, {}))), *cells])
    return markdown(["arm", "seeds", *(m.title for m in metrics)], rows)


def relative(results: Results, pairs: Iterable[tuple[str, str]]) -> str:
    """Differences, seed by seed."""
    rows = [
        [
            f"`{arm}` - `{other}`",
            str(len(results.differences(arm, other, EXACT))),
            *(
                difference(results.differences(arm, other, m), m, results.values(other, m).values() or [0])
                for m in COMPARED
            ),
        ]
        for arm, other in pairs
    ]
    return markdown(["difference", "seeds", *(m.title for m in COMPARED)], rows)


def at_seconds(results: Results, arm: str, plain: str, metric: Metric) -> dict[int, float]:
    """Seed -> an arm's figure less that of plain training in as many seconds, linear between the plain runs."""
    ratio = results.dearness(arm, plain)
    if ratio is None:
        return {}
    curve = {study.STEPS: plain} | {steps: f"{plain}_{steps}" for steps in study.LONGER}
    values = {steps: results.values(name, metric) for steps, name in curve.items()}
    found = {}
    for seed, run in results.arms[arm].items():
        points = [(steps, own[seed]) for steps, own in values.items() if seed in own]
        if len(points) == len(curve):
            found[seed] = metric.value(run) - _linear(points, ratio * run["steps"])
    return found


def _linear(points: Sequence[tuple[float, float]], x: float) -> float:
    """Between points, in order; the first or last value beyond them."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * max(0.0, x - x0) / (x1 - x0)
    return points[-1][1]


def equal_seconds(results: Results) -> str:
    """Each aligned arm of 800 steps against plain training of as many seconds."""
    rows = []
    for arm in study.ARMS:
        plain = CURVES.get(arm.domain.name)
        if plain and arm.alignment and arm.group != "size" and arm.name in results.arms:
            ratio, base = results.dearness(arm.name, plain), results.arms.get(plain, {}).values()
            cells = [
                difference(at_seconds(results, arm.name, plain, m), m, [m.value(run) for run in base] or [0])
                for m in COMPARED
            ]
            rows.append([f"`{arm.name}`", GAP if ratio is None else f"{ratio:.2f}", *cells])
    return markdown(["arm", "seconds, times plain's", *(m.title for m in COMPARED)], rows)


def search(results: Results) -> str:
    """What the search found: of each candidate its FID at the plain settings, and what was chosen."""
    rows = []
    for family, arms in study.SEARCHED.items():
        found = {
            arm.name.removeprefix(f"search_{family}_"): results.arms[arm.name][study.SEARCH_SEED]
            for arm in arms
            if arm.name in results.arms
        }
        best = min(found, key=lambda name: FID_PLAIN.value(found[name])) if len(found) == len(arms) else None
        taken = GAP if best is None else f"{found[best]['alignment']['at']}, weight {found[best]['alignment']['weight']:g}"
        rows.append([f"`{family}`", ", ".join(f"{k} {FID_PLAIN.value(r):.0f}" for k, r in found.items()) or GAP, taken])
    return markdown(["arm", "FID of", "chosen"], rows)


def sizes(results: Results) -> str:
    """What irepa gains at each size, and by how much more the largest size gains than the smallest."""
    rows = []
    for name, ladder in LADDERS.items():
        gains = {size: gained(results, prefix, EXACT, FID_BEST, NATS) for size, prefix in ladder.items()}
        for size, own in gains.items():
            cells = [interval([*found.values()], m.digits) if found else GAP for m, found in own]
            rows.append([f"{name} {size}", *cells])
        (small, first), *_, (large, last) = gains.items()
        cells = []
        for (metric, low), (_, high) in zip(first, last, strict=True):
            found = {seed: high[seed] - low[seed] for seed in set(low) & set(high)}
            cells.append(interval([*found.values()], metric.digits) if found else GAP)
        rows.append([f"{name} {large} - {small}", *cells])
    return markdown(["irepa - plain", *(m.title for m in (EXACT, FID_BEST, NATS))], rows)


def gained(results: Results, prefix: str, *metrics: Metric) -> list[tuple[Metric, dict[int, float]]]:
    """Of each figure what irepa gains at a size."""
    return [(m, results.differences(f"{prefix}irepa", f"{prefix}plain", m)) for m in metrics]


def best_settings(results: Results) -> str:
    """How the best samples of each arm were drawn, seed by seed."""
    rows = []
    for arm in study.ARMS:
        ways = [
            f"{best['prior']}, T {best['temperature']:g}, w {best['guidance']:g}"
            for _, run in sorted(results.arms.get(arm.name, {}).items())
            if (best := run["best"])
        ]
        if ways:
            rows.append([f"`{arm.name}`", "; ".join(ways)])
    return markdown(["arm", "best settings, by seed"], rows)


def priors(results: Results) -> str:
    """Samples under both priors, each at its best temperature and guidance; what held-out images gain by the fitted one."""
    rows = []
    for arm, runs in results.arms.items():
        pairs = [
            [_least(run, prior) for prior in ("standard", "fitted")] for _, run in sorted(runs.items()) if "settings" in run
        ]
        if pairs and all(None not in pair for pair in pairs):
            columns = [[a for a, _ in pairs], [b for _, b in pairs], [b - a for a, b in pairs]]
            gained = [run["prior_gained"] for run in runs.values()]
            rows.append([f"`{arm}`", str(len(pairs)), *(interval(each, 1) for each in columns), interval(gained, 4)])
    return markdown(["arm", "seeds", "FID, N(0, I)", "FID, fitted", "difference", "held-out nats/dim gained"], rows)


def _least(run: Result, prior: str) -> float | None:
    return min((row["fid"] for row in run["settings"] if row["prior"] == prior), default=None)


def gradient_table(results: Results) -> str:
    """Norms and cosines over training."""
    shown = ("one_step exact", "detach exact", "likelihood one_step", "likelihood exact")
    rows = []
    for name, found in results.gradients.items():
        for row in found["checkpoints"]:
            norms, cosines = row["norms"], row["cosines"]
            lengths = [f"{norms[k]:.3g}" for k in ("likelihood", "one_step", "exact")]
            angles = [GAP if cosines[k] is None else f"{cosines[k]:.2f}" for k in shown]
            rows.append([f"`{name}`", str(row["step"]), *lengths, f"{norms['exact'] / norms['one_step']:.2f}", *angles])
    heads = ["run", "step", "norm, likelihood", "one_step", "exact", "exact / one_step"]
    return markdown(heads + [f"cosine, {k.replace(' ', ' and ')}" for k in shown], rows)


def failures(results: Results) -> str:
    """Runs that diverged."""
    return markdown(["run without an end", "why"], [[f"`{r['arm']}-{r['seed']}`", r["failed"]] for r in results.failed])


def page(results: Results) -> str:
    """All tables, under their titles."""
    parts = [HEAD, f"## Search\n\n{search(results)}"]
    parts += [f"## Runs without an end\n\n{failures(results)}"] if results.failed else []
    for group, arms in study.GROUPS.items():
        arms = [*arms, *(f"cpu/{arm}" for arm in ("plain", *LAST))] if group == "places" else arms
        parts += [f"## Arms: {group}\n\n{absolute(results, arms, QUALITY)}\n\n{absolute(results, arms, SAMPLES)}"]
    parts += [f"## {title}\n\n{relative(results, pairs)}\n\n![]({drawing(title)}.png)" for title, pairs in PAIRS.items()]
    parts += [f"## 4. Best settings\n\n{best_settings(results)}"]
    parts += [f"## 4. Priors, by {study.TRIED} samples of each setting\n\n{priors(results)}"]
    parts += [f"## 6. Equal seconds\n\n{equal_seconds(results)}\n\n![](against_seconds.png)"]
    parts += [f"## 7. Gradients\n\n{gradient_table(results)}\n\n![](gradients.png)"]
    parts += [f"## 8. Gain by size\n\n{sizes(results)}\n\n![](gain_by_size.png)"]
    return "\n\n".join(parts) + "\n"


def tables_of_story(results: Results) -> dict[str, Callable[[], str]]:
    """Name -> how a table of docs/results.md is made: better is bold, worse italic."""

    def marked(found: dict[int, float], metric: Metric, other: str) -> str:
        values, base = list(found.values()), mean(results.values(other, metric).values())
        marks = {"better": "**", "worse": "*"}.get(verdict(values, metric, base), "")
        return f"{marks}{signed(values, metric)}{marks}"

    def less(arm: str, other: str) -> list[str]:
        return [marked(results.differences(arm, other, m), m, other) for m in TOLD]

    def steps() -> str:
        rows = []
        domains = [
            ("grey", "plain", "", GREY),
            ("color", "emoji_plain", "emoji_", COLOR),
            ("cells", "cells_plain", "cells_", CELLS),
        ]
        for domain, plain, prefix, names in domains:
            means = [f"{mean(results.values(plain, m).values()):.{m.digits}f}" for m in TOLD]
            rows.append([f"{domain}: plain has", *means])
            rows += [[title, *less(f"{prefix}{name}", plain)] for title, name in names.items()]
        return markdown(["", *titles], rows)

    def for_seconds(arms: dict[str, tuple[str, str]]) -> str:
        rows = []
        for title, (arm, plain) in arms.items():
            cells = [marked(at_seconds(results, arm, plain, m), m, plain) for m in TOLD]
            rows.append([title, f"{results.dearness(arm, plain):.2f}", *cells])
        return markdown(["", "cost", *titles], rows)

    def seconds() -> str:
        grey = {f"grey, {title}": (name, "plain") for title, name in GREY.items()}
        return for_seconds(grey | {f"color, {title}": (f"emoji_{name}", "emoji_plain") for title, name in COLOR.items()})

    def cheaper() -> str:
        return for_seconds({title: (name, "plain") for title, name in CHEAPER.items()})

    def encoders() -> str:
        return markdown(["", *titles], [[title, *less(*pair)] for title, pair in TARGETS.items()])

    def places() -> str:
        known = {title: pair for title, pair in PLACED.items() if results.differences(*pair, EXACT)}
        return markdown(["", *titles], [[title, *less(*pair)] for title, pair in known.items()])

    def size() -> str:
        sizes = [(f"{name} {n}", prefix) for name, ladder in LADDERS.items() for n, prefix in ladder.items()]
        known = [(title, prefix) for title, prefix in sizes if f"{prefix}irepa" in results.arms]
        return markdown(["", *titles], [[title, *less(f"{prefix}irepa", f"{prefix}plain")] for title, prefix in known])

    titles = [m.title for m in TOLD]
    return {
        "equal steps": steps,
        "equal seconds": seconds,
        "encoders": encoders,
        "places": places,
        "cheaper": cheaper,
        "size": size,
    }


def told(story: str, results: Results) -> str:
    """The text of docs/results.md with its tables written anew."""
    return filled(story, tables_of_story(results))


def drawing(title: str) -> str:
    """The name of the figure of a question."""
    return title.split(". ")[1].lower()


def gains(results: Results, pairs: Sequence[tuple[str, str]]) -> Figure:
    """Exact accuracy and FID at the best settings, arm less other, with intervals; of pairs that were run."""
    pairs = [pair for pair in pairs if results.differences(*pair, EXACT)]
    figure = Figure((9, 1 + 0.35 * len(pairs)), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2, sharey=True), (EXACT, FID_BEST), strict=True):
        for i, pair in enumerate(pairs):
            found = [*results.differences(*pair, metric).values()]
            if found:
                half = half_width(found) if len(found) in T95 else math.nan
                axes.errorbar(mean(found), i, xerr=half, fmt="o", color="#2563eb", capsize=3)
        axes.axvline(0, color="#6b7280", lw=1)
        axes.set_xlabel(metric.title)
        axes.set_yticks(range(len(pairs)), [f"{arm} - {other}" for arm, other in pairs])
    figure.axes[0].invert_yaxis()
    return figure


def gain_by_size(results: Results) -> Figure:
    """What irepa gains against the size of the flow and of the data."""
    figure = Figure((9, 5), layout="constrained")
    grid = figure.subplots(2, 2, squeeze=False)
    for column, (name, ladder) in enumerate(LADDERS.items()):
        for axes, metric in zip(grid[:, column], (EXACT, FID_BEST), strict=True):
            for i, prefix in enumerate(ladder.values()):
                found = [*results.differences(f"{prefix}irepa", f"{prefix}plain", metric).values()]
                if found:
                    half = half_width(found) if len(found) in T95 else math.nan
                    axes.errorbar(i, mean(found), yerr=half, fmt="o", color="#2563eb", capsize=3)
            axes.axhline(0, color="#6b7280", lw=1)
            axes.set_xticks(range(len(ladder)), list(ladder))
            axes.set(xlabel=name, ylabel=f"irepa - plain, {metric.title}")
    return figure


def against_seconds(results: Results) -> Figure:
    """Exact accuracy and FID at the best settings against what training cost, beside the plain runs of three lengths."""
    figure = Figure((10, 8), layout="constrained")
    grid = figure.subplots(2, 2, squeeze=False)
    for column, (domain, plain) in enumerate(CURVES.items()):
        lengths = {study.STEPS: plain} | {steps: f"{plain}_{steps}" for steps in study.LONGER}
        curve = {name: steps / study.STEPS for steps, name in lengths.items() if name in results.arms}
        aligned = [arm.name for arm in study.ARMS if arm.domain.name == domain and arm.alignment and arm.group != "size"]
        costs = {name: results.dearness(name, plain) for name in aligned if name in results.arms}
        for axes, metric in zip(grid[:, column], (EXACT, FID_BEST), strict=True):
            means = {name: mean(results.values(name, metric).values()) for name in (*curve, *costs)}
            axes.plot(list(curve.values()), [means[name] for name in curve], marker="o", color="#111827", label="plain")
            known = sorted((cost, name) for name, cost in costs.items() if cost is not None)
            for i, (cost, name) in enumerate(known):
                axes.plot(cost, means[name], marker="o", ls="", color="#2563eb")
                where = {"xytext": (5, 3 - 11 * (i % 2)), "textcoords": "offset points"}
                axes.annotate(name.removeprefix("emoji_"), (cost, means[name]), fontsize=7, **where)
            axes.margins(x=0.18)
            axes.set(title=domain, xlabel="seconds of training, times those of 800 plain steps", ylabel=metric.title)
            axes.legend(fontsize=8)
    return figure


def gradient_figure(results: Results) -> Figure:
    """Length and direction of exact's gradient over training, and by token at the last checkpoint."""
    figure = Figure((9, 3.5), layout="constrained")
    lengths, angles, tokens = figure.subplots(1, 3)
    for name, found in results.gradients.items():
        rows = found["checkpoints"]
        steps = [row["step"] for row in rows]
        lengths.plot(steps, [row["norms"]["exact"] / row["norms"]["one_step"] for row in rows], marker="o", label=name)
        angles.plot(steps, [row["cosines"]["one_step exact"] for row in rows], marker="o", label=name)
        for block, own in rows[-1]["tokens"].items():
            share = [added / whole if whole else math.nan for added, whole in zip(own["added"], own["exact"], strict=True)]
            tokens.plot(range(1, len(share) + 1), share, label=f"{name}, block {block}")
    lengths.set(xlabel="step", ylabel="norm of exact / norm of one_step")
    angles.set(xlabel="step", ylabel="cosine of exact and one_step")
    tokens.set(xlabel="token, in the block's order", ylabel="added / exact, RMS")
    for axes in (lengths, tokens):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7)
    return figure


def figures(results: Results) -> dict[str, Figure]:
    """Name -> figure."""
    drawn = {drawing(title): gains(results, pairs) for title, pairs in PAIRS.items()}
    drawn |= {"against_seconds": against_seconds(results), "gain_by_size": gain_by_size(results)}
    return drawn | {"gradients": gradient_figure(results)}


def main() -> None:
    """Write the page and its figures, or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not of these results")
    o = parser.parse_args()
    results = Results(study.RESULTS)
    for file, text in ((PAGE, page(results)), (STORY, told(STORY.read_text(), results))):
        if not o.check:
            file.write_text(text)
        elif file.read_text() != text:
            sys.exit(f"{file} is not what the results say; run tables.py")
    if o.check:
        return
    for name, figure in figures(results).items():
        figure.savefig(HERE / f"{name}.png", dpi=120)


if __name__ == "__main__":
    main()
