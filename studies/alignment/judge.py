"""A small classifier of Fashion-MNIST, trained on labels: its features were used for no alignment.

    python studies/alignment/judge.py        trains it, about two minutes on a core, and says how often it is right

It serves `flowback.measure.fidelity` as an extractor named "judge": FID, precision and recall on its 128 features, and
beside them how often it sees in a sample the class that was asked for.
"""

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


class Judge(nn.Module):
    """Two convolutions and two linear layers; images `[B, 1, 28, 28]` in [-1, 1] to 128 features and 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU()),
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[B, 128]` and logits `[B, 10]`."""
        features = self.body(x)
        return features, self.head(features)


def trained(file: Path) -> Judge:
    """The judge from a file, or trained and written there."""
    torch.manual_seed(SEED)
    judge = Judge()
    if file.is_file():
        judge.load_state_dict(torch.load(file, weights_only=True))
        return judge.eval()
    data = load_data(DataConfig(name="fashion_mnist"))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.01)
    steps = EPOCHS * (len(data.train) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for indices in torch.randperm(len(data.train)).split(BATCH)[: steps // EPOCHS]:
            pixels, y = data.train[indices.tolist()]
            loss = F.cross_entropy(judge(from_levels(pixels))[1], y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    write_whole(file, lambda part: torch.save(judge.state_dict(), part))
    return judge.eval()


@torch.no_grad()
def right(judge: Judge, images: Tensor, y: Tensor) -> float:
    """Share of images uint8 `[n, 1, 28, 28]` in which the judge sees the class `y`."""
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
        """Images uint8 `[B, 3, H, W]`, all channels equal, to `[B, 128]`."""
        return (self.judge(from_levels(input[:, :1]))[0],)


EXTRACTORS["judge"] = ("flowback-judge", JudgeExtractor)


def main() -> None:
    """Train it and say how good it is."""
    judge = trained(Path("runs/studies/alignment/judge.pth"))
    data = load_data(DataConfig(name="fashion_mnist"))
    pixels, y = data.held_out[list(range(len(data.held_out)))]
    print(f"the judge is right on {right(judge, pixels, y):.1%} of {len(y)} held-out images")


if __name__ == "__main__":
    main()
