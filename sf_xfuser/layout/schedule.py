"""Torus Attention as data: (layout, position) -> the steps one rank takes in one attention call. Pure.

Positions, degrees and groups are those of ``plan.Layout``. ``X[src]`` is the *chunk* of X that holds ``src``'s tokens
and this rank's head group; a chunk travels in *parts*. KV arrives in *slabs*, one per machine of origin, part by part,
each part made of R_i *blocks* of U pieces:

    slab (i, j_x)   part p, block j_i     part p of sources (t-i, u', r_x-j_x, r_i-j_i) for all u', own u first

    stage           computes                                        meanwhile on the wire
    0               Q[own machine] x slab 0, block by block         Q chunks of machine t-1, t-2, ...
    Pull Q   i      Q[machine t-i] x slab 0                         remaining Q, then KV parts
    Pull KV  k      remote Q x slab k, part by part                 the remaining KV parts
    Push O          remote Q x the last part, machine by machine    each O part as soon as it is final
    own             Q[own machine] x the slabs that are left        O parts

Rounds between machines are posted ``LOOKAHEAD`` arrivals ahead, in the order in which they are needed; the transport
keeps that order on the wire. What matters is the tail: no O can leave before the last KV part is here, and the wire
idles from then until the first O is final. So slabs come in parts, remote queries go first, and the attention that only
this machine wants is left for last, where it covers the O transfers.

Without overlap (``Cut.overlap``) everything is attended in one call between the inputs and the outputs, keys in the
order of the sequence, as one process would. This is for chunks of one host, which arrive at once.

Machine order is a rotation (in: t-1, t-2, ...; out: t+1, t+2, ...), so a machine sends to one machine and receives
from one at a time. Exchanges are *rounds*: the k-th round of a link on one rank matches the k-th round of that link on
every peer, which is what NCCL's grouped sends and receives need.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, NamedTuple, TypeVar

from sf_xfuser.layout.plan import Layout

JOINT = -1
"""Pseudo source of the joint (text) keys and values, which every rank already holds."""

LOOKAHEAD = 2
"""How many arrivals between machines are posted beyond the one that is about to be consumed: enough that the wire never
waits for compute, few enough that receive buffers and packed chunks stay few."""

DEFERRED_SLABS = 2
"""How many of the last slabs the own machine's queries leave for the end: more covers more of the O transfers, and
holds more KV."""

_T = TypeVar("_T")
Link = Literal["inside", "across"]
Tensor = Literal["q", "kv", "o"]
_INPUTS: tuple[Tensor, ...] = ("q", "kv")


class Piece(NamedTuple):
    """Part ``part`` of the ``parts`` in which ``source``'s tokens are cut; ``span`` gives its rows."""

    source: int
    part: int = 0
    parts: int = 1

    def span(self, tokens: int) -> tuple[int, int]:
        """Half-open range of this piece among the ``tokens`` of its source."""
        return tokens * self.part // self.parts, tokens * (self.part + 1) // self.parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Into how many parts KV from other machines is cut, and that of the last slab. ``overlap=False``: everything is
    attended in one call after all inputs, and nothing is cut."""

    kv: int = 1
    last_kv: int = 1
    overlap: bool = True

    def __post_init__(self) -> None:
        if not self.overlap and (self.kv, self.last_kv) != (1, 1):
            raise ValueError(f"{self}: KV is not cut without overlap")


@dataclass(frozen=True, slots=True)
class Message:
    """Pieces of one tensor that go to, or come from, one peer; they are adjacent in the buffers of both ends. For
    ``"o"`` the source is the rank the output returns to."""

    tensor: Tensor
    pieces: tuple[Piece, ...]
    peer: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """Start sends and receives; returns at once. A send of received pieces first waits for them."""

    link: Link
    round: int
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Attend:
    """Attend ``queries`` to ``keys`` (waits for both) and merge. ``keys_last`` if no later step reads these keys' slab,
    ``queries_last`` if none reads these queries: their output is final."""

    queries: tuple[Piece, ...]
    keys: tuple[Piece, ...]
    slab: int
    keys_last: bool = False
    queries_last: bool = False


Step = Exchange | Attend


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One rank's call. ``queries`` and each slab of ``slabs`` list pieces in the order of their buffers. ``remote``:
    those of the queries, the last, that other machines sent and no step attends with the own machine's."""

    layout: Layout
    position: int
    queries: tuple[Piece, ...]
    remote: tuple[Piece, ...]
    slabs: tuple[tuple[Piece, ...], ...]
    steps: tuple[Step, ...]


def build_schedule(
    layout: Layout, position: int, joint: Literal["front", "rear"] | None = None, cut: Cut = Cut()
) -> Schedule:
    """The steps of ``position``. ``joint`` places the joint keys at the first or at the last KV, as xDiT's USP does.
    ``cut`` has to be the same on every rank."""
    return _Builder(layout, position, joint, cut).build()


# A part of a slab must be worth an attention call of its own, and a merge.
_TOKENS_PER_PART = {"cpu": 128, "cuda": 2048}


def choose_cut(layout: Layout, kv_tokens: int, device: str, *, overlap: bool) -> Cut:
    """How finely KV from other machines is cut, as far as the parts stay large: in 4 where one slab is all there is;
    else in 2, on a CPU not at all, since each part costs it an attention call that is slower and a merge; and without
    ``overlap`` not at all.
    ``kv_tokens``: of the rank that holds most; ``device``: ``"cpu"``, ``"cuda"``. Alike on every rank, whatever the
    transport, which so changes no bit of the result (docs/performance.md has the rows)."""
    if not overlap:
        return Cut(overlap=False)
    largest = layout.ulysses * kv_tokens // _TOKENS_PER_PART.get(device, 2048)
    if layout.num_machines == 2:
        return Cut(last_kv=max(1, min(4, largest)))
    parts = 1 if device == "cpu" else max(1, min(2, largest))
    return Cut(kv=parts, last_kv=parts)


class _Builder:
    def __init__(self, layout: Layout, position: int, joint: Literal["front", "rear"] | None, cut: Cut) -> None:
        self.layout = layout
        self.own = position
        self.joint = joint
        self.t, self.u, self.r_x, self.r_i = layout.coordinates(position)
        self.steps: list[Step] = []
        self.rounds: dict[Link, int] = {"inside": 0, "across": 0}
        self.overlap = cut.overlap
        # Parts by machine offset: what starts on the own machine is not cut, the last machine's KV most finely.
        kv_parts = ([1] + [cut.kv] * (layout.torus - 2) + [cut.last_kv])[: layout.torus]
        # queries[i] and slabs[k][part][block]: the U pieces of one arrival, own u first; without overlap keys lie in
        # the order of the sequence.
        self.queries = [self._pieces(i, 0, 0, 0, 1) for i in range(layout.torus)]
        self.remote = _flat(self.queries[1:])
        self.slabs = [
            [[self._block(i, j_x, j_i, part, parts) for j_i in range(layout.ring_inside)] for part in range(parts)]
            for i, parts in enumerate(kv_parts)
            for j_x in range(layout.ring_across)
        ]
        self.arrivals: list[tuple[Tensor, int, int]] = []  # (tensor, machine offset or slab, part), in order
        self.arrivals += [("q", i, 0) for i in range(1, layout.torus)]
        self.arrivals += [("kv", k, part) for k in range(1, len(self.slabs)) for part in range(len(self.slabs[k]))]
        # What is passed on is posted while its slab is still held.
        self.lookahead = max(LOOKAHEAD, *kv_parts) if layout.ring_across > 1 else LOOKAHEAD
        self.posted = 0

    def _pieces(self, i: int, j_x: int, j_i: int, part: int, parts: int) -> tuple[Piece, ...]:
        """One part of the U chunks of block (i, j_x, j_i), own u first."""
        return tuple(
            Piece(self.layout.position(self.t - i, self.u + du, self.r_x - j_x, self.r_i - j_i), part, parts)
            for du in range(self.layout.ulysses)
        )

    def _block(self, i: int, j_x: int, j_i: int, part: int, parts: int) -> tuple[Piece, ...]:
        """``_pieces`` as their keys lie in a slab."""
        pieces = self._pieces(i, j_x, j_i, part, parts)
        return pieces if self.overlap else tuple(sorted(pieces))

    def build(self) -> Schedule:
        slabs: tuple[tuple[Piece, ...], ...]
        if self.overlap:
            self._stages()
            slabs = tuple(self._keys(k) for k in range(len(self.slabs)))
        else:
            slabs = (self._unstaged(),)
        return Schedule(
            layout=self.layout,
            position=self.own,
            queries=_flat(self.queries),
            remote=self.remote if self.overlap else (),
            slabs=slabs,
            steps=tuple(self._marked_last()),
        )

    def _unstaged(self) -> tuple[Piece, ...]:
        """Without stages: all chunks, one attention, all outputs. Its keys, in the order of the sequence."""
        if self.layout.ulysses > 1:
            self._post_local_inputs()
        self._post_across(arriving=len(self.arrivals))
        for k in range(len(self.slabs)):
            for block in range(self.layout.ring_inside):
                self._post_ring_inside(k, 0, block)
        keys = tuple(sorted(_flat(self._keys(k) for k in range(len(self.slabs)))))  # JOINT comes first
        keys = (*keys[1:], keys[0]) if self.joint == "rear" else keys
        self.steps.append(Attend(_flat(self.queries), keys, 0))
        for i in range(1, self.layout.torus):
            self._push_across(i)
        if self.layout.ulysses > 1:
            self._push_inside()
        return keys

    def _stages(self) -> None:
        self._own_slab()
        for i in range(1, self.layout.torus):
            self._post_across(arriving=i - 1)
            self._attend(self.queries[i], 0)
        if self.layout.torus == 1:
            self._pull_kv_for_own_machine()
        else:
            self._pull_kv()

    # -- stages -------------------------------------------------------------------------------------------------------

    def _own_slab(self) -> None:
        """Stage 0: the own chunk at once, then the other chunks of the machine as they arrive."""
        machine = self.queries[0]
        own, others = machine[:1], machine[1:]
        only = len(self.slabs) == 1
        self._post_across(arriving=-1)
        final = only and self.layout.ring_inside == 1
        if others:
            self._post_local_inputs()
            self._attend(own, 0, 0, 0, slice(0, 1))
            self._post_across(arriving=-1)
            self._post_ring_inside(0, 0, 0)
            self._attend(others, 0, 0, 0)
            if final:
                self._push_inside()
            self._attend(own, 0, 0, 0, slice(1, None))
        else:
            self._post_ring_inside(0, 0, 0)
            self._attend(own, 0, 0, 0)
        for block in range(1, self.layout.ring_inside):
            self._post_ring_inside(0, 0, block)
            self._attend_own_machine(0, block, final=only and block == self.layout.ring_inside - 1)

    def _pull_kv_for_own_machine(self) -> None:
        """A ring across machines and no heads split between them: there is no other machine's Q, and no O to send."""
        for k in range(1, len(self.slabs)):
            self._post_across(arriving=k - 1)
            for block in range(self.layout.ring_inside):
                self._post_ring_inside(k, 0, block)
                final = (k, block) == (len(self.slabs) - 1, self.layout.ring_inside - 1)
                self._attend_own_machine(k, block, final)

    def _attend_own_machine(self, k: int, block: int, final: bool) -> None:
        if final:
            self._finish_own_machine(k, 0, block)
        else:
            self._attend(self.queries[0], k, 0, block)

    def _finish_own_machine(self, k: int, part: int | None = None, block: int | None = None) -> None:
        """The last keys for the queries of the own machine: the others' outputs leave as soon as they are final."""
        machine = self.queries[0]
        own, others = machine[:1], machine[1:]
        if others:
            self._attend(others, k, part, block)
            self._push_inside()
        self._attend(own, k, part, block)

    def _pull_kv(self) -> None:
        machine = self.queries[0]
        last_slab = len(self.slabs) - 1
        deferred = range(max(1, last_slab - DEFERRED_SLABS + 1), last_slab + 1)
        arriving = self.layout.torus - 2
        for k in range(1, len(self.slabs)):
            for part, blocks in enumerate(self.slabs[k]):
                arriving += 1
                self._post_across(arriving)
                for block in range(len(blocks)):
                    self._post_ring_inside(k, part, block)
                    if (k, part, block) == (last_slab, len(self.slabs[k]) - 1, len(blocks) - 1):
                        self._push_remote_outputs(k, part, block)
                    else:
                        self._attend(self.remote, k, part, block)
            if k not in deferred:
                self._attend(machine, k)
        for k in deferred[:-1]:
            self._attend(machine, k)
        self._finish_own_machine(deferred[-1])

    def _push_remote_outputs(self, k: int, part: int, block: int) -> None:
        """The last keys for the queries of other machines: each O chunk leaves as soon as it is final."""
        for i in range(1, self.layout.torus):
            self._attend(self.queries[i], k, part, block)
            self._push_across(i)

    def _attend(
        self,
        queries: Sequence[Piece],
        k: int,
        part: int | None = None,
        block: int | None = None,
        which: slice = slice(None),
    ) -> None:
        self.steps.append(Attend(tuple(queries), self._keys(k, part, block, which), k))

    def _keys(
        self, k: int, part: int | None = None, block: int | None = None, which: slice = slice(None)
    ) -> tuple[Piece, ...]:
        """Pieces of a slab, of one block of one part, or some of those; with the joint keys where they belong."""
        slab = self.slabs[k]
        keys = _flat(_flat(slab)) if part is None or block is None else slab[part][block][which]
        if self.joint == "front" and keys[0] == self.slabs[0][0][0][0]:
            return (Piece(JOINT), *keys)
        if self.joint == "rear" and keys[-1] == self.slabs[-1][-1][-1][-1]:
            return (*keys, Piece(JOINT))
        return keys

    def _marked_last(self) -> Iterator[Step]:
        attends = [(at, step) for at, step in enumerate(self.steps) if isinstance(step, Attend)]
        slab_at = {step.slab: at for at, step in attends}
        query_at = {piece: at for at, step in attends for piece in step.queries}
        for at, step in enumerate(self.steps):
            if isinstance(step, Attend):
                last, final = slab_at[step.slab] == at, all(query_at[piece] == at for piece in step.queries)
                if last or final:
                    step = replace(step, keys_last=last, queries_last=final)
            yield step

    # -- rounds -------------------------------------------------------------------------------------------------------

    def _exchange(self, link: Link, sends: Iterable[Message], receives: Iterable[Message]) -> None:
        self.steps.append(Exchange(link, self.rounds[link], tuple(sends), tuple(receives)))
        self.rounds[link] += 1

    def _post_local_inputs(self) -> None:
        """Q, K and V chunks between the U ranks of one machine that share a ring coordinate."""
        peers = [piece.source for piece in self.queries[0][1:]]
        self._exchange(
            "inside",
            (Message(x, (Piece(self.own),), peer) for peer in peers for x in _INPUTS),
            (Message(x, (Piece(peer),), peer) for peer in peers for x in _INPUTS),
        )

    def _post_across(self, arriving: int) -> None:
        """Post rounds between machines up to ``lookahead`` beyond the arrival that is about to be consumed. One that
        forwards part of a slab (ring across machines) waits until that part is among the arrivals."""
        while self.posted < len(self.arrivals) and self.posted <= arriving + self.lookahead:
            kind, index, part = self.arrivals[self.posted]
            i, j_x = (index, 0) if kind == "q" else divmod(index, self.layout.ring_across)
            if j_x == 0:
                self._pull_chunks(kind, i, part)
            elif self._is_present(index - 1, part, arriving):
                self._forward_slab(index, part)
            else:
                return
            self.posted += 1

    def _is_present(self, k: int, part: int, arriving: int) -> bool:
        """Whether a send may wait for this part: the own slab once the machine's inputs are on their way."""
        if k == 0:
            return self.layout.ulysses == 1 or self.rounds["inside"] > 0
        return self.arrivals.index(("kv", k, part)) <= arriving

    def _pull_chunks(self, tensor: Tensor, i: int, part: int) -> None:
        """Ulysses across machines: send to machine t+i, receive from machine t-i."""
        arriving = self.queries[i] if tensor == "q" else self.slabs[i * self.layout.ring_across][part][0]
        own = Piece(self.own, part, arriving[0].parts)
        self._exchange(
            "across",
            (Message(tensor, (own,), peer) for peer in self._ahead(i)),
            (Message(tensor, (piece,), piece.source) for piece in arriving),
        )

    def _ahead(self, i: int) -> list[int]:
        """The U ranks of machine t+i."""
        return [self.layout.position(self.t + i, self.u + du, self.r_x, self.r_i) for du in range(self.layout.ulysses)]

    def _forward_slab(self, k: int, part: int) -> None:
        """Ring across machines: pass part of the first block of slab k-1 on, receive that of slab k."""
        after = self.layout.position(self.t, self.u, self.r_x + 1, self.r_i)
        before = self.layout.position(self.t, self.u, self.r_x - 1, self.r_i)
        self._exchange(
            "across",
            (Message("kv", self.slabs[k - 1][part][0], after),),
            (Message("kv", self.slabs[k][part][0], before),),
        )

    def _post_ring_inside(self, k: int, part: int, block: int) -> None:
        """Ring inside the machine: pass this block on, receive the next one of the part."""
        if block + 1 == self.layout.ring_inside:
            return
        after = self.layout.position(self.t, self.u, self.r_x, self.r_i + 1)
        before = self.layout.position(self.t, self.u, self.r_x, self.r_i - 1)
        self._exchange(
            "inside",
            (Message("kv", self.slabs[k][part][block], after),),
            (Message("kv", self.slabs[k][part][block + 1], before),),
        )

    def _push_across(self, i: int) -> None:
        """Return a final chunk of O to machine t-i; receive one from t+i."""
        self._exchange(
            "across",
            (Message("o", (piece,), piece.source) for piece in self.queries[i]),
            (Message("o", (Piece(self.own),), holder) for holder in self._ahead(i)),
        )

    def _push_inside(self) -> None:
        """Return final outputs to the other ranks of the own machine."""
        others = self.queries[0][1:]
        self._exchange(
            "inside",
            (Message("o", (piece,), piece.source) for piece in others),
            (Message("o", (Piece(self.own),), piece.source) for piece in others),
        )


def _flat(groups: Iterable[Iterable[_T]]) -> tuple[_T, ...]:
    return tuple(chain.from_iterable(groups))
