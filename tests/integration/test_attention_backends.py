"""xDiT's attention backends under ``--sp-backend torus``, as rows of docs/support.md. ``test_serving.py`` runs those
without log-sum-exp, ``test_refusals.py`` the refusals, ``unit/test_local_attention.py`` the others."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import NamedTuple

from xfuser.core.distributed.attention_backend import AttentionBackendType

from sf_xfuser.integrations.xdit.attention_backends import LSE_BACKENDS


class BackendRow(NamedTuple):
    """Attention backends, as patterns of their names, what torus gives, and what that costs."""

    attention_backends: str
    result: str
    cost: str


EXPOSED = "xDiT's flat Ulysses: the bytes of torus, but no transfer is hidden"


def names(*patterns: str) -> str:
    return ", ".join(f"`{pattern}`" for pattern in patterns)


ROWS = [
    BackendRow(names(*sorted(LSE_BACKENDS)), "exact", "none"),
    BackendRow(names("SDPA", "SDPA_MATH"), "falls back, exact", EXPOSED),
    BackendRow(
        names(
            "FLASH_4*", "NVTE_FP8", "AITER_*FP8", "AITER_BF16", "AITER_F??*", "AITER_MXFP?", "AITER_MLA", "AITER_SAGE*"
        ),
        "falls back, as xDiT",
        EXPOSED,
    ),
    BackendRow(
        names("*_SPARGE", "AITER_SPARGE_V2", "AITER_SPARSE_SAGE*", "*_VSA*", "FLEX_BLOCK_ATTN"),
        "falls back, as xDiT",
        f"{EXPOSED}. Sparse masks need the tokens in order",
    ),
    BackendRow(
        "the last three rows, with a ring",
        "refused",
        "xDiT's own ring needs the log-sum-exp, too (`AITER_SAGE*` has it there): use a `--sp-plan` with `ring=1`",
    ),
]


def test_every_backend_is_in_one_row():
    for backend in AttentionBackendType:
        rows = [row for row in ROWS if any(fnmatch(backend.name, p) for p in re.findall(r"`([^`]+)`", row[0]))]
        sparse = [row for row in rows if "order" in row.cost]
        assert len(sparse or rows) == 1, (backend, rows)
        assert (backend.name in LSE_BACKENDS) == (rows[0].cost == "none")
