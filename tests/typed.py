"""What users write first, as their type checkers see it: `make lint` checks it, nothing runs it."""

from pathlib import Path

import torch
from torch import Tensor

from flowback import Alignment, LatentFlow, TarFlow, classify, from_pretrained, load_encoder, score, train
from flowback.runs.config import RunConfig, TrainConfig


def draw_and_judge() -> Tensor:
    flow = TarFlow.from_pretrained("flowback/digits")
    x: Tensor = flow.sample(y=[3, 7], guidance=1.0, seed=0)
    z, _ = flow.encode(x, y=[3, 7])
    again: Tensor = flow.decode(z, y=[3, 7])
    nats: Tensor = flow.log_prob(flow.perturb(x), y=3)
    scores: Tensor = classify(flow, again, rule="exact")
    return nats + scores[:, 0] + score(flow, x).typicality


def either_kind(name: str) -> int:
    flow = from_pretrained(name)
    return flow.autoencoder.config.channels if isinstance(flow, LatentFlow) else flow.channels


def align(x: Tensor, y: Tensor) -> Path:
    flow = TarFlow(image_size=32, num_classes=10, patch_size=4)
    alignment = Alignment(flow, load_encoder("efficientnet_lite0", grid=flow.grid), at=[(3, 2), (4, 2)], strategy="reverse")
    optimizer = torch.optim.AdamW(alignment.parameters(), lr=1e-3)
    loss, parts = alignment.loss(flow.perturb(x), y, x)
    loss.backward()
    optimizer.step()
    assert parts["nll"] <= loss
    return train(RunConfig(run="runs/mine", train=TrainConfig(steps=3)), flow=flow).run
