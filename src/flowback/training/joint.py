"""Training an autoencoder together with a flow in its latents (SimFlow, arXiv 2512.04084): its batches, and the loss."""

from typing import Any

import torch
from torch import Tensor, nn

from flowback.alignment import Alignment
from flowback.core.devices import put
from flowback.core.seeds import draw
from flowback.data import ImageSet
from flowback.data.batches import Raw
from flowback.flow.tarflow import TarFlow
from flowback.latents.joint import JointAutoencoder, signal_figures
from flowback.latents.losses import ReconstructionLoss
from flowback.runs.config import RunConfig
from flowback.training.build import make_encoder
from flowback.training.inputs import Batch, Inputs


class JointInputs(Inputs):
    """The batches of a run that trains both: clean images, the noise of their latents, and which patches are hidden.

    Args:
        config: of the run.
        data: its images.
        flow: as of `Inputs`; so are `alignment`, `device` and `share`.
        joint: the autoencoder.
    """

    def __init__(
        self,
        config: RunConfig,
        data: ImageSet,
        flow: TarFlow,
        joint: JointAutoencoder,
        alignment: Alignment | None,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(config, data, flow, None, alignment, device, share)
        self.joint = joint.to(device)

    def prepare(self, raw: Raw, step: int) -> Batch:
        """Everything random in step `step`, from 0: mirrored images, noise, hidden patches, dropped labels."""
        drawn = self.draw(raw, step)
        x, count = drawn.x, len(drawn.y)
        assert x is not None
        noise = draw(torch.randn, x.new_empty(count, *self.flow.data_shape), drawn.generators)
        masks = self.joint.options.mask > 0
        places = draw(torch.rand, x.new_empty(count, *self.joint.places), drawn.generators) if masks else None
        y = put(drawn.y, self.device) if self.flow.num_classes else None
        return Batch(x, y, self._targets(raw.indices, drawn.flipped, x), noise=noise, places=places)


class Joint(nn.Module):
    """`L_rec(x, D(z)) + nll_weight * L(z)` with `z = E(x) + s e` and L the flow's loss, aligned or not.

    The gradient of the likelihood goes on into E; no part of the graph is cut.

    Args:
        likelihood: the flow's loss.
        autoencoder: E and D.
        reconstruction: `L_rec`.
    """

    def __init__(self, likelihood: nn.Module, autoencoder: JointAutoencoder, reconstruction: ReconstructionLoss) -> None:
        super().__init__()
        self.likelihood, self.autoencoder, self.reconstruction = likelihood, autoencoder, reconstruction
        if isinstance(likelihood, Alignment):
            likelihood.to_input = autoencoder.options.align_encoder

    @property
    def flow(self) -> TarFlow:
        """The flow."""
        return self.likelihood.flow  # pyright: ignore[reportReturnType]

    @property
    def gradient(self) -> str | int | None:
        """That of the alignment, if there is one."""
        return getattr(self.likelihood, "gradient", None)

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        y: Tensor | None = None,
        places: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss and its parts.

        Args:
            x: clean images `[B, C, H, W]`, at least 2.
            noise: e, standard normal, `[B, *flow.data_shape]`.
            y: labels `[B]`, -1 for none; or None.
            places: which patches of the images E does not see (`latents.joint.hide`).
            targets: of the alignment.
        """
        options = self.autoencoder.options
        mean, z, reconstructed = self.autoencoder(x, noise, places)
        loss, parts = self.reconstruction(x, reconstructed)
        flow_loss, flow_parts = self.likelihood(z, y, targets=targets)
        return loss + options.nll_weight * flow_loss, parts | flow_parts | signal_figures(mean, options)


def make_reconstruction(
    config: RunConfig, data: ImageSet, flow: TarFlow, alignment: Alignment | None
) -> ReconstructionLoss:
    """The loss of reconstructions that a configuration describes; features are those of the alignment's encoder."""
    encoder = None
    if config.reconstruction.features:
        encoder = make_encoder(config.alignment, flow) if alignment is None else alignment.encoder
    return ReconstructionLoss(config.reconstruction, data.channels, data.size, encoder)
