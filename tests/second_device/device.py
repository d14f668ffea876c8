"""The device to Python: compiling, plugging in, counting."""

import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from filelock import FileLock

NAME = "second"
LIBRARY = "second_device_extension"
HERE = Path(__file__).parent
SOURCE = HERE / "second_device.cpp"
AUTOLOAD = HERE / "autoload"  # on the path of a process it makes PyTorch call plug_in there; see its entry_points.txt


@dataclass
class Counts:
    """How many operations there were, and how often the host waited."""

    operations: int = 0
    waits: int = 0


@dataclass
class Log:
    """The names of operations, and of waits with the lines that they came from."""

    operations: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)


class Second(str):
    """The device's name, which PyTorch takes wherever it takes a device, with the device's counters."""

    def operations(self) -> int:
        """How many operations ran on the device so far. Views, allocations and copies are none."""
        return _register().operations()

    def waits(self) -> int:
        """How often the host would have waited for a GPU so far: for a value, for a size, or for a copy."""
        return _register().waits()

    @contextmanager
    def counted(self) -> Iterator[Counts]:
        """What happens meanwhile, counted at the end."""
        counts = Counts(-self.operations(), -self.waits())
        try:
            yield counts
        finally:
            counts.operations += self.operations()
            counts.waits += self.waits()

    @contextmanager
    def logged(self) -> Iterator[Log]:
        """What happens meanwhile, by name; to find where a wait comes from."""
        log = Log()

        def note(kind: str, name: str) -> None:
            if kind == "wait":
                log.waits.append(f"{name} from {_caller()}")
            else:
                log.operations.append(name)

        _register().log_to(note)
        try:
            yield log
        finally:
            _register().log_to(None)


@contextmanager
def plugged() -> Iterator[Second]:
    """The device, which is there for the time of the context, also for processes that are started in it."""
    extension = _register()
    before = extension.is_plugged()
    path = [*sys.path, str(AUTOLOAD)]  # spawned processes take it from here, others from the environment
    with patch.dict(os.environ, environment()), patch.object(sys, "path", path):
        extension.plug(True)
        try:
            yield Second(NAME)
        finally:
            extension.plug(before)


def plug_in() -> None:
    """Plug the device in for the rest of the process."""
    _register().plug(True)


def environment() -> dict[str, str]:
    """The environment of a process in which the device is plugged in as soon as torch is imported."""
    _register()  # so that the process need not compile it
    path = os.environ.get("PYTHONPATH")
    folders = [str(AUTOLOAD), str(HERE.parent), *([path] if path else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}


def missing() -> str | None:
    """Why the device cannot be had on this machine, if so."""
    if _library().exists():
        return None
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "the second device needs a C++ compiler (g++); none was found"
    if shutil.which("ninja", path=_path_with_scripts()) is None:
        return "the second device needs ninja (pip install ninja) to be compiled; it was not found"
    return None


@cache
def _register() -> Any:
    """The extension, with the device known to PyTorch but not plugged in."""
    which = torch._C._accelerator_getAccelerator
    other = which()
    extension = _load()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _torch_module(extension))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    # A device of this kind comes before the machine's own as soon as it is registered, whether it is available or not.
    torch._C._accelerator_getAccelerator = lambda: which() if extension.is_plugged() else other
    extension.default_generator().manual_seed(torch.initial_seed())  # as if the device had been there when it was set
    return extension


def _torch_module(extension: Any) -> ModuleType:
    """What PyTorch looks for in `torch.second`, as in `torch.cuda`."""
    module = ModuleType(f"torch.{NAME}")
    module.__dict__.update(
        is_available=extension.is_plugged,
        is_initialized=extension.is_plugged,
        device_count=lambda: int(extension.is_plugged()),
        current_device=lambda: 0,
        set_device=lambda device: None,
        device=lambda device: nullcontext(),
        synchronize=torch.accelerator.synchronize,
        manual_seed=lambda seed: extension.default_generator().manual_seed(seed),
        manual_seed_all=lambda seed: extension.default_generator().manual_seed(seed),
        get_rng_state=lambda device=NAME: extension.default_generator().get_state(),
        set_rng_state=lambda state, device=NAME: extension.default_generator().set_state(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        _is_in_bad_fork=extension.is_forked,
        _lazy_init=lambda: None,
    )
    return module


def _library() -> Path:
    """Where the compiled extension is kept: in the virtual environment, or else where PyTorch keeps extensions."""
    root = Path(sys.prefix) / "second_device"
    if not os.access(root if root.exists() else sys.prefix, os.W_OK):
        from torch.utils.cpp_extension import get_default_build_root

        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "second_device"
    digest = hashlib.sha256(f"{sys.implementation.cache_tag} {SOURCE.read_text()}".encode()).hexdigest()
    return root / torch.__version__ / digest[:16] / f"{LIBRARY}.so"


def _load() -> Any:
    library = _library()
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(library.parent / "lock"):  # of the operating system, which frees it when its holder dies
        if not library.exists():
            return _compile(library)
    spec = importlib.util.spec_from_file_location(LIBRARY, library)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def _compile(library: Path) -> Any:
    """Compile the extension in a folder of its own and move it to its place, so that what is there is whole."""
    from torch.utils.cpp_extension import load

    build = library.parent / "build"
    shutil.rmtree(build, ignore_errors=True)  # what a process left that died, a lock of PyTorch's among it
    build.mkdir(exist_ok=True)
    with patch.dict(os.environ, PATH=_path_with_scripts()):
        extension = load(LIBRARY, [str(SOURCE)], extra_cflags=["-O0"], build_directory=str(build))
    os.replace(build / library.name, library)
    shutil.rmtree(build)
    return extension


def _path_with_scripts() -> str:
    """The PATH with the environment's scripts, among them ninja, also where the environment is not activated."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def _caller() -> str:
    """The innermost lines of Python that are not PyTorch's or this file's, of the thread that waits."""
    lines, frame = [], sys._getframe(1)
    while frame is not None and len(lines) < 3:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(os.path.dirname(torch.__file__)):
            lines.append(f"{os.path.basename(file)}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(lines) or "autograd's thread"
