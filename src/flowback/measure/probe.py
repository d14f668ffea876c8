"""Linear probes: what the hidden states of every (block, layer) know of the classes (arXiv 2511.22345, figure 4)."""

from typing import Any

import numpy as np
import torch

from flowback.core.errors import InputError
from flowback.data import ImageSet, Split
from flowback.data.splits import spread
from flowback.latents import Flow
from flowback.measure.density import seen


def probe_layers(
    flow: Flow, data: ImageSet, training_images: int = 2000, images: int | None = 1000, batch_size: int = 128
) -> list[dict[str, Any]]:
    """Accuracy of a logistic regression on the mean over tokens of each layer's hidden states.

    The flow sees noised images without labels; its states are pooled batch by batch, so that only one number a channel,
    layer and image is kept.

    Args:
        flow: the flow; it is not trained.
        data: the regression is fitted on training images and measured on held-out ones.
        training_images: how many to fit on.
        images: how many to measure on; None for all.
        batch_size: images that the flow sees at once.

    Returns:
        A row for each layer: "block", "layer" (from 1), "accuracy", which is None where states are not finite.

    Raises:
        InputError: if there are fewer than two classes.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(data.classes) < 2:
        raise InputError(f"a probe needs at least 2 classes, got {len(data.classes)}")
    fit, fit_y = _pooled_states(flow, data.train, data.levels, training_images, batch_size)
    held, held_y = _pooled_states(flow, data.held_out, data.levels, images or len(data.held_out), batch_size)
    rows = []
    for t, layer in fit:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
        finite = np.isfinite(fit[t, layer]).all() and np.isfinite(held[t, layer]).all()
        accuracy = float(probe.fit(fit[t, layer], fit_y).score(held[t, layer], held_y)) if finite else None
        rows.append({"block": t, "layer": layer, "accuracy": accuracy})
    return rows


@torch.no_grad()
def _pooled_states(
    flow: Flow, split: Split, levels: int, count: int, batch_size: int
) -> tuple[dict[tuple[int, int], np.ndarray], np.ndarray]:
    core = flow.core
    pairs = [(t, layer) for t, depth in enumerate(core.config.depths, start=1) for layer in range(1, depth + 1)]
    indices = spread(len(split), count)
    generator = torch.Generator().manual_seed(0)
    states: dict[tuple[int, int], list[np.ndarray]] = {pair: [] for pair in pairs}
    for start in range(0, len(indices), batch_size):
        x, _ = seen(flow, split, indices[start : start + batch_size], levels)
        _, _, trace = core.encode(core.perturb(x, generator), trace=pairs)
        for pair in pairs:
            states[pair].append(trace.hidden[pair].mean(dim=1).float().cpu().numpy())
    return {pair: np.concatenate(parts) for pair, parts in states.items()}, split.labels[indices].numpy()
