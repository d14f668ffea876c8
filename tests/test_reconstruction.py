"""Losses and figures of reconstructions: against their definitions, scikit-image's, and what they must tell apart."""

import sys

import numpy as np
import pytest
import skimage.data
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn.functional import avg_pool2d, cosine_similarity, interpolate
from torchvision.models import VGG16_Weights, vgg16

from builders import PatchEncoder, gradients, random_flow
from flowback import InputError
from flowback.core.units import from_levels, to_uint8
from flowback.encoders import load_encoder
from flowback.latents.losses import Discriminator, ReconstructionConfig, ReconstructionLoss, feature_error, load_lpips
from flowback.measure.fidelity import TensorImages
from flowback.measure.reconstruction import psnr, reconstruction, ssim


def encoder_of(channels=1):
    return PatchEncoder(random_flow(image_size=8, channels=channels, patch_size=4), dim=5)


def loss_of(encoder=None, **options):
    torch.manual_seed(0)
    loss = ReconstructionLoss(ReconstructionConfig(discriminator_width=8, **options), 1, (8, 8), encoder)
    return loss.double().eval()  # the power iteration of spectral norms goes on in training only


def upsampled(x, n):
    """Images blurred: every n x n pixels have their mean."""
    return interpolate(avg_pool2d(x, n), scale_factor=n)


@pytest.fixture
def pair(digits):
    """Digits, and the same blurred."""
    x = digits[0][:8].double()
    return x, upsampled(x, 2)


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_parts_are_what_they_are_called(pair):
    x, x_hat = pair
    encoder = encoder_of()
    loss = loss_of(encoder, features=0.5, adversarial=0.2)
    total, parts = loss(x, x_hat)
    found, wanted = encoder(x_hat), encoder(x)
    real, fake = loss.discriminator(x), loss.discriminator(x_hat)
    expected = {
        "pixels": (x - x_hat).abs().mean(),
        "features": 0.5
        * torch.stack([((a - b) ** 2).sum() / (b**2).sum() for a, b in zip(found, wanted, strict=True)]).mean(),
        "adversarial": -0.2 * fake.mean(),
        "discriminator": ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2,
    }
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-12), name
    assert total.item() == pytest.approx(sum(value.item() for value in expected.values()))
    assert loss_of(pixels="l2")(x, x_hat)[0].item() == pytest.approx((x - x_hat).square().mean().item())


def test_one_backward_trains_both_sides_as_two_would(pair):
    x, x_hat = pair
    loss, d = loss_of(adversarial=0.7), loss_of(adversarial=0.7).discriminator
    x_hat.requires_grad_()
    loss(x, x_hat)[0].backward()

    (generator,) = torch.autograd.grad((x - x_hat).abs().mean() - 0.7 * d(x_hat).mean(), x_hat)
    hinge = ((1 - d(x)).relu().mean() + (1 + d(x_hat.detach())).relu().mean()) / 2
    hinge.backward()
    assert torch.allclose(x_hat.grad, generator, atol=1e-14)
    wanted = gradients(d)
    assert wanted.keys()
    for name, gradient in gradients(loss.discriminator).items():
        assert torch.allclose(gradient, wanted[name], atol=1e-14), name


def test_before_its_time_the_discriminator_rests(pair):
    x, x_hat = pair
    loss = loss_of(adversarial=0.7)
    loss.active = False
    total, parts = loss(x, x_hat)
    total.backward()
    assert parts.keys() == {"pixels"}
    assert total.item() == parts["pixels"].item()
    assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())


def test_the_encoder_comes_along_and_is_no_part(pair):
    x, x_hat = pair
    loss = loss_of(encoder_of().float(), features=1.0)  # whose encoder became double with it
    loss(x, x_hat.requires_grad_())[0].backward()
    assert x_hat.grad.abs().max() > 0
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert all(p.grad is None and p.dtype == torch.float64 for p in loss.encoder.parameters())


@pytest.mark.parametrize("size", [(8, 8), (28, 20), (64, 80)])
def test_discriminators_judge_patches_of_images_of_any_size(size):
    logits = Discriminator(3, 8, size)(torch.zeros(2, 3, *size))
    shrunk = 8 if size == (64, 80) else 4
    assert logits.shape == (2, 1, size[0] // shrunk, size[1] // shrunk)


def test_a_discriminator_learns_to_see_blur(digits):
    x = digits[0]
    blurred = upsampled(x, 2)
    torch.manual_seed(0)
    loss = ReconstructionLoss(ReconstructionConfig(adversarial=1.0, discriminator_width=16), 1, (8, 8))
    optimizer = torch.optim.AdamW(loss.parameters(), lr=2e-3)
    for _ in range(60):
        some = torch.randint(1500, (64,))
        total, _ = loss(x[some], blurred[some])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        parts = loss.eval()(x[1500:], blurred[1500:])[1]
    assert parts["discriminator"] < 0.3  # 1 where it sees nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixels": "l3"}, "reconstruction.pixels must be one of l1, l2, got 'l3'"),
        ({"features": -1.0}, "reconstruction.features must be a number of at least 0, got -1.0"),
        ({"lpips": float("nan")}, "reconstruction.lpips must be a number of at least 0, got nan"),
        ({"adversarial_from": 1.5}, "reconstruction.adversarial_from must be a share from 0 to 1, got 1.5"),
        ({"discriminator_width": 0}, "reconstruction.discriminator_width must be at least 1, got 0"),
        ({"features": 1.0}, "reconstruction.features needs an encoder"),
        ({"lpips": 1.0}, "LPIPS needs images of at least 16 pixels a side"),
    ],
)
def test_impossible_losses_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ReconstructionLoss(ReconstructionConfig(**options), 1, (8, 8))


# ---- LPIPS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file of VGG16's convolutions, of random weights."""
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    state = {f"features.{name}": t for name, t in vgg16(init_weights=False).features.state_dict().items()}
    torch.save(state, file)
    return file


def test_lpips_reads_the_file_and_tells_more_blur_from_less(vgg, digits):
    lpips = load_lpips(str(vgg), (32, 32))
    assert torch.equal(lpips.net.slice5[-2].weight, torch.load(vgg)["features.28.weight"])
    x = interpolate(digits[0][:4], (32, 32))
    blurred = [upsampled(x, n) for n in (1, 8, 16)]
    none, some, more = (lpips(other, x).mean() for other in blurred)
    assert none == 0 < some < more
    assert not any(p.requires_grad for p in lpips.parameters())
    loss = ReconstructionLoss(ReconstructionConfig(lpips=2.0, lpips_weights=str(vgg)), 1, (32, 32))
    assert loss(x, blurred[1])[1]["lpips"].item() == pytest.approx(2 * some.item(), rel=1e-5)
    assert not loss.state_dict()


def test_where_lpips_cannot_be_had_one_sentence_says_so(vgg, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"reconstruction.lpips_weights must be a local file .*nowhere"):
        load_lpips(str(tmp_path / "nowhere.pth"), (32, 32))
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(InputError, match=r"LPIPS cannot use the weights in .*part\.pth .*expected those of VGG16"):
        load_lpips(str(tmp_path / "part.pth"), (32, 32))

    def offline(*args, **kwargs):
        raise OSError("no network here\nat all")

    monkeypatch.setattr(VGG16_Weights, "get_state_dict", offline)
    with pytest.raises(InputError, match=r"need a network or reconstruction.lpips_weights, \(no network here\)"):
        load_lpips(None, (32, 32))


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match=r"LPIPS needs the package lpips: pip install 'flowback\[latent\]'"):
        load_lpips(None, (32, 32))


# ---- figures --------------------------------------------------------------------------------------------------------


def photographs():
    """A grey and a color one, `[1, C, H, W]` in [-1, 1], and both with noise."""
    for name in ("camera", "chelsea"):
        image = torch.tensor(getattr(skimage.data, name)().copy())[:80, :60].double() / 127.5 - 1
        x = (image[..., None] if image.dim() == 2 else image).permute(2, 0, 1)[None]
        yield x, x + 0.2 * torch.randn_like(x)


def test_psnr_and_ssim_are_scikit_images():
    for x, x_hat in photographs():
        a, b = (image[0].permute(1, 2, 0).numpy() for image in (x, x_hat))
        assert psnr(x, x_hat).item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=2), rel=1e-9)
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
        assert ssim(x, x_hat).item() == pytest.approx(structural_similarity(a, b, data_range=2, **options), rel=1e-6)


def test_ssim_of_small_images_by_hand(digits):
    x = digits[0][:3].double()
    assert torch.allclose(ssim(x, x), torch.ones(3).double())
    one, other, c1 = torch.full((1, 1, 8, 8), 0.5), torch.full((1, 1, 8, 8), 0.1), 0.02**2
    assert ssim(one, other).item() == pytest.approx((2 * 0.05 + c1) / (0.26 + c1), rel=1e-5)
    assert psnr(one, other).item() == pytest.approx(10 * np.log10(4 / 0.16), rel=1e-5)


def test_ssim_is_the_same_under_autocast(digits):
    x = interpolate(digits[0][:8], (28, 28))
    x_hat = x + 0.05 * torch.randn_like(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = ssim(x, x_hat)
    assert torch.equal(found, ssim(x, x_hat))


def test_figures_of_equal_and_of_blurred_images(digits):
    x = digits[0][:12]
    encoder = load_encoder("efficientnet_lite0", grid=(2, 2))

    def measure(n, **options):
        pictures = (TensorImages(to_uint8(images)) for images in (upsampled(x, n), x))
        return reconstruction(*pictures, encoder, batch_size=5, **options)

    equal, blurred = measure(1), measure(2)
    assert equal["psnr"] == 100
    assert equal["feature_error"] == 0
    assert (equal["ssim"], equal["feature_cosine"]) == pytest.approx((1, 1), abs=1e-5)
    assert equal["rfid"] == pytest.approx(0, abs=1e-3)
    assert blurred["rfid"] > 1
    assert (blurred["images"], blurred["extractor"]) == (12, "efficientnet_lite0")
    seen, wanted = (from_levels(to_uint8(images)) for images in (upsampled(x, 2), x))
    assert blurred["psnr"] == pytest.approx(psnr(wanted, seen).mean().item(), rel=1e-4)
    assert blurred["ssim"] == pytest.approx(ssim(wanted, seen).mean().item(), rel=1e-4)
    found, wanted = encoder(seen), encoder(wanted)
    assert blurred["feature_error"] == pytest.approx(feature_error(found, wanted).mean().item(), rel=1e-4)
    assert blurred["feature_cosine"] == pytest.approx(cosine_similarity(found, wanted, dim=2).mean().item(), rel=1e-4)

    def lpips(found, wanted):
        return (found - wanted).square().mean(dim=(1, 2, 3), keepdim=True)

    alone = measure(2, lpips=lpips, extractor=None)
    assert alone.keys() == blurred.keys() - {"rfid", "extractor"} | {"lpips"}
    assert alone["lpips"] == pytest.approx((4 / 10 ** (psnr(seen, from_levels(to_uint8(x))) / 10)).mean().item(), rel=1e-4)


def test_pairs_must_be_as_many(digits):
    some, fewer = (TensorImages(to_uint8(digits[0][:n])) for n in (4, 3))
    with pytest.raises(InputError, match="there must be as many reconstructions as images, got 3 and 4"):
        reconstruction(fewer, some, extractor=None)
    with pytest.raises(InputError, match="got 0 and 0"):
        reconstruction(*[TensorImages(torch.zeros(0, 1, 8, 8, dtype=torch.uint8))] * 2, extractor=None)
