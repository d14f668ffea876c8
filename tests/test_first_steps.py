"""What people type first, as they type it."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import flowback
from flowback import Alignment, FlowConfig, InputError, TarFlow, classify, train
from flowback.data import DataConfig, ImageSet
from flowback.data.splits import MemorySplit
from flowback.runs.config import AlignmentConfig, RunConfig, TrainConfig

SMALL = {"patch_size": 2, "width": 32, "blocks": 2, "layers": 1}


@pytest.fixture
def flow():
    torch.manual_seed(0)
    flow = TarFlow(image_size=8, channels=1, num_classes=10, **SMALL)
    for p in flow.parameters():
        nn.init.normal_(p, std=0.05)
    return flow.eval()


def run_config(folder, steps=2):
    short = TrainConfig(steps=steps, batch_size=8, warmup=1, eval_images=8, accelerator="cpu")
    return RunConfig(run=str(folder), data=DataConfig(name="digits"), flow=FlowConfig(**SMALL), train=short)


def test_samples_have_the_shapes_that_were_asked_for(flow):
    assert flow.sample(3).shape == (3, 1, 8, 8)
    assert flow.sample((2, 3)).shape == (2, 3, 1, 8, 8)
    assert flow.sample(3, y=7).shape == (3, 1, 8, 8)
    assert flow.sample(y=[3, 7], guidance=2.0).shape == (2, 1, 8, 8)
    assert torch.equal(flow.sample(2, seed=1), flow.sample(2, seed=1))
    images, log_prob = flow.sample((2, 3), return_log_prob=True)
    assert images.shape[:2] == log_prob.shape == (2, 3)


def test_images_may_be_pil_arrays_and_paths(flow, tmp_path):
    array = (np.arange(64).reshape(8, 8) * 4).astype(np.uint8)
    picture = Image.fromarray(array)
    picture.save(tmp_path / "a.png")
    scores = [classify(flow, x, "exact") for x in (picture, array, tmp_path / "a.png", str(tmp_path / "a.png"))]
    assert scores[0].shape == (1, 10)
    assert all(torch.equal(scores[0], other) for other in scores)
    assert classify(flow, [picture, tmp_path / "a.png"], "exact").shape == (2, 10)
    assert classify(flow, Image.new("RGB", (31, 50)), "exact").shape == (1, 10)  # of another size and depth


def test_training_on_ones_own_data_set(tmp_path):
    images, labels = torch.randint(256, (32, 3, 8, 12), dtype=torch.uint8), torch.arange(32) % 2
    own = MemorySplit(images, labels)
    data = ImageSet("mine", own, own, ["cat", "dog"], (8, 12), 3, 256)
    result = train(run_config(tmp_path / "run"), data=data)
    assert result.flow.sample(2, y=1).shape == (2, 3, 8, 12)


class Pooling(nn.Module):
    """An encoder of one's own: means of patches, through a layer with dropout."""

    grid, dim = (4, 4), 16

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(1, 16, 2, stride=2), nn.Dropout(0.5))

    def forward(self, x):
        return self.layer(x).flatten(2).transpose(1, 2)


def test_alignment_with_ones_own_encoder(flow, tmp_path):
    encoder = Pooling()
    align = Alignment(flow, encoder, at=[(2, 1)]).train()
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not [name for name in align.state_dict() if name.startswith("encoder")]
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    loss, _ = align.loss(flow.perturb(x), torch.tensor([1, 2, 3, -1]), x)
    loss.backward()
    torch.optim.SGD([p for p in align.parameters() if p.requires_grad], 0.1).step()
    config = replace(run_config(tmp_path / "run"), alignment=AlignmentConfig(strategy="reverse", at=[[2, 1]]))
    assert train(config, encoder=encoder).state.step == 2


def test_fine_tuning_a_flow(flow, tmp_path):
    before = copy.deepcopy(flow.state_dict())
    config = run_config(tmp_path / "run", steps=1)
    result = train(replace(config, train=replace(config.train, lr=1e-9)), flow=flow)
    after = result.flow.core.state_dict()
    assert all(torch.allclose(before[name].cpu(), after[name].cpu(), atol=1e-6) for name in before)


def test_torch_compile(flow):
    del flow.blocks[1:]  # a compiler takes as long for each
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    compiled = torch.compile(flow, fullgraph=True)
    for found, expected in zip(compiled(x, torch.tensor([1, 2])), flow(x, torch.tensor([1, 2])), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_images_that_are_not_square():
    flow = TarFlow(image_size=(4, 6), channels=3, num_classes=0, **SMALL).double()
    x = torch.rand(2, 3, 4, 6).double()
    z, _ = flow.encode(x)
    assert torch.allclose(flow.decode(z), x, atol=1e-10)
    assert flow.sample(2).shape == (2, 3, 4, 6)


def test_copies_and_pickles(flow):
    x = torch.rand(2, 1, 8, 8)
    for copied in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(copied.encode(x)[0], flow.encode(x)[0])


def test_state_dict(flow):
    other = TarFlow(flow.config)
    other.load_state_dict(flow.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(other.log_prob(x), flow.log_prob(x))


def test_saving_loading_and_the_hub(flow, tmp_path, monkeypatch):
    flow.save_pretrained(tmp_path / "flow")
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "flow")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = flowback.from_pretrained("me/my-flow", revision="v1", token="secret", cache_dir=tmp_path)
    assert (asked["name"], asked["revision"], asked["token"]) == ("me/my-flow", "v1", "secret")
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x))
    with pytest.raises(InputError, match="nowhere"):
        TarFlow.from_pretrained("nowhere")
