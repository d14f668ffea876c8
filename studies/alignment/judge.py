"""A small classifier of the images of a study, trained on labels: its features were used for no alignment.

    python studies/alignment/judge.py        trains that of Fashion-MNIST, about two minutes on a core, and says how
                                             often it is right

It serves `flowback.measure.fidelity` as an extractor named "judge": FID, precision and recall on its 128 features, and
beside them how often it sees in a sample the class that was asked for.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from flowback.core.files import write_whole
from flowback.core.units import from_levels
from flowback.data import DataConfig, load_data
from flowback.measure.extractors import EXTRACTORS

EPOCHS, BATCH, SEED = 4, 128, 0
FASHION = DataConfig(name="fashion_mnist")


class Judge(nn.Module):
    """Two convolutions and two linear layers; images `[B, C, S, S]` in [-1, 1] to 128 features and a logit a class."""

    def __init__(self, channels: int = 1, side: int = 28, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * (side // 4) ** 2, 128), nn.ReLU()),
        )
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[B, 128]` and logits `[B, 10]`."""
        features = self.body(x)
        return features, self.head(features)


@torch.enable_grad()
def trained(file: Path, of: DataConfig = FASHION, epochs: int = EPOCHS, augment: bool = False) -> Judge:
    """The judge from a file, or trained on all training images of a data set and written there.

    With `augment` images are mirrored and moved by up to 2 pixels, at random, and rare classes weigh as much as others.
    """
    if file.is_file():
        weights = torch.load(file, weights_only=True)
        side = 4 * math.isqrt(weights["body.9.weight"].shape[1] // 64)
        judge = Judge(weights["body.0.weight"].shape[1], side, len(weights["head.weight"]))
        judge.load_state_dict(weights)
        return judge.eval()
    data = load_data(of)
    torch.manual_seed(SEED)
    judge = Judge(data.channels, data.size[0], len(data.classes))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.01)
    steps = epochs * (len(data.train) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pixels, labels = data.train[range(len(data.train))]
    rarity = len(labels) / labels.bincount() / len(data.classes) if augment else None
    for _ in range(epochs):
        for indices in torch.randperm(len(labels)).split(BATCH)[: steps // epochs]:
            x = from_levels(pixels[indices])
            loss = F.cross_entropy(judge(moved(x) if augment else x)[1], labels[indices], rarity)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    write_whole(file, lambda part: torch.save(judge.state_dict(), part))
    return judge.eval()


def moved(x: Tensor, most: int = 2) -> Tensor:
    """Half of the images mirrored, and all moved by up to `most` pixels; what comes in is the edge's color."""
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
    right, down = torch.randint(-most, most + 1, (2,)).tolist()
    padded = F.pad(x, [most] * 4, mode="replicate")
    return padded.roll((down, right), (2, 3))[..., most:-most, most:-most]


@torch.no_grad()
def right(judge: Judge, images: Tensor, y: Tensor) -> float:
    """Share of images uint8 `[n, C, S, S]` in which the judge sees the class `y`."""
    return float(torch.cat([judge(from_levels(part))[1].argmax(1) for part in images.split(256)]).eq(y).float().mean())


class JudgeExtractor(FeatureExtractorBase):
    """The judge in the form that torch-fidelity takes."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **options: Any
    ) -> None:
        super().__init__(name, features_list)
        assert feature_extractor_weights_path is not None
        self.judge = trained(Path(feature_extractor_weights_path))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """What it offers."""
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The only one."""
        return "features"

    @staticmethod
    def can_be_compiled() -> bool:
        """It is not needed."""
        return False

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Images uint8 `[B, 3, H, W]`, all channels equal where the judge takes one, to `[B, 128]`."""
        return (self.judge(from_levels(input[:, : self.judge.body[0].in_channels]))[0],)


EXTRACTORS["judge"] = ("flowback-judge", JudgeExtractor)


def main() -> None:
    """Train it and say how good it is."""
    judge = trained(Path("runs/studies/alignment/judge.pth"))
    data = load_data(FASHION)
    pixels, y = data.held_out[list(range(len(data.held_out)))]
    print(f"the judge is right on {right(judge, pixels, y):.1%} of {len(y)} held-out images")


if __name__ == "__main__":
    main()
