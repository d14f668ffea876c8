"""The encoder's features of a data set, computed once and kept on disk as one memory-mapped array."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowback.data.datasets import Split
from flowback.errors import InputError
from flowback.units import from_levels

BATCH = 64  # fixed, so that a value does not depend on when the work was interrupted


def cache_folder() -> Path:
    """Where caches live: $FLOWBACK_CACHE, or flowback/ in $XDG_CACHE_HOME or ~/.cache."""
    if "FLOWBACK_CACHE" in os.environ:
        return Path(os.environ["FLOWBACK_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flowback"


class FeatureCache:
    """Features `[n, variants, P, F]` in float16 of the n images of a split; variant 1 is the mirrored image.

    Args:
        split: the images.
        levels: of their pixels.
        flips: whether mirrored images are cached too.
        compute: images `[B, C, H, W]` in [-1, 1] to features `[B, P, F]`.
        shape: (P, F).
        key: names the encoder, its weights and precision; with the images' fingerprint it names the file.
        report: called with the number of images done while the features are computed.

    Raises:
        InputError: if the disk has no room.
    """

    def __init__(
        self,
        split: Split,
        levels: int,
        flips: bool,
        compute: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        key: str,
        report: Callable[[int], None],
    ) -> None:
        self.shape = (len(split), 2 if flips else 1, *shape)
        name = hashlib.sha256(f"{key} {split.fingerprint()} {self.shape}".encode()).hexdigest()[:24]
        self.file = cache_folder() / "features" / f"{name}.npy"
        if not self.file.exists():
            self._fill(split, levels, compute, report)
        self.array = np.load(self.file, mmap_mode="r")

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return int(np.prod(self.shape)) * 2

    def __call__(self, indices: Tensor, flipped: Tensor) -> Tensor:
        """Features `[B, P, F]` of images `indices [B]`, mirrored where `flipped [B]` says so."""
        return torch.from_numpy(self.array[indices.numpy(), flipped.long().numpy()])

    def _fill(self, split: Split, levels: int, compute: Callable[[Tensor], Tensor], report: Callable[[int], None]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial, progress = self.file.with_suffix(".partial"), self.file.with_suffix(".json")
        done = 0
        if partial.exists() and progress.exists():
            done = int(json.loads(progress.read_text())["done"])
        elif shutil.disk_usage(self.file.parent).free < 1.05 * self.size:
            raise InputError(
                f"the feature cache needs {self.size / 1e9:.1f} GB in {self.file.parent}, which has less; "
                "set FLOWBACK_CACHE to a roomier folder, or alignment.cache to false"
            )
        mode = "r+" if done else "w+"
        array = np.lib.format.open_memmap(partial, mode=mode, dtype=np.float16, shape=self.shape)
        for start in range(done, len(split), BATCH):
            stop = min(start + BATCH, len(split))
            x = from_levels(split[range(start, stop)][0], levels)
            for variant in range(self.shape[1]):
                features = compute(x.flip(-1) if variant else x)
                array[start:stop, variant] = features.to(torch.float16).cpu().numpy()
            if (start // BATCH) % 20 == 19:
                array.flush()
                progress.write_text(json.dumps({"done": stop}))
            report(stop)
        array.flush()
        partial.rename(self.file)
        progress.unlink(missing_ok=True)
