"""Chooses how a call is cut: the granularity and the number of parts. Pure, and equal on all ranks.

The constants for CUDA describe an H100-class GPU, whichever GPU runs the call. ``--sp-backend auto`` measures instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sf_xfuser.layout.plan import Layout
from sf_xfuser.layout.schedule import Chunking, Granularity

_NUM_SMS, _TILE_ROWS, _FLOP_RATE = 132, 128, 600e12  # H100: multiprocessors, query rows of a tile, attention in bf16
_MIN_ATTEND_S = 150e-6  # a shorter attention call hides less than its launch, its merge and its rounds cost

# Each part costs an attention call and a merge, so it needs this many tokens.
_TOKENS_PER_PART = {"cpu": 128, "cuda": 2048}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSize:
    """One attention call: tokens of the rank that holds most, query heads of all ranks, head size, batch."""

    q_tokens: int
    kv_tokens: int
    heads: int
    head_size: int
    batch: int

    def waves(self, layout: Layout, machines: int) -> float:
        """Tiles of the queries that a rank has from ``machines`` machines, relative to the multiprocessors of a GPU."""
        heads = -(-self.heads // layout.ulysses_degree)
        return self.batch * heads * math.ceil(machines * layout.ulysses * self.q_tokens / _TILE_ROWS) / _NUM_SMS


def choose_granularity(layout: Layout, size: CallSize, device: str, *, one_host: bool = False) -> Granularity:
    """The granularity of a call. ``device``: ``"cpu"`` or ``"cuda"``. ``one_host``: all ranks share memory.

    CUDA: ``"slab"`` if the attention of all queries of a rank to one slab takes at least 150 us and fills the GPU once,
    else ``"unstaged"``. In the simulator, with the presets p4de, p5en and dgx-h100 and nine sizes of images and videos
    on 1 to 8 machines, this takes 1.02x the time of the better of the two (geometric mean; 1.45x at worst). CPU:
    ``"unstaged"`` on one host, where transfers are too fast to hide, else ``"block"``."""
    if device == "cpu":
        return "unstaged" if one_host else "block"
    waves, keys = size.waves(layout, layout.torus), layout.ranks_per_machine * size.kv_tokens
    seconds = 4 * waves * _NUM_SMS * _TILE_ROWS * keys * size.head_size / _FLOP_RATE
    return "slab" if seconds >= _MIN_ATTEND_S and waves >= 1 else "unstaged"


def granularities_to_try(device: str, *, one_host: bool) -> list[Granularity | None]:
    """What ``--sp-backend auto`` tries in its first layout, in order of preference. None: ``choose_granularity``.

    CUDA omits ``"block"``, which is over 2 % faster than both others in 8 % of the cases of ``choose_granularity``."""
    if device == "cuda":
        return ["slab", "unstaged"]
    return [None] if one_host else [None, "unstaged"]


def choose_chunking(layout: Layout, size: CallSize, device: str, granularity: Granularity) -> Chunking:
    """The number of parts for a call (measured rows: docs/performance.md). ``device``: ``"cpu"`` or ``"cuda"``. The
    result does not depend on the transport, so all transports give the same bits.

    ``"block"``: two machines: up to 4 parts of KV, because there is only one remote slab. More machines: up to 2 parts
    on a GPU, 1 on a CPU, where the extra attention calls and merges cost more than they hide. ``"slab"``: queries of as
    many machines at once as take the fewest waves."""
    if granularity == "unstaged":
        return Chunking(granularity=granularity)
    if granularity == "slab":
        others = layout.torus - 1

        def waves(at_once: int) -> int:
            groups = [at_once] * (others // at_once) + [others % at_once]
            return sum(math.ceil(size.waves(layout, machines)) for machines in groups)

        return Chunking(granularity=granularity, machines_at_once=min(range(1, others + 1), key=waves, default=1))
    max_parts = max(1, layout.ulysses * size.kv_tokens // _TOKENS_PER_PART.get(device, 2048))
    if layout.num_machines == 2:
        return Chunking(last_kv_parts=min(4, max_parts))
    parts = 1 if device == "cpu" else min(2, max_parts)
    return Chunking(kv_parts=parts, last_kv_parts=parts)
