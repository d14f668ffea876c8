"""Files on disk: known by their content, read as what they should be, written whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from flowback.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

PICTURES = "png jpg jpeg jfif gif webp avif bmp tif tiff ppm pgm svg pdf mp4"
KINDS = frozenset(f"{PICTURES} npz npy safetensors pt pth zip tar gz json csv yaml txt html".split())  # suffixes of files
OWN = ("png", "npz", "safetensors")  # those that flowback writes
MAX_JSON = 2**28  # bytes; the names of a million classes take a tenth

_SEEKING = threading.Lock()  # of files without `pread`


def file_hash(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: if it is none, or nested deeper than any that flowback writes.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(file: Path) -> Any:
    """What a JSON file says.

    Raises:
        OSError: if it cannot be read, or is a pipe or device, which would be waited for.
        ValueError: as `parse_json`, or if it is larger than any that flowback writes.
    """
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "it is not a file", str(file))
    if file.stat().st_size > MAX_JSON:
        raise ValueError(f"it is larger than {MAX_JSON} bytes")
    return parse_json(file.read_bytes())


def check_zip(file: Path) -> None:
    """Find out, before it is unpacked, that a zip (an .npz, or what torch.save wrote) is no bomb; other files are none.

    Raises:
        ValueError: if it holds more than a GiB, and 20 times its size.
        OSError: if it cannot be read.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > max(2**30, 20 * file.stat().st_size):
            raise ValueError(f"it unpacks to {unpacked} bytes")


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Bytes of an open file from `offset` on; with `pread`, which moves no position, forked processes may share it."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _SEEKING:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, flush it to the disk, then rename it: the name always means a complete file.

    Any number of processes may do so at once. If `write` raises, nothing is left behind and an earlier file stays.

    Args:
        file: the file; its folder is made.
        write: called with the path to write to, which ends as the file's name does.

    Raises:
        OSError: of the file's name, if it cannot be written.
    """
    partial = file.with_name(f".partial-{uuid4().hex}-{file.name[-40:]}")  # names have at most 255 bytes
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, "Tensor"], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, by `write_whole`; tensors may be anywhere, in any layout.

    Raises:
        OSError: of the file's name, if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(partial: Path) -> None:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        except SafetensorError as error:  # on a full disk
            raise OSError(None, str(error)) from error

    write_whole(file, write)


def write_record(file: Path, format: int, values: dict[str, Any]) -> None:
    """Write values beside a flow as a JSON file, with the number of its format.

    Raises:
        OSError: of the file's name, if it cannot be written.
    """
    text = json.dumps({"format": format, **values}, indent=1, allow_nan=False) + "\n"
    write_whole(file, lambda partial: partial.write_text(text))


@contextmanager
def read_record(file: Path, format: int, remedy: str) -> Iterator[dict[str, Any]]:
    """The values of a file that `write_record` wrote. What is made of them in the `with` block is checked there.

    Raises:
        InputError: if it is something else, or the block raises as bad values make it; its last words are the `remedy`.
    """
    try:
        content = read_json(file)
        if (found := content.pop("format")) != format:
            raise ValueError(f"it is of format {found}, not {format}")
        yield content
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(f"{file} cannot be used ({error}); {remedy}") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` to write into; its files move up once all are written. If that fails, nothing is left.

    Raises:
        InputError: if the folder holds something, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already; use a new or an empty folder")
    is_new, inside = not folder.exists(), folder / f".partial-{uuid4().hex}"
    check_place(folder)
    inside.mkdir(parents=True)
    try:
        yield inside
        for file in inside.iterdir():
            file.rename(folder / file.name)
    finally:
        shutil.rmtree(inside, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # it holds what was written
                folder.rmdir()


def check_place(place: Path) -> None:
    """Find out before long work whether its output, a file or a folder, can be written; nothing is left behind.

    Raises:
        InputError: if it cannot.
    """
    try:
        with suppress(FileNotFoundError):
            place.lstat()  # is the name one?
        there = next(folder for folder in (place, *place.absolute().parents) if os.path.lexists(folder))
        if there == place and not place.is_dir():
            if not os.access(place, os.W_OK):
                raise PermissionError(errno.EACCES, "it is read-only")
            there = place.absolute().parent
        with tempfile.TemporaryFile(dir=there) as stream:
            stream.write(bytes(1))
    except OSError as error:
        raise InputError(f"output {place} cannot be written ({error.strerror}); use another place") from error


def names_folder(place: str | Path) -> bool:
    """Whether an output's name is a folder's: it does not end with the suffix of a kind of file, or there is one already.

    >>> names_folder("samples_g1.5"), names_folder("samples.gif")
    (True, False)
    """
    suffix = Path(place).suffix.lower()[1:]
    return suffix not in KINDS or (suffix not in OWN and Path(place).is_dir())


def typed_path(text: str) -> str:
    """A path as people type it, as it is on disk: ~ is the home folder, and é is either of the two that Unicode has."""
    if text.startswith("~") and "/" in text:
        text = os.path.expanduser(text)
    if text.isascii() or os.path.lexists(text):
        return text
    found = Path(Path(text).anchor)
    for part in Path(text).relative_to(found).parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        found /= next((form for form in forms if os.path.lexists(found / form)), part)
    here = "./" if text.startswith("./") else ""  # without it -é would be an option
    return here + str(found) + ("/" if text.endswith("/") else "")


def cache_folder() -> Path:
    """Where caches live: $FLOWBACK_CACHE, or flowback/ in $XDG_CACHE_HOME or ~/.cache; without a home, a temporary one.

    Raises:
        InputError: if the last one belongs to somebody else.
    """
    if own := os.environ.get("FLOWBACK_CACHE"):
        return Path(typed_path(own))
    base, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    if os.path.isabs(base) or os.path.isabs(home):
        return (Path(base) if os.path.isabs(base) else Path(home, ".cache")) / "flowback"
    folder = Path(tempfile.gettempdir()) / f"flowback-{os.getuid()}"  # a user without a home folder; Windows has one always
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise InputError(f"{folder} belongs to another user; set FLOWBACK_CACHE to a folder for caches")
    return folder
