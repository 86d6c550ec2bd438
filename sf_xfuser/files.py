"""Reads small files that a user names. Pipes, huge files and deeply nested JSON raise an error like a missing file."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_CHARACTERS = 64 << 20  # the largest file is a Chrome trace of a long benchmark


def read_text(path: str | Path) -> str:
    """The text of a regular file. Raises OSError (also for pipes and devices) or ValueError."""

    def open_at_once(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # do not wait for the writer of a pipe

    with open(path, encoding="utf-8", opener=open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        text = file.read(MAX_CHARACTERS + 1)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"more than {MAX_CHARACTERS} characters")
    return text


def read_json(path: str | Path) -> Any:
    """The JSON in a regular file. Raises OSError (also for pipes and devices) or ValueError."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def transformer_configs(model: str) -> Iterator[Path]:
    """Files that may configure the transformer of ``model``, a folder or a hub id in the local cache. No network."""
    folder = Path(model)
    is_folder = os.path.isdir(folder)  # Path.is_dir raises for a long name or an unreadable folder
    for name in ("transformer/config.json", "config.json"):
        found: Any = folder / name
        if not is_folder:
            try:
                from huggingface_hub import try_to_load_from_cache

                found = try_to_load_from_cache(model, name)
            except (ImportError, ValueError):  # not installed, or not a hub id
                return
        if isinstance(found, str | Path) and os.path.isfile(found):
            yield Path(found)
