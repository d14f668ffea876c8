"""The flows that the studio offers: found once under the folders that it was given, chosen by name, loaded when needed."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path, PurePath
from threading import Lock
from typing import Any

import torch

from flowback.core.console import command, say
from flowback.core.errors import InputError, plain
from flowback.core.files import read_json
from flowback.flow.io import find_folder
from flowback.latents import Flow
from flowback.runs.checkpoint import State, class_names, holds_flow, load_flow, newest
from flowback.runs.config import RunConfig

DEPTH = 4  # folders in folders that are searched for runs
KEPT = 2  # flows that stay loaded: two are compared
MOST = 200  # flows that are offered


@dataclass(frozen=True)
class Entry:
    """A flow to choose."""

    name: str  # as it is shown: its place below the folder that was given
    place: str  # a run, a folder of a flow, or a hub id: what a command takes


class Shelf:
    """Flows by name.

    Args:
        places: runs, folders of flows, folders that hold such, or hub ids.
        device: where to put the flows.

    Raises:
        InputError: if one of the places is none of these.
    """

    def __init__(self, places: Sequence[str], device: torch.device) -> None:
        self.places, self.device = list(places), device
        self.entries: dict[str, Entry] = {}
        self._loaded: OrderedDict[str, tuple[str, Flow, str]] = OrderedDict()
        self._lock = Lock()
        self.refresh()

    def refresh(self) -> list[str]:
        """Look again; returns the names."""
        found: dict[str, Entry] = {}
        for place in self.places:
            inside = list(_flows(Path(place), DEPTH)) if Path(place).is_dir() else [find_folder(place)]
            if not inside:
                raise InputError(f"{place} holds no run with a checkpoint and no flow; expected some, or a hub id")
            for folder in inside[: MOST - len(found)]:
                entry = _entry(place, folder)
                if found.get(entry.name, entry) != entry:
                    entry = Entry(plain(entry.place), entry.place)
                found[entry.name] = entry
        self.entries = found
        return list(found)

    def first(self) -> str:
        """The first flow that can be loaded; those before it, which cannot, are said on the terminal.

        Raises:
            InputError: if none can.
        """
        for name in self.entries:
            try:
                self.card(name)
                return name
            except InputError as error:
                say(f"left aside: {error}")
        raise InputError(f"none of the flows in {', '.join(self.places)} can be loaded; use others")

    def place(self, name: str) -> str:
        """What a command takes for the flow of this name.

        Raises:
            InputError: if it is not offered.
        """
        if name not in self.entries:
            raise InputError("the flow must be one of the list; choose again")
        return self.entries[name].place

    def flow(self, name: str) -> Flow:
        """The flow of this name, with the averaged weights of the newest checkpoint.

        Raises:
            InputError: if it is not offered, or cannot be loaded.
        """
        place = self.place(name)
        version = str(newest(Path(place)) or place)
        with self._lock:
            if name not in self._loaded or self._loaded[name][0] != version:
                flow, weights = load_flow(place, "ema", self.device)
                self._loaded[name] = version, flow.eval().requires_grad_(False), weights
            self._loaded.move_to_end(name)
            while len(self._loaded) > KEPT:
                self._loaded.popitem(last=False)
            return self._loaded[name][1]

    def classes(self, name: str) -> list[str]:
        """The names of the flow's classes, or their numbers; empty for an unconditional flow."""
        return [plain(text) for text in class_names(self.place(name), self.flow(name))]

    def facts(self, name: str) -> dict[str, str]:
        """What is known of the flow: its data, its size, when it was trained, its figures."""
        flow, folder = self.flow(name), Path(self.place(name))
        size, classes = (
            " x ".join(map(str, flow.image_size)),
            f"{flow.num_classes} classes" if flow.num_classes else "no classes",
        )
        facts = {"images": f"{size} pixels, {'color' if flow.channels == 3 else 'grey'}, {classes}"}
        parameters = sum(p.numel() for p in flow.parameters())
        facts["flow"] = f"{parameters / 1e6:.2f}M parameters, {flow.config.blocks} blocks, {flow.token_shape[0]} tokens"
        checkpoint = newest(folder)
        if checkpoint is None:
            return facts
        state, config = State.read(checkpoint), RunConfig.read(folder / "config.yaml")
        facts["data"] = config.data.name + (f" ({config.data.path})" if config.data.path else "")
        aligned = config.alignment.strategy
        facts["alignment"] = "none" if aligned == "none" else f"{aligned}, with {config.alignment.encoder}"
        when = datetime.fromtimestamp((checkpoint / "state.json").stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        facts["trained"] = f"{when}, {state.step:,} steps in {state.seconds / 60:.1f} minutes"
        return facts | {title: text for title, text in figures(folder).items() if text}

    def card(self, name: str) -> str:
        """The facts as a table in HTML."""
        rows = (
            f"<tr><th scope='row'>{escape(k)}</th><td>{escape(plain(v))}</td></tr>" for k, v in self.facts(name).items()
        )
        return f"<table class='card' aria-label='about this flow'>{''.join(rows)}</table>"


def _entry(place: str, folder: Path) -> Entry:
    if not Path(place).is_dir():
        return Entry(plain(place), place)
    return Entry(plain(str(folder.absolute().relative_to(Path(place).absolute().parent))), str(folder))


def figures(run: Path) -> dict[str, str]:
    """What evaluation.json says of a run, in words; empty if the run was not evaluated."""
    found = _json(run / "evaluation.json")
    if not isinstance(found, dict):
        return {}
    texts: dict[str, str] = {}
    for name, text in (("nats_per_dim", "{:.4f} nats per dim"), ("bits_per_dim", "{:.3f} bits per dim")):
        if isinstance(found.get(name), int | float):
            texts[name.replace("_", " ")] = text.format(found[name])
    accuracy = found.get("accuracy")
    if isinstance(accuracy, dict):
        shares = {str(rule).replace("_", " "): v for rule, v in accuracy.items() if isinstance(v, int | float)}
        texts["accuracy"] = ", ".join(f"{rule} {100 * share:.1f} %" for rule, share in shares.items())
    return texts


def _flows(folder: Path, depth: int) -> list[Path]:
    """The runs and flows in a folder, itself included, in order."""
    if holds_flow(folder):
        return [folder]
    if not depth:
        return []
    try:
        inside = sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    except OSError:
        return []
    return [flow for place in inside for flow in _flows(place, depth - 1)]


def _json(file: Path) -> Any:
    try:
        return read_json(file) if file.is_file() else None
    except (OSError, ValueError):
        return None


def python_of(place: str) -> str:
    """Lines of Python that load a flow."""
    return f"from flowback.runs.checkpoint import load_flow\n\nflow, _ = load_flow({json.dumps(place)})"


def shell(verb: str, place: str, *words: str | PurePath) -> str:
    """A command on a flow."""
    return command("flowback", verb, Path(place), *words)


def words_of(labels: Sequence[int], names: Sequence[str]) -> str:
    """Classes as a command takes them: by number, or by name where names are numbers."""
    by_name = any(name.isdecimal() for name in names)
    return ",".join(names[label] if by_name else str(label) for label in labels)
