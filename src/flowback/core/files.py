"""Files on disk: known by their content, read as what they should be."""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

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
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(file: Path) -> Any:
    """What a JSON file says.

    Raises:
        OSError: if it cannot be read.
        ValueError: as `parse_json`.
    """
    return parse_json(file.read_bytes())


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
        write: called with the path to write to, which ends with the file's name.

    Raises:
        OSError: if it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".partial-{uuid4().hex}-{file.name}")
    try:
        write(partial)
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where caches live: $FLOWBACK_CACHE, or flowback/ in $XDG_CACHE_HOME or ~/.cache."""
    if "FLOWBACK_CACHE" in os.environ:
        return Path(os.environ["FLOWBACK_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flowback"
