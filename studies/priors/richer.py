"""Would a richer prior than the fitted one pay? Mixtures, and a small flow on z, by held-out likelihood.

    python studies/priors/richer.py [flowback/fashion_mnist …] [--images 20000] [--steps 1500]

Prints, for each flow of Fashion-MNIST, the nats per dimension that held-out images gain above N(0, I): by the prior that
`flowback fit-prior` fits; by a mixture of K normal distributions in each class on top of that, whose means and variances
are shrunk by shares that other held-out images choose; and by a small flow on z (two blocks), kept at the step that these
chose.
"""

import argparse
import copy
import time

import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from flowback import from_pretrained
from flowback.core.seeds import keyed_generator
from flowback.core.units import LOG_2PI, from_levels
from flowback.data import DataConfig, ImageSet, load_data
from flowback.data.splits import spread
from flowback.flow.labels import class_weights
from flowback.flow.tarflow import TarFlow
from flowback.latents import Flow
from flowback.tasks.prior import fit_prior

COMPONENTS = (2, 4, 8)
SHARES = (0.25, 0.5, 0.75, 1.0)
BATCH = 250
HELD_OUT = 4000
Z = tuple[Tensor, Tensor]


@torch.no_grad()
def noised_z(flow: Flow, split: object, count: int, levels: int, seed: int) -> tuple[list[Z], Z]:
    """Images as the flow sees them in batches, and the z of their noised copies `[n, N, D]` with labels."""
    generator, batches, found = keyed_generator(seed), [], []
    indices = spread(len(split), count)
    for start in range(0, count, BATCH):
        x, y = split[indices[start : start + BATCH]]
        x = flow.to_data(from_levels(x, levels))
        batches.append((x, y))
        found.append((flow.core.encode(flow.core.perturb(x, generator), y)[0], y))
    return batches, (torch.cat([z for z, _ in found]), torch.cat([y for _, y in found]))


def standard(z: Tensor) -> Tensor:
    """Log-density under N(0, I), nats, `[n]`."""
    return -0.5 * (z.square() + LOG_2PI).flatten(1).sum(dim=1)


def mixtures(z: Z, chosen: Z, measured: Z, classes: int, components: int) -> Tensor:
    """Log-density of measured rows under a mixture for each class, `[n]`, of rows that are nearly N(0, I)."""
    found = torch.zeros(len(measured[0]))
    for k in range(classes):
        own, choose, measure = (rows[y == k].flatten(1) for rows, y in (z, chosen, measured))
        fit = GaussianMixture(components, covariance_type="diag", reg_covar=1e-2, max_iter=50, random_state=0).fit(
            own.numpy()
        )
        weights, means, variances = (torch.from_numpy(v).float() for v in (fit.weights_, fit.means_, fit.covariances_))

        def density(rows: Tensor, of_means: float, of_variances: float, parts: tuple[Tensor, ...]) -> Tensor:
            weights, means, variances = parts
            m, v = of_means * means, 1 + of_variances * (variances - 1)
            terms = [-0.5 * ((rows - a).square() / b + b.log() + LOG_2PI).sum(dim=1) for a, b in zip(m, v, strict=True)]
            return (torch.stack(terms, dim=1) + weights.log()).logsumexp(dim=1)

        parts = weights, means, variances
        best = max(((a, b) for a in SHARES for b in (0.0, *SHARES)), key=lambda s: float(density(choose, *s, parts).mean()))
        found[measured[1] == k] = density(measure, *best, parts)
    return found


def small_flow(z: Z, chosen: Z, measured: Z, grid: tuple[int, int], classes: int, steps: int) -> Tensor:
    """Log-density of measured z under a small flow on z, at the step that the chosen ones prefer, `[n]`."""

    def as_images(rows: Tensor) -> Tensor:
        return rows.transpose(1, 2).unflatten(2, grid).contiguous()

    torch.manual_seed(0)
    channels = z[0].shape[2]
    flow = TarFlow(
        image_size=grid, channels=channels, patch_size=1, width=64, blocks=2, layers=2, head_dim=32, num_classes=classes
    )
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, kept = -float("inf"), copy.deepcopy(flow)
    for step in range(steps):
        rows = torch.randint(len(z[0]), (128,))
        loss = -flow.log_prob(as_images(z[0][rows]), z[1][rows]).mean() / z[0][0].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            with torch.no_grad():
                now = float(flow.log_prob(as_images(chosen[0]), chosen[1]).mean())
            if now > best:
                best, kept = now, copy.deepcopy(flow)
    with torch.no_grad():
        return kept.log_prob(as_images(measured[0]), measured[1])


def study(name: str, data: ImageSet, images: int, steps: int) -> None:
    """Print the rows of one flow."""
    flow = from_pretrained(name)
    core = flow.core
    batches, z = noised_z(flow, data.train, images, data.levels, 0)
    held_batches, (held, y) = noised_z(flow, data.held_out, HELD_OUT, data.levels, 1)
    half = HELD_OUT // 2
    chosen, measured = (held[:half], y[:half]), (held[half:], y[half:])
    base, dims = standard(measured[0]), measured[0][0].numel()

    def say(prior: str, log_prob: Tensor, started: float) -> None:
        gain = (log_prob - base) / dims
        error = float(gain.std()) / len(gain) ** 0.5
        print(
            f"| {name} | {prior} | {float(gain.mean()):.4f} ± {2 * error:.4f} | {time.monotonic() - started:.0f} |",
            flush=True,
        )

    started = time.monotonic()
    fit = fit_prior(core, batches, held_batches[: half // BATCH])
    prior = fit.prior
    if prior is None:
        print(f"| {name} | fitted | nothing gained, none kept | |")
        return
    parts = z, chosen, measured
    weights = [class_weights(y, len(y), core.num_classes, rows.dtype, rows.device) for rows, y in parts]
    fitted = prior.log_prob(measured[0], weights[2])
    say("fitted", fitted, started)
    noise = [(prior.to_noise(rows, w), labels) for (rows, labels), w in zip(parts, weights, strict=True)]
    for components in COMPONENTS:
        started = time.monotonic()
        density = mixtures(*noise, core.num_classes, components)
        say(f"fitted, then a mixture of {components}", fitted + density - standard(noise[2][0]), started)
    started = time.monotonic()
    say("a small flow on z", small_flow(z, chosen, measured, core.grid, core.num_classes, steps), started)


def main() -> None:
    """Study the flows that are named."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("flows", nargs="*", default=["flowback/fashion_mnist"])
    options.add_argument("--images", type=int, default=20_000)
    options.add_argument("--steps", type=int, default=1500)
    o = options.parse_args()
    data = load_data(DataConfig(name="fashion_mnist"))
    print("| flow | prior | held-out nats/dim gained (± two standard errors) | s |\n|---|---|---|---|", flush=True)
    for name in o.flows:
        study(name, data, o.images, o.steps)


if __name__ == "__main__":
    main()
