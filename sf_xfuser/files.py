"""Reads small files that a user names. Whatever lies there, reading ends: a pipe is not waited for, and a
file of any size or nesting is an error like one that is missing."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST_CHARACTERS = 64 << 20
"""A Chrome trace of a long benchmark is the largest that is read."""


def read_text(path: str | Path) -> str:
    """The text of a regular file. Raises OSError, for pipes and devices as well, and ValueError."""

    def open_at_once(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # a pipe without a writer

    with open(path, encoding="utf-8", opener=open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        text = file.read(LARGEST_CHARACTERS + 1)
    if len(text) > LARGEST_CHARACTERS:
        raise ValueError(f"more than {LARGEST_CHARACTERS} characters")
    return text


def read_json(path: str | Path) -> Any:
    """What a regular file holds as JSON. Raises OSError, for pipes and devices as well, and ValueError."""
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def transformer_configs(model: str) -> Iterator[Path]:
    """The files that may configure the transformer of ``model``, a folder or a hub id in the local cache; the likeliest
    first. No network."""
    folder = Path(model)
    is_folder = os.path.isdir(folder)  # False where a name is too long or a folder closed, which Path.is_dir raises
    for name in ("transformer/config.json", "config.json"):
        found: Any = folder / name
        if not is_folder:
            try:
                from huggingface_hub import try_to_load_from_cache

                found = try_to_load_from_cache(model, name)
            except (ImportError, ValueError):  # not installed, or the text is no hub id
                return
        if isinstance(found, str | Path) and os.path.isfile(found):
            yield Path(found)
