"""Names that still work in 0.1 and are removed in 0.2: flags, variants, and keys of stored documents."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from sf_xfuser.config import launch_environment

VARIANTS = {"torus-together": "torus-unstaged"}
KEYS = {"arm": "variant", "lane": "link"}


def warn(text: str) -> None:
    """Print one line on stderr, under torchrun once per machine."""
    if launch_environment().local_rank in (None, 0):
        print(f"sf-xfuser: {text}; old names will be removed in 0.2", file=sys.stderr)


class DeprecatedFlag(argparse.Action):
    """An old name of the flag ``--dest``: stores the value there and warns."""

    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        warn(f"{option_string} is now --{self.dest.replace('_', '-')}")
        setattr(namespace, self.dest, values)


def current_variants(names: str) -> tuple[str, ...]:
    """Split a comma-separated list of variants and replace old names."""
    variants = names.split(",")
    for name in VARIANTS.keys() & variants:
        warn(f"the variant {name} is now {VARIANTS[name]}")
    return tuple(VARIANTS.get(name, name) for name in variants)


def upgrade(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """A bench document with the current keys in its rows, timelines and spans. Warns about old keys."""
    rows, timelines = document.get("rows") or [], document.get("timelines") or []
    if not any("arm" in entry for entry in (*rows, *timelines)):
        return document
    warn("the document's keys 'arm' and 'lane' are now 'variant' and 'link'")
    timelines = [
        {**_renamed(t), "ranks": [{**rank, "spans": [*map(_renamed, rank["spans"])]} for rank in t["ranks"]]}
        for t in timelines
    ]
    return {**document, "rows": [*map(_renamed, rows)], "timelines": timelines}


def _renamed(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {KEYS.get(key, key): value for key, value in entry.items()}
