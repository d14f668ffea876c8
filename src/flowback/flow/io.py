"""Models on disk and on the Hugging Face hub: a folder with config.json and model.safetensors. Strict, and never a pickle.

The hub's own mixin is not used: it would write a second config.json and a card into every checkpoint of a run, and turns
an unreachable hub into a warning.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from flowback.core.devices import pick_device
from flowback.core.errors import InputError
from flowback.core.files import read_json, save_tensors, typed_path, write_whole
from flowback.flow.autotune import FILE as AUTOTUNE
from flowback.flow.autotune import Autotune
from flowback.flow.config import FlowConfig
from flowback.flow.defaults import FILE as DEFAULTS
from flowback.flow.defaults import Defaults
from flowback.flow.prior import FILE as PRIOR
from flowback.flow.prior import FittedPrior
from flowback.flow.student import Lesson, Student, StudentConfig

FORMAT = 1
CARD = "README.md"
SHIPPED, OWNER = Path(__file__).parents[1] / "shipped", "flowback"  # flows that come with the package, and whose they are
MOST_TOKENS = 2**20
MOST_UNSEEN = 10**8  # numbers of a flow that are made on the word of a config.json
WEIGHTS = "model.safetensors"
LEARNED = ("student", "denoiser")  # folders of what was distilled of a flow, beside it
AUTOENCODER = [f"autoencoder/{prefix}.safetensors" for prefix in ("model", "diffusion_pytorch_model", "encoder")]
FILES = (
    "config.json",
    WEIGHTS,
    AUTOTUNE,
    PRIOR,
    DEFAULTS,
    "classification.json",
    "held_out.safetensors",
    "classes.json",
    "autoencoder/config.json",
    *AUTOENCODER,
    *(f"{name}/{file}" for name in LEARNED for file in ("config.json", WEIGHTS)),
)


class Pretrained:
    """What a model that lives in such a folder has: `save_pretrained`, `from_pretrained` and `push_to_hub`.

    A model says what its config.json holds (`describe`) and is made from it again (`build`), and which module's weights
    are written (`stored`).
    """

    if TYPE_CHECKING:
        core: Any

    weights_file = WEIGHTS

    @property
    def stored(self) -> nn.Module:
        """What has the weights that are written: here the `core`, the flow."""
        return self.core

    def describe(self) -> dict[str, Any]:
        """What config.json holds besides the model's name: here the fields of `config`."""
        return dict(vars(self.core.config))

    @classmethod
    def build(cls, description: dict[str, Any], folder: Path) -> Self:
        """The model that a config.json in `folder` describes, without its weights."""
        return build_checked(cls, description, folder)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json, model.safetensors and what is known of these weights into the folder `path`.

        That is decoding.json (measured decoders), prior.safetensors (a prior that was fitted to them), sampling.json
        (defaults that were chosen for them) and the folders of what was distilled of them.
        """
        folder = Path(path)
        config = {"model": type(self).__name__, "format": FORMAT, **self.describe()}
        save_tensors(self.stored.state_dict(), folder / WEIGHTS)
        write_whole(folder / "config.json", lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))
        if self.core.autotune is not None:
            self.core.autotune.save(folder)
        else:
            (folder / AUTOTUNE).unlink(missing_ok=True)  # of another flow
        known: list[tuple[str, FittedPrior | Defaults | None]] = [
            (PRIOR, self.core.fitted_prior),
            (DEFAULTS, self.core.defaults),
        ]
        own = (
            fingerprint(self.core.state_dict())
            if self.core.learned or any(value and value.weights for _, value in known)
            else ""
        )
        for name, value in known:
            if value is not None and value.weights and value.weights == own:
                value.save(folder)
            else:
                (folder / name).unlink(missing_ok=True)
        for name, student in self.core.learned.items():
            if student.lesson.teacher == own:
                student.save_pretrained(folder / name)

    def save_portable(self, path: str | Path) -> None:
        """`save_pretrained`, and whatever else another machine needs: here nothing."""
        self.save_pretrained(path)

    @classmethod
    @torch.inference_mode(False)  # tensors that are made in it never get a gradient
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load a model from a folder written by `save_pretrained`, or from the Hugging Face hub by `owner/name`.

        Args:
            path_or_hub_id: the folder, or the name.
            revision: of the hub: a branch, tag or commit; None for main.
            token: of the hub; None for the one of `hf auth login` or HF_TOKEN.
            cache_dir: where downloads are kept; None for the hub's own place.
            device: where to put it; "auto" for the accelerator that is there; None for the CPU.

        Returns:
            The model in eval mode, in the precision that it was saved in, but at least float32.

        Raises:
            InputError: if there is no such folder, hub entry or device, or what is there is not a whole model of this kind.
        """
        where = pick_device(device or "cpu")
        folder = find_folder(str(path_or_hub_id), revision=revision, token=token, cache_dir=cache_dir)
        description = read_description(folder)
        model = description.pop("model")
        if model != cls.__name__:
            raise InputError(f"{folder} holds a {model}, not a {cls.__name__}; flowback.from_pretrained loads either")
        made: Any = cls.build(description, folder)
        load_tensors(made.stored, folder / WEIGHTS)
        core = made.core
        core.autotune, core.folder = Autotune.load(folder), folder
        if (folder / PRIOR).is_file() or (folder / DEFAULTS).is_file():
            weights = fingerprint(core.state_dict())
            if (folder / PRIOR).is_file():
                core.fitted_prior = FittedPrior.load(folder, core.token_shape, core.num_classes, weights)
            if (folder / DEFAULTS).is_file():
                core.defaults = Defaults.load(folder, weights)
        core.learned = load_learned(folder, core)
        return made.eval().to(where)

    def push_to_hub(self, repo_id: str, private: bool = False, token: str | None = None) -> str:
        """Upload to the Hugging Face hub, with a short card; `flowback export` writes one of all that a run knows.

        Args:
            repo_id: owner/name; made if it is not there.
            private: make it private.
            token: None for the one of `hf auth login` or HF_TOKEN.

        Returns:
            The address of the repository.

        Raises:
            InputError: if the name is not usable, or the hub did not take it.
        """
        check_repo_id(repo_id)
        with TemporaryDirectory() as temporary:
            self.save_portable(temporary)
            call = f'from flowback import from_pretrained\n\nflow = from_pretrained("{repo_id}")\nx = flow.sample(4)'
            text = f"# {repo_id}\n\nA normalizing flow, made with flowback.\n\n```python\n{call}\n```\n"
            (Path(temporary) / CARD).write_text(f"---\nlibrary_name: flowback\ntags: [normalizing-flow]\n---\n\n{text}")
            return upload(Path(temporary), repo_id, private, token)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors by name, like those of `state_dict`: of their values as float32, wherever they are."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.cpu().float().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def read_description(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says: "model", and what that is built from.

    Raises:
        InputError: if it is missing, or of something else.
    """
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no readable config.json of a flow ({error})") from error
    if (
        not isinstance(config, dict)
        or config.get("model") not in ("TarFlow", "LatentFlow")
        or config.pop("format", 0) != FORMAT
    ):
        raise InputError(f"{folder / 'config.json'} does not describe a TarFlow or LatentFlow of format {FORMAT}")
    return _of_earlier_versions(config)


def _of_earlier_versions(config: dict[str, Any]) -> dict[str, Any]:
    """Where the options of an autoencoder are among those of the flow, as version 0.1.0 wrote them, take them out."""
    if config["model"] != "TarFlow" or "autoencoder" not in config:
        return config
    old = {name: config.pop(f"latent_{name}", None) for name in ("channels", "downsample", "scale", "shift", "weights")}
    old |= {"posterior": config.pop("latent_posterior", "mean"), "name": config.pop("autoencoder")}
    if old["name"] is None:
        return config
    inside = {"image_size": config["image_size"] // old["downsample"], "channels": old["channels"]}
    autoencoder = old | {"image_channels": config["channels"]}
    flow = {name: value for name, value in (config | inside).items() if name != "model"}
    return {"model": "LatentFlow", "flow": flow, "autoencoder": autoencoder}


def load_tensors(module: nn.Module, file: Path) -> None:
    """Load a safetensors file into a module, strictly; the module takes the precision of the file, at least float32.

    Half precision saves room on disk. Exact inverses and likelihoods need more, and `torch.autocast` is there for speed.

    Raises:
        InputError: naming the first tensor that is missing, superfluous or of another shape, or an unreadable file.
    """
    from safetensors.torch import load_file

    check_shapes(module, file)
    found = load_file(file)
    dtype = torch.promote_types(next(iter(found.values())).dtype, torch.float32)
    module.to(dtype).load_state_dict(found)


def check_shapes(module: nn.Module, file: Path) -> None:
    """Whether a safetensors file holds the tensors of a module, which may be on the meta device; reads its header only.

    Raises:
        InputError: as `load_tensors`.
    """
    found = tensor_shapes(file)
    expected = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise InputError(f"{file} lacks the tensor {name}")
        if name not in expected:
            raise InputError(f"{file} has a tensor {name} that the model does not know")
        if expected[name] != found[name]:
            raise InputError(f"{file} has {name} of shape {found[name]}; expected {expected[name]}")


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file, by name.

    Raises:
        InputError: if it is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if file.exists() and not file.is_file():
            raise OSError("it is not a file")  # a pipe would be waited for
        with safe_open(file, "pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118  (not a dictionary)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as safetensors ({error})") from error


def build_checked(make: Callable[[FlowConfig], Any], options: Any, folder: Path) -> Any:
    """A flow of the options in a folder's config.json, after a look at the weights there.

    Options may ask for any amount of memory. A file of weights is as large as what it holds.

    Raises:
        InputError: if the options are impossible, or the weights are not theirs.
    """
    config, file = FlowConfig.complete(None, options), folder / WEIGHTS
    shapes = tensor_shapes(file)
    if sum(config.depths) > len(shapes):
        raise InputError(f"{file} lacks tensors: it has {len(shapes)}, of {sum(config.depths)} layers")
    (height, width), p, C = config.size, config.patch_size, config.width
    if (tokens := height * width // p**2) > MOST_TOKENS:  # tables of rotary positions are in no file
        raise InputError(f"{folder / 'config.json'} describes images of {tokens} tokens; expected at most {MOST_TOKENS}")
    outside = (
        3 * (config.channels or 0) * p**2 + (config.num_classes or 0) + (tokens if config.positions == "learned" else 0)
    )
    try:
        wanted = C * (sum(config.depths) * C * (4 + 2 * config.mlp_ratio) + config.blocks * outside)  # without biases
    except OverflowError:
        wanted = math.inf
    held = sum(math.prod(shape) for shape in shapes.values())
    if wanted > max(MOST_UNSEEN, 2 * held):  # below, the tensors are made, and the first that differs is named
        raise InputError(f"{folder / 'config.json'} describes a flow of {wanted:.3g} numbers, of which {file} has {held}")
    return make(config)


def load_learned(folder: Path, flow: Any) -> dict[str, Student]:
    """The students that lie in the folder of a flow, by name; those of other weights than the flow's are marked as stale.

    Raises:
        InputError: if one is not whole, or of a flow of another shape.
    """
    found = {name: load_student(folder / name) for name in LEARNED if (folder / name / "config.json").exists()}
    if found:
        weights, (N, D) = fingerprint(flow.state_dict()), flow.token_shape
        for name, student in found.items():
            lesson = student.lesson
            if (lesson.tokens, lesson.dim, lesson.classes) != (N, D, flow.num_classes):
                raise InputError(f"{folder / name} is of another flow than the one beside it; delete it")
            student.stale = lesson.teacher != weights
    return found


def load_student(folder: Path) -> Student:
    """The student in a folder, frozen.

    Raises:
        InputError: if there is none, or it is not whole.
    """
    file = folder / "config.json"
    try:
        known = read_json(file)
        config, lesson = StudentConfig(**known["student"]), Lesson(**known["lesson"])
        with torch.device("meta"):
            check_shapes(Student(config, lesson), folder / WEIGHTS)  # before memory is taken for what it describes
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"{file} does not describe a student ({error}); expected what flowback distill wrote") from error
    student = Student(config, lesson)
    load_tensors(student, folder / WEIGHTS)
    return student.requires_grad_(False).eval()


def find_folder(path_or_hub_id: str, files: Sequence[str] = FILES, **options: Any) -> Path:
    """The folder of a model of these `files`: a local one, the package's, or a copy of the hub's `owner/name`.

    Args:
        path_or_hub_id: the folder, or the name.
        files: patterns of what is downloaded.
        **options: of `huggingface_hub.snapshot_download`: revision, token, cache_dir.

    Raises:
        InputError: if there is neither.
    """
    folder = Path(typed_path(path_or_hub_id))
    if folder.exists():
        return folder
    if path_or_hub_id in shipped():
        return SHIPPED / folder.name
    beside = sorted(str(place) for place in folder.parent.iterdir() if place.is_dir()) if folder.parent.is_dir() else []
    near = difflib.get_close_matches(str(folder), beside, n=3)
    hint = f"; near it: {', '.join(near)}" if near else ""
    if not is_hub_id(path_or_hub_id):
        raise InputError(f"{path_or_hub_id} is neither a folder nor a hub id of the form owner/name{hint}")
    owner = folder.parts[0]
    if (owner == "runs" or Path(owner).is_dir()) and not options.get("revision"):  # it is not what anybody calls themselves
        said = f"there is no folder {path_or_hub_id}{hint}"
        raise InputError(f"{said}; a name on the hub beside a folder {owner} needs a revision, like main")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=list(files), **options))
    except Exception as error:  # the hub client raises many kinds: offline, unknown name, no access
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"there is no folder {path_or_hub_id}{hint}, and the hub did not give it ({reason})") from error


def shipped() -> list[str]:
    """The names of the flows that come with the package."""
    return sorted(f"{OWNER}/{file.parent.name}" for file in SHIPPED.glob("*/config.json"))


def is_hub_id(name: str) -> bool:
    """Whether a name that is no local path can be one on the hub, owner/name."""
    return re.fullmatch(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+", name, re.ASCII) is not None


def check_repo_id(repo_id: str) -> None:
    """Whether the hub would take a name.

    Raises:
        InputError: if it would not.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(
            f"{repo_id!r} is no name on the hub; expected owner/name of letters, digits, -, _ and ."
        ) from error
    if repo_id.count("/") != 1:
        raise InputError(f"{repo_id!r} has no owner; expected owner/name")


def upload(folder: Path, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Upload a folder's model and card to the hub, and delete there what an earlier one had and this one has not.

    Returns:
        The address of the repository.

    Raises:
        InputError: if the hub did not take it; a repository that is there and public is not made private.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise PermissionError("it is there already, and public")
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[*FILES, CARD],
            delete_patterns=list(FILES),
            commit_message="A flow, by flowback",
        )
    except Exception as error:  # the hub client raises many kinds: offline, no token, no permission
        reason = shorten(getattr(error, "server_message", None) or str(error) or type(error).__name__, 300).rstrip(".")
        raise InputError(
            f"the hub did not take {repo_id} ({reason}); it needs a network, and a token that may write there"
        ) from error
    return str(address)
