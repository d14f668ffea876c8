"""A flow in the latents of an autoencoder, with the methods of a flow and images at its ends."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from flowback.core.errors import InputError
from flowback.core.files import read_json, write_whole
from flowback.core.seeds import Generators, keyed_generator
from flowback.data.images import Images, as_images
from flowback.flow import io
from flowback.flow.decoding import Solved
from flowback.flow.labels import Labels
from flowback.flow.tarflow import TarFlow
from flowback.latents.autoencoder import Autoencoder, AutoencoderConfig
from flowback.latents.loading import build_autoencoder, copy_files, load_autoencoder


class LatentFlow(io.Pretrained, nn.Module):
    """A flow over the latents of an autoencoder, with images as input and output; z and likelihoods are those of latents.

    Args:
        flow: models latents: its channels are the autoencoder's, and its noise is Gaussian, since latents have no bins.
        autoencoder: frozen; it moves with `.to()`. One without a name was trained together with the flow: its weights are
            saved with the flow's.

    Raises:
        InputError: if the two do not fit each other.
    """

    def __init__(self, flow: TarFlow, autoencoder: Autoencoder) -> None:
        super().__init__()
        if not isinstance(flow, TarFlow) or not isinstance(autoencoder, Autoencoder):
            found = f"{type(flow).__name__} and {type(autoencoder).__name__}"
            raise InputError(f"a LatentFlow is made of a TarFlow and an Autoencoder (load_autoencoder), got {found}")
        a = autoencoder.config
        if flow.channels != a.channels:
            raise InputError(f"the flow must have the {a.channels} channels of the latents, got {flow.channels}")
        if flow.config.noise != "gaussian":
            raise InputError(f"flow.noise must be gaussian in latents, which have no bins, got {flow.config.noise!r}")
        if a.name is None and a.kind != "joint":
            raise InputError(
                f"the {a.kind} autoencoder must have a folder, by which the flow finds it again; save it, and take what "
                "load_autoencoder(folder) gives"
            )
        self.flow, self.autoencoder = flow, autoencoder
        self.config, self.num_classes, self.channels = flow.config, flow.num_classes, a.image_channels
        self.token_shape, self.grid, self.dims = flow.token_shape, flow.grid, flow.dims
        height, width = (side * a.downsample for side in flow.image_size)
        self.image_size, self.data_shape = (height, width), (a.image_channels, height, width)
        a.latent_size(self.image_size)

    @property
    def core(self) -> TarFlow:
        """The flow in its own space, that of latents."""
        return self.flow

    @property
    def stored(self) -> nn.Module:
        """What has the weights that are written: the flow, or both where the autoencoder was trained with it."""
        return self if self.autoencoder.config.name is None else self.flow

    @property
    def denoises(self) -> bool:
        """Whether samples have noise that is to be removed: more than the decoder was trained with."""
        return self.flow.config.noise_std > self.autoencoder.config.noise_std

    @property
    def device(self) -> torch.device:
        """Where the flow is."""
        return self.flow.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the flow's parameters."""
        return self.flow.dtype

    def to_data(self, images: Tensor, generator: Generators = None) -> Tensor:
        """Images `[B, C, H, W]` in [-1, 1] as latents `[B, *core.data_shape]`, as the flow sees them.

        `generator`, one for all images or one for each, is the source of noise where latents are samples.
        """
        if images.dim() != 4 or images.shape[1:] != self.data_shape:
            allowed = ", ".join(map(str, self.data_shape))
            raise InputError(f"images must have the shape [B, {allowed}], got {list(images.shape)}")
        return self.flow.enter(self.autoencoder.encode(self.flow.enter(images), generator))

    def to_images(self, x: Tensor) -> Tensor:
        """Latents `[B, *core.data_shape]` as images `[B, C, H, W]`, nearly in [-1, 1]; in chunks."""
        return self.autoencoder.decode(self.flow.enter(x))

    def encode(self, x: Tensor, y: Labels = None, trace: Any = None, generator: Generators = None) -> Any:
        """Map images `[B, C, H, W]` to z: as `TarFlow.encode`, of their latents; `generator` as in `to_data`."""
        return self.flow.encode(self.to_data(x, generator), y, trace=trace)

    def forward(self, x: Tensor, y: Labels = None) -> tuple[Tensor, Tensor]:
        """`encode` without a trace."""
        return self.encode(x, y)

    def log_prob(self, x: Tensor, y: Labels = None, generator: Generators = None) -> Tensor:
        """Log-density `[B]`, nats, of the latents of clean images, with the noise of training added from `generator`.

        It is a density of latents, not of pixels, and compares in the same latents with the same noise only.
        """
        return self.flow.log_prob(self.flow.perturb(self.to_data(x, generator), generator), y)

    def decode(self, z: Tensor, y: Labels = None, *args: Any, **kwargs: Any) -> Tensor:
        """Map noise `[B, N, D]` to images: as `TarFlow.decode`, then the autoencoder; differentiable, too."""
        return self.decode_with_report(z, y, *args, **kwargs)[0]

    def decode_with_report(self, z: Tensor, y: Labels = None, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Solved]]:
        """`decode`, and how each block was decoded."""
        x, report = self.flow.decode_with_report(z, y, *args, **kwargs)
        return self.to_images(x), report

    def sample(self, num: int | tuple[int, ...] | None = None, y: Labels = None, **options: Any) -> Any:
        """Draw images: as `TarFlow.sample`; a log-probability is that of the latents.

        Where `denoise` is not given, latents are denoised if `denoises` says so.
        """
        options["denoise"] = self.denoises if options.get("denoise") is None else options["denoise"]
        drawn = self.flow.sample(num, y, **options)
        x, rest = (drawn[0], drawn[1:]) if isinstance(drawn, tuple) else (drawn, ())
        images = self.to_images(x.flatten(0, -4)).unflatten(0, x.shape[:-3])
        return (images, *rest) if rest else images

    def class_weights(self, y: Labels, batch: int) -> Tensor | None:
        """As `TarFlow.class_weights`."""
        return self.flow.class_weights(y, batch)

    def describe(self) -> dict[str, Any]:
        """What config.json holds: the options of the flow, and what it has to know of the autoencoder."""
        described = {"flow": asdict(self.flow.config), "autoencoder": asdict(self.autoencoder.config)}
        if self.stored is self:
            own = {"model": type(self.autoencoder).__name__, **self.autoencoder.describe()}
            described["autoencoder"] = own
        return described

    def save_portable(self, path: str | Path, with_autoencoder: bool = False) -> None:
        """`save_pretrained`, with the autoencoder in the folder `autoencoder` if it is not on the hub, or if asked.

        Raises:
            InputError: if the autoencoder's files are gone.
        """
        self.save_pretrained(path)
        file, name = Path(path) / "config.json", self.autoencoder.config.name
        if name is not None and (with_autoencoder or Path(name).is_dir() or not io.is_hub_id(name)):
            copy_files(name, file.parent / "autoencoder")
            described = read_json(file)
            described["autoencoder"]["name"] = "autoencoder"  # a place on this machine means nothing on another one
            write_whole(file, lambda whole: whole.write_text(json.dumps(described, indent=2) + "\n"))

    @classmethod
    def build(cls, description: dict[str, Any], folder: Path) -> Self:
        """The flow without its weights, and the autoencoder: that in the folder, if there is one, or else the one named.

        One that was trained together with the flow has no weights yet, either.
        """
        try:
            known = dict(description["autoencoder"])
            own = known.pop("model", None)
            flow: TarFlow = io.build_checked(TarFlow, dict(description["flow"]), folder)
            if own is not None:
                return cls(flow, build_autoencoder(own, known, folder).freeze())
            config = AutoencoderConfig(**known)
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / 'config.json'} does not describe a LatentFlow ({error})") from error
        inside = folder / "autoencoder"
        if inside.is_dir():
            config = AutoencoderConfig(**{**asdict(config), "name": str(inside)})
        return cls(flow, load_autoencoder(config))


Flow = TarFlow | LatentFlow


def as_data(flow: Flow, images: Images) -> Tensor:
    """Images in any form that `as_images` takes, clean, as the flow sees them: `[B, *core.data_shape]`, on its device.

    Where latents are samples, those of an image are always the same, whatever images are beside it.

    Raises:
        InputError: if they are no images, or of another shape.
    """
    images = as_images(images, flow.image_size, flow.channels)
    x = flow.to_data(images, [keyed_generator(0) for _ in images])
    if x.shape[1:] != flow.core.data_shape:
        allowed = ", ".join(map(str, flow.data_shape))
        raise InputError(f"images must have the shape [B, {allowed}], got {list(x.shape)}")
    return x


@torch.inference_mode(False)
def from_pretrained(path_or_hub_id: str | Path, **options: Any) -> Flow:
    """Load a flow, whichever of the two a folder or a name on the hub holds; arguments as in `TarFlow.from_pretrained`."""
    where = {name: options.pop(name) for name in ("revision", "token", "cache_dir") if name in options}
    folder = io.find_folder(str(path_or_hub_id), **where)
    kind = LatentFlow if io.read_description(folder)["model"] == "LatentFlow" else TarFlow
    return kind.from_pretrained(folder, **options)
