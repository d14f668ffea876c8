"""What an autoencoder loses, measured on held-out images: `reconstruction.json` and a picture; and its folder for others.

The file's fields: "run", "data", "held_out" (a fingerprint of the images), "machine", "kind", "latents" (channels, height,
width), and "reconstruction": the figures of `flowback.measure.reconstruction.reconstruction`. Where the decoder was trained
with noise, "noised" has the same of latents with the strongest noise that it has seen, "noise_std": what a flow's samples
have.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowback.core.devices import machine, pick_device, put
from flowback.core.errors import InputError
from flowback.core.files import check_place, new_folder, write_whole
from flowback.core.seeds import keyed_normal
from flowback.core.units import from_levels, to_uint8
from flowback.data import DataConfig, ImageSet
from flowback.data.pictures import save_grid
from flowback.data.splits import spread
from flowback.latents import Autoencoder
from flowback.latents.losses import load_lpips
from flowback.measure.fidelity import SplitImages, TensorImages
from flowback.measure.reconstruction import reconstruction
from flowback.runs.checkpoint import load_trained_autoencoder
from flowback.runs.config import AutoencoderRunConfig, RunConfig, load_yaml
from flowback.runs.folder import other_data, run_data, run_of

FILE = "reconstruction.json"
SHOWN = 32  # images in the picture, each beside its reconstructions
EXTRACTORS = ("efficientnet_lite0", "dinov2", "inception", "none")


@dataclass(frozen=True)
class ReconstructionTest:
    """What to measure.

    Args:
        images: held-out images; null for all.
        extractor: of rFID: efficientnet_lite0, dinov2 or inception; none for no rFID.
        extractor_weights: a local file of the extractor's weights.
        lpips: measure LPIPS too, which needs the package lpips and VGG16's weights.
        lpips_weights: a local file of torchvision's VGG16; null to let torchvision download it.
        batch_size: images at once.

    Raises:
        InputError: if a value is impossible.
    """

    images: int | None = None
    extractor: str = "efficientnet_lite0"
    extractor_weights: str | None = None
    lpips: bool = False
    lpips_weights: str | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.images is not None and self.images < 2:
            raise InputError(f"--images must be at least 2, got {self.images}")
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.extractor not in EXTRACTORS:
            raise InputError(f"extractor must be one of {', '.join(EXTRACTORS)}, got {self.extractor!r}")


@torch.no_grad()
def evaluate_autoencoder(
    run: str | Path,
    test: ReconstructionTest = ReconstructionTest(),
    device: torch.device | str = "cpu",
    data: ImageSet | dict[str, Any] | None = None,
    output: str | Path | None = None,
) -> tuple[dict[str, Any], Path]:
    """Measure an autoencoder on held-out images, and write reconstruction.json and reconstruction.png.

    Args:
        run: a run that trained it, alone or with a flow; a checkpoint of it; a folder or hub id of an autoencoder.
        test: what to measure.
        device: where to run; "auto" for the accelerator that is there.
        data: on which images: options of `DataConfig`, or an `ImageSet`; None for the data of the run.
        output: a folder; None for the run's own.

    Returns:
        What was measured, by the names that it has in the file, and the file.

    Raises:
        InputError: if the data is not named or does not fit, or something that a figure needs cannot be had.
    """
    folder = Path(output) if output is not None else Path(run)
    if output is None and not folder.is_dir():
        raise InputError(f"{run} is no local folder; give -o, a folder for what is measured")
    check_place(folder / FILE)
    if data and output is None and run_of(run):
        raise InputError(f"{folder / FILE} is of the run's own data; give -o, a folder for what others show")
    autoencoder = load_trained_autoencoder(run).to(pick_device(device))
    found, known = _data(run, autoencoder, data), autoencoder.config
    if found.channels != known.image_channels:
        raise InputError(f"data.channels must be {known.image_channels} for this autoencoder, got {found.channels}")
    shape = [known.channels, *known.latent_size(found.size)]
    lpips = load_lpips(test.lpips_weights, found.size).to(autoencoder.device) if test.lpips else None
    indices = spread(len(found.held_out), test.images or len(found.held_out))
    real = SplitImages(found.held_out, found.levels, len(indices))
    facts: dict[str, Any] = {"run": Path(run).resolve().name, "data": found.name, "held_out": found.held_out.fingerprint()}
    facts |= {"machine": machine(autoencoder.device), "kind": known.kind, "latents": shape}
    extractor = None if test.extractor == "none" else test.extractor
    shown = [_images(found, indices[:SHOWN], autoencoder.device)]
    levels = {"reconstruction": 0.0} | ({"noised": known.noise_std} if known.noise_std else {})
    pixels: dict[str, list[Tensor]] = {name: [] for name in levels}
    for start in range(0, len(indices), test.batch_size):
        some = indices[start : start + test.batch_size]
        latents = autoencoder.encode(_images(found, some, autoencoder.device))
        noise = put(torch.stack([keyed_normal(latents.shape[1:], 0, i) for i in some]), autoencoder.device)
        for name, std in levels.items():
            pixels[name].append(to_uint8(autoencoder.decode(latents + std * noise)))
    for name, std in levels.items():
        images = torch.cat(pixels[name])
        options = {"batch_size": test.batch_size, "device": autoencoder.device}
        compared = TensorImages(images), real, autoencoder.encoder, lpips, extractor, test.extractor_weights
        facts[name] = reconstruction(*compared, **options) | ({"noise_std": std} if std else {})
        shown.append(from_levels(put(images[:SHOWN], autoencoder.device)))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, lambda file: file.write_text(json.dumps(facts, indent=1) + "\n"))
    save_grid(torch.stack(shown, dim=1).flatten(0, 1), folder / "reconstruction.png", columns=4 * len(shown))
    return facts, folder / FILE


def _images(data: ImageSet, indices: Any, device: torch.device) -> Tensor:
    return from_levels(put(data.held_out[indices][0], device), data.levels)


def _data(run: str | Path, autoencoder: Autoencoder, given: ImageSet | dict[str, Any] | None) -> ImageSet:
    """The images to measure on: those of the run where nothing else is given.

    Raises:
        InputError: if there are none.
    """
    if isinstance(given, ImageSet):
        return given
    began = run_of(run)
    if began is None:
        if not given:
            raise InputError(f"{run} has no config.yaml that names its data; expected a run's folder, or --data.name")
        known = autoencoder.config
        return other_data(None, DataConfig(**({"image_size": known.image_size, "channels": known.image_channels} | given)))
    file = began / "config.yaml"
    recipe = RunConfig if "flow" in load_yaml(file.read_text("utf-8")) else AutoencoderRunConfig
    config = recipe.read(file).data
    if not given:
        return run_data(began, config, recipe)
    same = given.get("name", config.name) == config.name
    return other_data(began, replace(config, **given) if same else DataConfig(**given))


def export_autoencoder(run: str | Path, folder: Path) -> None:
    """Write the autoencoder that a run trained, alone or with a flow, into a new folder, for flows to use.

    Raises:
        InputError: if the run holds none, or the folder is not empty.
    """
    autoencoder = load_trained_autoencoder(run)
    with new_folder(folder) as inside:
        autoencoder.save_pretrained(inside)
