"""What a step of each arm costs on this machine, quietly measured: for "equal seconds" in tables.py.

    python studies/alignment_2/seconds.py [--rounds 2]

The runs themselves shared a machine, and their clocks with it. Here every arm of 800 steps trains alone, with one thread:
seconds of its steps 21 to 60, the least of the rounds, which alternate. What an arm does at its half (`until`,
`reverse_from`) it does after step 40. Writes results/seconds/MACHINE.json; features are made before.
"""

import argparse
import csv
import math
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from alignment_2 import study
from common import write_result
from flowback.core.devices import machine, pick_device
from flowback.runs.config import RunConfig
from flowback.training import train

FIRST, LAST = 20, 60
HALF = (FIRST + LAST) // 2
LEFT_OUT = ("encoders", "places", "size", "cells")  # groups whose arms are compared with others by steps alone


def timed(arm: study.Arm, folder: str) -> float:
    """Seconds of a step."""
    whole = arm.config(0)
    align = whole.alignment
    halves = {name: HALF for name in ("until", "reverse_from") if getattr(align, name)}
    options = replace(whole.train, steps=LAST, lr=1e-4, warmup=FIRST, log_every=FIRST, eval_images=10, keep=1)
    config: RunConfig = replace(whole, run=folder, alignment=replace(align, **halves), train=options)
    train(config, encoder=study.encoder_of(arm))
    with (Path(folder) / "metrics.csv").open() as file:
        seconds = {int(row["step"]): float(row["seconds"]) for row in csv.DictReader(file)}
    return (seconds[LAST] - seconds[FIRST]) / (LAST - FIRST)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    o = parser.parse_args()
    torch.set_num_threads(1)
    arms = [arm for arm in study.ARMS if arm.steps == study.STEPS and arm.group not in LEFT_OUT]
    study.prepare([(arm, 0) for arm in arms])
    least: dict[str, float] = {arm.name: math.inf for arm in arms}
    for _ in range(o.rounds):
        for arm in arms:
            with TemporaryDirectory() as folder:
                least[arm.name] = min(least[arm.name], timed(arm, f"{folder}/run"))
            print(f"{arm.name}: {least[arm.name]:.4f} s a step", flush=True)
    where = machine(pick_device("auto"))
    facts: dict[str, Any] = {"machine": where, "threads": 1, "rounds": o.rounds}
    facts["seconds_per_step"] = {name: round(seconds, 5) for name, seconds in least.items()}
    write_result(study.RESULTS / "seconds" / f"{where.split(',')[0].replace(' ', '_')}.json", facts)


if __name__ == "__main__":
    main()
