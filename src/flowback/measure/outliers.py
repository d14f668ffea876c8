"""Images that are unlike those of training: how well a number tells them, and the usual numbers of frozen features.

A detector is fitted to features of training images and gives each image a number, larger is more normal:

- **MaxProbability** (arXiv 1610.02136): the largest probability of a linear probe.
- **Mahalanobis** (arXiv 1807.03888): the distance to the nearest class mean, under one covariance of all classes.
- **Padim** (arXiv 2011.08785): that to the mean of each patch, under a covariance of its own; the patch that is farthest
  counts. It needs images that show their object in the same place.
- **NearestNeighbors** (arXiv 2204.06507): the distance to the k-th nearest training image, of features of length 1.
"""

from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from flowback.core.devices import CPU, put
from flowback.core.errors import InputError
from flowback.encoders import Encoder

PATCH_DIMS = 100  # of a patch's features, drawn at random, that are kept (arXiv 2011.08785, section 4.1)


class Features(NamedTuple):
    """What an encoder says of n images, on the CPU."""

    pooled: np.ndarray  # [n, F], the mean over patches
    patches: np.ndarray  # [n, P, d], some of the F numbers of each patch


@torch.no_grad()
def features_of(encoder: Encoder, images: Tensor, device: torch.device = CPU, batch_size: int = 64) -> Features:
    """The frozen features of images `[n, C, H, W]` in [-1, 1]; `device` is where the encoder is."""
    some = torch.randperm(encoder.dim, generator=torch.Generator().manual_seed(0))[:PATCH_DIMS].sort().values
    found = []
    for part in images.split(batch_size):
        features = encoder(put(part, device)).float().cpu()
        found.append((features.mean(dim=1), features[:, :, some]))
    return Features(*(torch.cat(parts).numpy() for parts in zip(*found, strict=True)))


class Detector(Protocol):
    """Finds images that are unlike those that it was fitted to."""

    def fit(self, features: Features, y: np.ndarray) -> Self:
        """Learn what is normal from training images with labels `y [n]`, all 0 if there are no classes."""
        ...

    def score(self, features: Features) -> np.ndarray:
        """How normal images are, `[n]`."""
        ...


class MaxProbability:
    """A linear probe; what it is sure of is normal.

    Args:
        classes: K, of which the training images need not show all.
    """

    def __init__(self, classes: int) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.classes, self.temperature = classes, 1.0
        self.probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))

    def fit(self, features: Features, y: np.ndarray) -> Self:
        """Fit the probe.

        Raises:
            InputError: if all images are of one class.
        """
        if len(np.unique(y)) < 2:
            raise InputError("a linear probe needs training images of at least 2 classes, got 1")
        self.probe.fit(features.pooled, y)
        return self

    def logits(self, features: Features) -> Tensor:
        """`[n, K]`; minus infinity for classes without training images."""
        found = torch.from_numpy(self.probe.predict_log_proba(features.pooled)).double()
        return found.new_full((len(found), self.classes), -torch.inf).index_copy(
            1, torch.from_numpy(self.probe.classes_).long(), found
        )

    def score(self, features: Features) -> np.ndarray:
        """The largest probability, its temperature being `temperature`."""
        return (self.logits(features) / self.temperature).softmax(dim=1).amax(dim=1).numpy()


class Mahalanobis:
    """The squared distance to the nearest class mean, in the metric of one shrunk covariance (Ledoit and Wolf 2004)."""

    def fit(self, features: Features, y: np.ndarray) -> Self:
        """Fit means and covariance."""
        from sklearn.covariance import LedoitWolf

        classes, own = np.unique(y, return_inverse=True)
        self.means = np.stack([features.pooled[own == k].mean(axis=0) for k in range(len(classes))])
        covariance: Any = LedoitWolf(assume_centered=True).fit(features.pooled - self.means[own])
        self.whiten = np.linalg.cholesky(covariance.precision_)
        return self

    def score(self, features: Features) -> np.ndarray:
        """Minus the squared distance."""
        from sklearn.metrics.pairwise import euclidean_distances

        return -euclidean_distances(features.pooled @ self.whiten, self.means @ self.whiten, squared=True).min(axis=1)


class Padim:
    """A Gaussian for each patch; an image is as normal as its least normal patch."""

    def fit(self, features: Features, y: np.ndarray) -> Self:
        """Fit a mean and a shrunk covariance for each patch."""
        from sklearn.covariance import LedoitWolf

        self.patches: list[Any] = [LedoitWolf().fit(patch) for patch in features.patches.swapaxes(0, 1)]
        return self

    def score(self, features: Features) -> np.ndarray:
        """Minus the largest squared distance of a patch."""
        pairs = zip(self.patches, features.patches.swapaxes(0, 1), strict=True)
        return -np.max([gaussian.mahalanobis(patch) for gaussian, patch in pairs], axis=0)


class NearestNeighbors:
    """The distance to the k-th nearest training image, of features of length 1.

    Args:
        k: neighbors, at most as many as there are training images.
    """

    def __init__(self, k: int = 10) -> None:
        self.k = k

    def fit(self, features: Features, y: np.ndarray) -> Self:
        """Keep the training images."""
        from sklearn import neighbors

        self.nearest = neighbors.NearestNeighbors(n_neighbors=min(self.k, len(y))).fit(_unit(features.pooled))
        return self

    def score(self, features: Features) -> np.ndarray:
        """Minus the distance."""
        return -self.nearest.kneighbors(_unit(features.pooled))[0][:, -1]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-12)


def separation(inliers: np.ndarray, outliers: np.ndarray) -> dict[str, float]:
    """How well a score `[n]` of normal images and `[m]` of outliers, larger is more normal, tells which is which.

    Returns:
        "auroc": the chance that a normal image scores higher than an outlier; "fpr_at_95_tpr": the share of outliers that
        pass where 95 % of the normal images do. A score that is not finite is the lowest.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    scores = np.concatenate([inliers, outliers]).astype(np.float64)
    finite = np.isfinite(scores)
    scores = np.where(finite, scores, scores[finite].min(initial=0) - 1)
    normal = np.arange(len(scores)) < len(inliers)
    fpr, tpr, _ = roc_curve(normal, scores, drop_intermediate=False)
    return {"auroc": float(roc_auc_score(normal, scores)), "fpr_at_95_tpr": float(fpr[np.searchsorted(tpr, 0.95)])}
