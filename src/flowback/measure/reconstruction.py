"""How close reconstructions are to their images: PSNR, SSIM, a frozen encoder's features, LPIPS, and rFID."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flowback.core.devices import autocast, put
from flowback.core.errors import InputError
from flowback.core.units import from_levels
from flowback.encoders import Encoder
from flowback.latents.losses import feature_error
from flowback.measure.fidelity import Images, fidelity

RANGE = 2.0  # of images in [-1, 1]
WINDOW, SIGMA = 11, 1.5  # of SSIM: pixels


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio `[B]` in dB of images `[B, C, H, W]` in [-1, 1]; infinite where they are equal."""
    return 10 * (RANGE**2 / (x - x_hat).square().mean(dim=(1, 2, 3))).log10()


def ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """Structural similarity `[B]` of images `[B, C, H, W]` in [-1, 1] (Wang et al. 2004, equation 13).

    The mean over channels and all whole windows of 11x11 pixels under a Gaussian of 1.5; of smaller images the largest
    odd window that fits.
    """
    side = min(WINDOW, *((n - 1) // 2 * 2 + 1 for n in x.shape[-2:]))
    at = torch.arange(side, device=x.device, dtype=x.dtype) - side // 2
    kernel = (-(at**2) / (2 * SIGMA**2)).exp()
    kernel = kernel / kernel.sum()

    def mean(image: Tensor) -> Tensor:
        rows = F.conv2d(image.flatten(0, 1)[:, None], kernel.view(1, 1, -1, 1))
        return F.conv2d(rows, kernel.view(1, 1, 1, -1)).view(len(x), -1)

    with autocast(x.device, "32-true"):  # differences of squares
        m, m_hat = mean(x), mean(x_hat)
        v, v_hat, cov = mean(x * x) - m * m, mean(x_hat * x_hat) - m_hat * m_hat, mean(x * x_hat) - m * m_hat
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    return ((2 * m * m_hat + c1) * (2 * cov + c2) / ((m**2 + m_hat**2 + c1) * (v + v_hat + c2))).mean(dim=1)


@torch.no_grad()
def reconstruction(
    reconstructed: Images,
    real: Images,
    encoder: Encoder | None = None,
    lpips: nn.Module | None = None,
    extractor: str | None = "efficientnet_lite0",
    weights: str | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measure reconstructions against their images, of which there are as many, in the same order.

    Args:
        reconstructed: images uint8 `[3, H, W]`, streamed.
        real: the same, what they should be.
        encoder: a frozen encoder whose features are compared; None for none.
        lpips: as `flowback.latents.losses.load_lpips` makes it; None for none.
        extractor: of rFID, as in `flowback.measure.fidelity`; None for no rFID.
        weights: of the extractor.
        batch_size: images at once.
        device: where the work is done.

    Returns:
        "psnr" (dB; images that are equal up to rounding would be infinite, and count as 100), "ssim", and where asked for
        "feature_error" (squared, relative), "feature_cosine" (mean over patches), "lpips", and "rfid" with "extractor";
        and "images", their number.

    Raises:
        InputError: if there are not as many of both, or none, or what `fidelity` raises.
    """
    if len(reconstructed) != len(real) or not len(real):
        raise InputError(f"there must be as many reconstructions as images, got {len(reconstructed)} and {len(real)}")
    device = torch.device(device)
    sums: dict[str, Any] = {}
    for pair in zip(DataLoader(real, batch_size), DataLoader(reconstructed, batch_size), strict=True):
        x, x_hat = (from_levels(put(images, device)) for images in pair)
        found = {"psnr": psnr(x, x_hat).clamp(max=100), "ssim": ssim(x, x_hat)}
        if encoder is not None:
            features, features_hat = encoder(x), encoder(x_hat)
            found["feature_error"] = feature_error(features_hat, features)
            found["feature_cosine"] = F.cosine_similarity(features_hat, features, dim=-1).mean(dim=1)
        if lpips is not None:
            found["lpips"] = lpips(x_hat, x).flatten()
        for name, values in found.items():
            sums[name] = sums.get(name, 0) + values.sum()
    figures = {name: float(total) / len(real) for name, total in sums.items()} | {"images": len(real)}
    if extractor is not None:
        measured = fidelity(reconstructed, real, ("fid",), extractor, weights, batch_size=batch_size, device=device)
        figures |= {"rfid": measured["fid"], "extractor": extractor}
    return figures
