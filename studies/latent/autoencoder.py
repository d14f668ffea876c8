"""Train a small AutoencoderKL on Fashion-MNIST, 4 channels on a 7x7 grid: for latent flows where no hub is reachable.

    python studies/latent/autoencoder.py --output runs/autoencoder

L1 loss and a KL term of weight 1e-6, as Rombach et al. (arXiv 2112.10752) without their adversarial and perceptual
losses. It ends with the scaling_factor that gives the latents of training images unit variance, and prints the error of
held-out images. Interrupted, the same command goes on.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from flowback.core.console import Bar
from flowback.core.units import from_levels
from flowback.data import DataConfig, batches, load_data, step_generator
from flowback.training.optim import learning_rate

BATCH, PEAK, WARMUP, SAVE_EVERY = 64, 1e-3, 100, 100


def build(channels: int, width: int) -> AutoencoderKL:
    """Three resolutions, so that 28 pixels become 7 latents."""
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=4,
        block_out_channels=(width, 2 * width, 2 * width),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def loss_of(model: AutoencoderKL, x: Tensor, generator: torch.Generator) -> Tensor:
    posterior = model.encode(x).latent_dist
    reconstruction = model.decode(posterior.sample(generator)).sample
    return F.l1_loss(reconstruction, x) + 1e-6 * posterior.kl().mean()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/autoencoder"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    data = load_data(DataConfig(name="fashion_mnist"))
    model = build(data.channels, options.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=1e-4)
    options.output.mkdir(parents=True, exist_ok=True)
    unfinished, step = options.output / "unfinished.pt", 0
    if unfinished.exists():
        state = torch.load(unfinished, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    with Bar("autoencoder", options.steps, step) as bar:
        for raw in batches(data.train, BATCH, options.seed, step, options.steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step, PEAK, WARMUP, options.steps)
            with torch.enable_grad():
                assert raw.images is not None
                loss = loss_of(model, from_levels(raw.images), step_generator(options.seed, step))
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 10 == 0:
                bar.update(step, f"loss {float(loss):.4f}")
            if step % SAVE_EVERY == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, unfinished.with_suffix(".partial"))
                unfinished.with_suffix(".partial").replace(unfinished)
    model.eval()
    latents = torch.cat(
        [model.encode(from_levels(data.train[range(i, i + 100)][0])).latent_dist.mean for i in range(0, 2000, 100)]
    )
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    model.save_pretrained(options.output)
    x = from_levels(data.held_out[range(1000)][0])
    errors = [F.mse_loss(model.decode(model.encode(part).latent_dist.mean).sample, part) for part in x.split(100)]
    error = torch.stack(errors).mean()
    psnr = float(10 * torch.log10(4 / error))
    print(f"scaling_factor {float(1 / latents.std()):.4f}, held-out PSNR {psnr:.1f} dB: {options.output}")


if __name__ == "__main__":
    main()
