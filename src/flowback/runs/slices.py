"""Tensors in safetensors files, whole in one, or cut along the first dimension among the files of several processes.

A file's metadata says at which row of the whole a slice begins; what it does not mention is whole. Whoever reads asks
for rows, and so may be any other number of processes.

Not by torch.distributed.checkpoint: it keeps the list of tensors in a pickle (`.metadata`), and its writer of safetensors
is younger than this module.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowback.core.distributed import own_slice


def file_name(stem: str, number: int, count: int) -> str:
    """Of the file with the slices of process `number`, from 0, of `count`."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"


def write(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write what this process holds of the tensors."""
    own, begins = {}, {}
    for name, tensor in tensors.items():
        rows, begin = own_slice(tensor)
        if rows.numel():
            own[name], begins[name] = rows.contiguous(), begin
    save_file(own, file, {"begins": json.dumps({name: begin for name, begin in begins.items() if begin})})


class Reader:
    """The tensors in the files of one stem.

    Args:
        folder: of the files.
        stem: their names up to the number.

    Raises:
        OSError: if there is none, or one cannot be read.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.slices: dict[str, list[tuple[int, Any]]] = {}  # name -> (first row, file), row by row
        for path in sorted(folder.glob(f"{stem}*.safetensors")):
            file = safe_open(path, "pt")
            begins = json.loads((file.metadata() or {}).get("begins", "{}"))
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                self.slices.setdefault(name, []).append((begins.get(name, 0), file))
        if not self.slices:
            raise FileNotFoundError(f"{folder} has no {stem}.safetensors")

    def shape(self, name: str) -> list[int]:
        """Of the whole tensor.

        Raises:
            KeyError: if there is no such tensor.
        """
        shapes = [(begin, file.get_slice(name).get_shape()) for begin, file in self.slices[name]]
        begin, shape = max(shapes)
        return [begin + shape[0], *shape[1:]] if shape else []

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or its rows `start` … `stop - 1`.

        Raises:
            KeyError: if there is no such tensor.
        """
        shape = self.shape(name)
        if not shape:
            return self.slices[name][0][1].get_tensor(name)
        stop, pieces = shape[0] if stop is None else stop, []
        for begin, file in self.slices[name]:
            piece = file.get_slice(name)
            low, high = max(start, begin), min(stop, begin + piece.get_shape()[0])
            if low < high:
                pieces.append(piece[low - begin : high - begin])
        return torch.cat(pieces) if pieces else torch.empty(0, *shape[1:])

    @torch.no_grad()
    def fill(self, name: str, tensor: Tensor) -> None:
        """Read what this process holds of a tensor into it.

        Raises:
            KeyError: if there is no such tensor.
            ValueError: if it has another shape.
        """
        if self.shape(name) != list(tensor.shape):
            raise ValueError(f"{name} has the shape {self.shape(name)}; expected {list(tensor.shape)}")
        own, start = own_slice(tensor)
        own.copy_(self.read(name, start, start + len(own)) if own.dim() else self.read(name))
