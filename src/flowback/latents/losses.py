"""How far a reconstruction is from its image: pixels, a frozen encoder's features, LPIPS, and what a discriminator sees."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from flowback.core.errors import InputError
from flowback.core.files import check_zip
from flowback.encoders import Carrier, Encoder

LEAST_SIDE = 16  # of images that VGG16 halves four times
PIXELS = {"l1": F.l1_loss, "l2": F.mse_loss}


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """What a decoder is trained with: `pixels + features * ... + lpips * ... + adversarial * ...`.

    Args:
        pixels: l1 (mean absolute error) or l2 (mean squared error) of pixels, with weight 1.
        features: weight of the relative squared error of a frozen encoder's features.
        lpips: weight of LPIPS, which needs the package lpips and VGG16's weights.
        lpips_weights: a local file of torchvision's VGG16; null to let torchvision download it.
        adversarial: weight of the generator's part of the hinge loss.
        adversarial_from: share of the run after which it acts, and its discriminator learns.
        discriminator_width: channels of the discriminator's first layer.

    Raises:
        InputError: if a value is impossible.
    """

    pixels: str = "l1"
    features: float = 0.0
    lpips: float = 0.0
    lpips_weights: str | None = None
    adversarial: float = 0.0
    adversarial_from: float = 0.0
    discriminator_width: int = 32

    def __post_init__(self) -> None:
        if self.pixels not in PIXELS:
            raise InputError(f"reconstruction.pixels must be one of {', '.join(PIXELS)}, got {self.pixels!r}")
        for name in ("features", "lpips", "adversarial"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"reconstruction.{name} must be a number of at least 0, got {getattr(self, name)}")
        if not 0 <= self.adversarial_from <= 1:
            raise InputError(f"reconstruction.adversarial_from must be a share from 0 to 1, got {self.adversarial_from}")
        if self.discriminator_width < 1:
            raise InputError(f"reconstruction.discriminator_width must be at least 1, got {self.discriminator_width}")


class Discriminator(nn.Sequential):
    """How real the patches of images look: `[B, channels, H, W]` to logits `[B, 1, h, w]` (PatchGAN, arXiv 1611.07004).

    Spectrally normalized convolutions (arXiv 1802.05957), two of which halve the sides, or three from 64 pixels on.

    Args:
        channels: of the images.
        width: channels of the first layer; doubled where the sides are halved.
        size: height and width of the images.
    """

    def __init__(self, channels: int, width: int, size: tuple[int, int]) -> None:
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        for _ in range(2 if min(size) < 64 else 3):
            layers += [nn.LeakyReLU(0.2), nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)]
            width *= 2
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 3, padding=1)]
        super().__init__(*(spectral_norm(layer) if isinstance(layer, nn.Conv2d) else layer for layer in layers))


class ReconstructionLoss(Carrier):
    """The loss of reconstructions, with the discriminator that is trained along: one loss, one backward, one optimizer.

    The generator's part sees the discriminator's weights detached, the discriminator's part sees the images detached.
    Encoder and LPIPS are frozen, and no submodules.

    Args:
        config: the weights.
        channels: of the images.
        size: their height and width.
        encoder: whose features are compared; needed where they have a weight.

    Raises:
        InputError: if the encoder is missing, or LPIPS cannot be had.
    """

    encoder: Encoder | None
    lpips: nn.Module | None

    def __init__(
        self, config: ReconstructionConfig, channels: int, size: tuple[int, int], encoder: Encoder | None = None
    ) -> None:
        super().__init__()
        if config.features and encoder is None:
            raise InputError("reconstruction.features needs an encoder; name one, or use reconstruction.features 0")
        self.config = config
        self.carry("encoder", encoder if config.features else None)
        self.carry("lpips", load_lpips(config.lpips_weights, size) if config.lpips else None)
        width = config.discriminator_width
        self.discriminator = Discriminator(channels, width, size) if config.adversarial else None
        self.active = True  # False: before `adversarial_from`

    def forward(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of images `x [B, C, H, W]` in [-1, 1] and their reconstructions.

        Returns:
            The loss, and its weighted parts without graph: "pixels", and where asked for "features", "lpips",
            "adversarial" and "discriminator".
        """
        c, parts = self.config, {}
        parts["pixels"] = PIXELS[c.pixels](x_hat, x)
        if self.encoder is not None:
            with torch.no_grad():
                wanted = self.encoder(x)
            parts["features"] = c.features * feature_error(self.encoder(x_hat), wanted).mean()
        if self.lpips is not None:
            parts["lpips"] = c.lpips * self.lpips(x_hat, x).mean()
        if self.discriminator is not None and self.active:
            fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            parts["adversarial"] = -c.adversarial * functional_call(self.discriminator, fixed, (x_hat,)).mean()
            real, fake = self.discriminator(torch.cat([x, x_hat.detach().to(x.dtype)])).chunk(2)
            parts["discriminator"] = (F.relu(1 - real) + F.relu(1 + fake)).mean() / 2
        loss = torch.stack(list(parts.values())).sum()
        if self.discriminator is not None and not self.active:
            loss = loss + 0 * torch.stack([p.sum() for p in self.discriminator.parameters()]).sum()  # wrappers expect it
        return loss, {name: part.detach() for name, part in parts.items()}


def feature_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of features `[B, P, F]`, relative to the square of those wanted, `[B]`."""
    return (found - wanted).square().sum(dim=(1, 2)) / wanted.square().sum(dim=(1, 2))


def load_lpips(weights: str | None, size: tuple[int, int]) -> nn.Module:
    """LPIPS on VGG16 (arXiv 1801.03924), frozen: two batches `[B, C, H, W]` in [-1, 1] to distances `[B, 1, 1, 1]`.

    Args:
        weights: a local file of torchvision's VGG16 (tensors only); None to let torchvision download it.
        size: height and width of the images.

    Raises:
        InputError: if the images are too small for VGG16, the package lpips is missing, or the weights cannot be had or do
            not fit.
    """
    if min(size) < LEAST_SIDE:
        raise InputError(f"LPIPS needs images of at least {LEAST_SIDE} pixels a side, got {list(size)}")
    try:
        from lpips import LPIPS
        from torchvision.models import VGG16_Weights
    except ImportError as error:
        raise InputError("LPIPS needs the package lpips: pip install 'flowback[latent]'") from error
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"reconstruction.lpips_weights must be a local file of torchvision's VGG16, got {weights}")
    try:
        if weights is None:
            state: Any = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True, weights_only=True)
        else:
            check_zip(Path(weights))
            state = torch.load(weights, weights_only=True, map_location="cpu")
        with warnings.catch_warnings(action="ignore"):  # of torchvision, about options that lpips names by earlier names
            model = LPIPS(net="vgg", pnet_rand=True, verbose=False)
        trunk = {name: state["features." + name.split(".", 1)[1]] for name in model.net.state_dict()}
        model.net.load_state_dict(trunk)
    except Exception as error:  # downloads, and checkpoint readers, raise many kinds
        given = f"in {weights}" if weights else "of torchvision, which need a network or reconstruction.lpips_weights,"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"LPIPS cannot use the weights {given} ({reason}); expected those of VGG16") from error
    return model.requires_grad_(False).eval()
