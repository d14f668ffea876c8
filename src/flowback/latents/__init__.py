"""Latents: autoencoders, and flows that work in their latents and speak images."""

from flowback.latents.autoencoder import Autoencoder, AutoencoderConfig
from flowback.latents.latent_flow import Flow, LatentFlow, as_data, from_pretrained
from flowback.latents.loading import load_autoencoder

__all__ = ["Autoencoder", "AutoencoderConfig", "Flow", "LatentFlow", "as_data", "from_pretrained", "load_autoencoder"]
