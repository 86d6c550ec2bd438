"""The variants of an attention benchmark: for one case, every way to compute the same call across the same ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd

import torch

from sf_xfuser.autotune.selector import Choice, flat_ulysses, layouts
from sf_xfuser.bench import usp_variants
from sf_xfuser.bench.case import Case
from sf_xfuser.bench.usp_variants import call_usp
from sf_xfuser.config import COMPRESSIONS, TRANSPORTS, TorusArgs
from sf_xfuser.kernels import AttendFunction, sdpa_attend
from sf_xfuser.layout.plan import UNEVEN, Layout, head_ranges
from sf_xfuser.layout.usp_layouts import XditConfig, egress, legal_configs, variant_name
from sf_xfuser.simulator import TorusVariant
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.torus.call import Tokens
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.torus.trace import Trace
from sf_xfuser.transport.base import OneSided, Parcel, Ticket, Transport, TransportError

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SINGLE = "single"
ALONE = "attention-alone"
AUTO = "auto"
UNSTAGED = "torus-unstaged"
OLD_NAMES = {"torus-together": UNSTAGED}  # still accepted in 0.1
NAMED_TRANSPORTS = tuple(name for name in TRANSPORTS if name != "auto")
RELATIVE_ERROR = {"int8": 0.04, "fp8": 0.1}
COMPRESSED = tuple(name for name in COMPRESSIONS if name != "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """``call`` takes this rank's q, k, v [B,H,S,D], returns [B,H,S,D]; None where the variant cannot run, for ``reason``.

    ``family``: ``"reference"``, ``"xdit"`` or ``"ours"``. ``formula_bytes``: what leaves the machine that sends most.
    ``mesh`` is set where the variant can be traced, ``replayed`` where it can be predicted (``simulate.predict`` takes it).
    ``relative_error``: of the result as root mean squares, that is right for a variant that compresses; None: as much as
    rounding makes. ``choice``: of the variant that runs what its first calls select.
    """

    name: str
    description: str
    family: str
    layout: str = ""
    call: Call | None = None
    reason: str = ""
    formula_bytes: float | None = None
    mesh: Mesh | None = None
    relative_error: float | None = None
    replayed: TorusVariant | XditConfig | None = None
    choice: Choice | None = None

    @property
    def said(self) -> tuple[str, str]:
        """(description, layout), as it turned out."""
        if self.choice is None or not self.choice.contests:
            return self.description, self.layout
        contest = next(iter(self.choice.contests.values()))
        return f"{self.description}: {contest}", contest.chosen or ""


def known_names() -> str:
    return (
        f"{SINGLE}, {ALONE}, usp-allgather, usp-alltoall, usp-ulysses, ulysses, ring-allgather, ring-alltoall, "
        f"xdit-uUrR-ROTATION, mapping, mapping-allgather, mapping-alltoall, torus-no-overlap, torus, {UNSTAGED}, "
        f"{AUTO}, {', '.join(over(name) for name in (*NAMED_TRANSPORTS, *COMPRESSED))}"
    )


def current_names(names: str) -> str:
    """``--variants`` with old names replaced."""
    return ",".join(OLD_NAMES.get(name, name) for name in names.split(","))


def over(transport: str) -> str:
    """The variant that is torus over a named transport, or with chunks compressed."""
    return f"torus-{transport.replace('_', '-')}"


def open_variants(case: Case, topology: str, timeout_s: float, wanted: Sequence[str] | None) -> list[Variant]:
    """The variants of ``case`` whose names are ``wanted`` (None: all but ``auto``, torus without stages and those over
    named transports). Collective over the world, alike on every rank."""
    variants = [Variant(name=SINGLE, description="one process, the others wait", family="reference")]
    args = TorusArgs(backend="torus", plan=case.plan, topology=topology, timeout=timeout_s)
    kv_heads = case.kv_heads or case.heads
    mesh: Mesh | None = None
    refused = ""
    try:
        mesh = _mesh(case, args)
    except ValueError as error:
        refused = str(error)
    if usp_variants.available() is None:
        usp_variants.open_variants(
            [], ranks_per_machine=case.ranks_per_machine
        )  # also where the shape suits none of its variants
    variants += _xdit_variants(case, mesh, wanted)
    if mesh is None:
        variants += [Variant(name=name, description=text, family="ours", reason=refused) for name, text in _OURS]
        return [variant for variant in variants if wanted is None or variant.name in wanted]
    attend = sdpa_attend if usp_variants.available() else usp_variants.registered_attention()
    ours_wanted = wanted is None or any(name in wanted for name, _ in _OURS)
    if (
        ours_wanted and not mesh.transport_reason
    ):  # the first call does it; the variant without overlap is to use the same
        mine = case.tokens[mesh.position]
        heads = (case.heads, kv_heads, kv_heads)
        dtype = getattr(torch, case.dtype)
        _torus(case, mesh, True, attend)(*(torch.zeros(case.batch, h, mine, case.head_dim, dtype=dtype) for h in heads))
    blocking = replace(mesh, links={link: _Blocking(t) for link, t in mesh.links.items()}, calls={}, transports={})
    formula = _torus_egress(case, mesh.layout) * _elements(case) * _itemsize(case)
    alone = Variant(
        name=ALONE,
        description="the same attention on every rank, nothing to exchange",
        family="reference",
        layout=str(mesh.layout),
        call=_alone(case, mesh, attend),
    )
    ours = [
        _our_variant(name, description, case, used, attend, formula)
        for (name, description), used in zip(_OURS, (blocking, mesh), strict=True)
    ]
    every = [variants[0], alone, *variants[1:], *ours]
    asked = wanted or ()
    if UNSTAGED in asked:
        text = "torus unstaged: all chunks, then one attention"
        every.append(_variant(UNSTAGED, text, case, args, attend, formula))
    if AUTO in asked:
        every.append(_auto(case, args, attend))
    for name in NAMED_TRANSPORTS:
        if over(name) in asked:
            text = f"Torus Attention over {name}"
            every.append(_variant(over(name), text, case, replace(args, transport=name), attend, formula))
    for name in COMPRESSED:
        if over(name) in asked:
            text = f"Torus Attention, Q, V and O in {name} between machines"
            packed = (case.head_dim + 4) / (case.head_dim * _itemsize(case))  # a byte each, a scale of a token's head
            fewer = _torus_egress(case, mesh.layout, packed) * _elements(case) * _itemsize(case)
            variant = _variant(over(name), text, case, replace(args, compress=name), attend, fewer)
            every.append(replace(variant, relative_error=RELATIVE_ERROR[name]))
    kept = every if wanted is None else [variant for variant in every if variant.name in (ALONE, *wanted)]
    if not ours_wanted:
        mesh.close()  # attention alone asks only for its layout
    return kept


def _mesh(case: Case, args: TorusArgs) -> Mesh:
    heads, kv_heads = case.heads, case.kv_heads or case.heads
    group = list(range(case.world_size))
    return build_mesh([group], args, heads=heads, kv_heads=kv_heads, max_imbalance=UNEVEN)


def _our_variant(
    name: str, description: str, case: Case, mesh: Mesh, attend: AttendFunction, formula: float
) -> Variant:
    unstaged = name == UNSTAGED
    return Variant(
        name=name,
        description=description,
        family="ours",
        layout=str(mesh.layout),
        call=_torus(case, mesh, not unstaged, attend),
        formula_bytes=formula,
        mesh=mesh,
        replayed=TorusVariant(
            layout=mesh.layout,
            pattern="message" if mesh.transport == "two_sided" else "put",
            overlap=not any(isinstance(link, _Blocking) for link in mesh.links.values()),
            unstaged=unstaged,
        ),
    )


def _variant(
    name: str, description: str, case: Case, args: TorusArgs, attend: AttendFunction, formula: float
) -> Variant:
    """Torus in the same layout on a mesh of its own, whose windows are as large as this variant needs."""
    try:
        mesh = _mesh(case, args)
    except (ValueError, TransportError) as error:
        return Variant(name=name, description=description, family="ours", reason=str(error))
    return _our_variant(name, description, case, mesh, attend, formula)


def _auto(case: Case, args: TorusArgs, attend: AttendFunction) -> Variant:
    """What ``--sp-backend auto`` selects of xDiT's own code and torus, on meshes of its own."""
    text = "the fastest of torus and xDiT's own"
    if (reason := _no_xdit(case)) is not None:
        return Variant(name=AUTO, description=text, family="ours", reason=reason)
    kv_heads, m = case.kv_heads or case.heads, case.ranks_per_machine
    degree = gcd(m, gcd(case.heads, kv_heads))
    own = XditConfig(ulysses_degree=degree, ring_degree=case.world_size // degree)
    mesh = _mesh(case, args)
    xdits = usp_variants.open_variants([own], ranks_per_machine=m, members=mesh.members)[own]
    found = layouts(case.num_machines, m, case.heads, kv_heads, degree, args)
    further = found[1:] if found[0] == mesh.layout else []  # uneven heads have no other
    meshes = [mesh, *(_mesh(case, replace(args, plan=layout.flag)) for layout in further)]
    choice = Choice(
        own,
        flat_ulysses(own, case.heads, kv_heads),
        xdits.groups.selected,
        meshes,
        kv_ratio=Fraction(kv_heads, case.heads),
        log=lambda message: None,
    )

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        tensors = query, key, value

        def torus(mesh: Mesh, overlap: bool) -> torch.Tensor:
            return _torus(case, mesh, overlap, attend)(*tensors)

        with xdits.selected():
            return choice.serve(query, key, None, "registered attention", torus, lambda: call_usp(*tensors))[1]

    return Variant(name=AUTO, description=text, family="ours", call=call, choice=choice)


# -- ours -------------------------------------------------------------------------------------------------------------


_OURS = (("torus-no-overlap", "torus, each transfer waited for at once"), ("torus", "Torus Attention"))


def _torus(case: Case, mesh: Mesh, overlap: bool, attend: AttendFunction) -> Call:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        tokens = Tokens(case.tokens, case.tokens)
        return torus_attention(query, key, value, mesh=mesh, attention=attend, tokens=tokens, overlap=overlap)

    return call


def _alone(case: Case, mesh: Mesh, attend: AttendFunction) -> Call:
    """What this rank computes in the torus variant, as one call on tensors that are simply there."""
    layout = mesh.layout
    queries, _ = head_ranges(case.heads, case.heads, layout.ulysses_degree)
    low, high = queries[layout.head_group(mesh.position)]
    heads = high - low
    mine = layout.ulysses_group(mesh.position)
    given: list[torch.Tensor] = []

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor
        if not given:
            make = torch.Generator().manual_seed(mesh.position)
            shape = (case.batch, heads, case.seq_len, case.head_dim)
            q, k, v = (torch.randn(shape, generator=make, dtype=torch.float32).to(query) for _ in range(3))
            given.extend((q[:, :, : sum(case.tokens[p] for p in mine)].contiguous(), k, v))
        out, _ = attend(*given)
        return out

    return call


class _Blocking(Transport):
    """Waits for each exchange before the next step: the schedule without its overlap."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def one_sided(self) -> OneSided | None:
        return self._transport.one_sided

    def exchange(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Ticket:
        ticket = self._transport.exchange(round, sends, receives)
        ticket.wait()
        return ticket

    def drain(self) -> None:
        self._transport.drain()

    def close(self) -> None:
        self._transport.close()


def traced(variant: Variant, trace: Trace | None) -> None:
    """Let the variant's calls report to ``trace``."""
    if variant.mesh is not None:
        variant.mesh.trace = trace


# -- xDiT's -----------------------------------------------------------------------------------------------------------


def _xdit_variants(case: Case, mesh: Mesh | None, wanted: Sequence[str] | None) -> list[Variant]:
    kv_heads = case.kv_heads or case.heads
    n, m = case.num_machines, case.ranks_per_machine
    own = gcd(m, gcd(case.heads, kv_heads))  # xDiT's own layout: Ulysses inside a machine as far as heads allow
    named: dict[str, XditConfig] = {}
    for config in legal_configs(case.world_size, m, case.heads, kv_heads):
        named[variant_name(config, own)] = config
    reasons: dict[str, str] = {}
    if "ulysses" not in named and "usp-ulysses" not in named:
        reasons["ulysses"] = f"{gcd(case.heads, kv_heads)} heads do not split {case.world_size} ways"
    degree = own if mesh is None else mesh.layout.ulysses_degree
    mapped = [
        config
        for config in legal_configs(case.world_size, m, case.heads, kv_heads, placement="machines-first")
        if config.ulysses_degree == degree
    ]
    named.update({variant_name(config, own): config for config in mapped})
    if not mapped:
        reasons["mapping"] = (
            f"with ulysses={degree} it is xDiT's own placement"
            if case.heads % degree == 0
            else f"xDiT cannot split {case.heads} heads {degree} ways"
        )
    order = ("usp", "ulysses", "ring", "xdit", "mapping")
    names = sorted({*named, *reasons}, key=lambda name: (order.index(name.split("-")[0]), name))
    names = [name for name in names if wanted is None or name in wanted]
    if (missing := _no_xdit(case)) is not None:
        return [Variant(name=name, description="xDiT", family=_family(name), reason=missing) for name in names]
    members = None if mesh is None else mesh.members
    calls = usp_variants.open_variants([named[x] for x in names if x in named], ranks_per_machine=m, members=members)
    return [
        Variant(
            name=name,
            description=_DESCRIPTIONS[name.split("-")[0]],
            family=_family(name),
            layout=str(named[name]),
            call=calls[named[name]],
            formula_bytes=egress(named[name], n, m, kv_heads / case.heads) * _elements(case) * _itemsize(case),
            replayed=named[name],
        )
        if name in named
        else Variant(name=name, description=_DESCRIPTIONS[name], family=_family(name), reason=reasons[name])
        for name in names
    ]


def _no_xdit(case: Case) -> str | None:
    """Why none of xDiT's variants can run the case."""
    missing = usp_variants.available()
    if missing is None and case.seq_len % case.world_size:
        missing = f"xDiT splits tokens evenly, and {case.world_size} ranks do not divide {case.seq_len}"
    return missing


_DESCRIPTIONS = {
    "usp": "xDiT's USP in its own layout",
    "ulysses": "xDiT, Ulysses over all ranks",
    "ring": "xDiT, Ring over all ranks",
    "xdit": "xDiT, other degrees",
    "mapping": "xDiT's code, Ulysses across machines",
}


def _family(name: str) -> str:
    """The mapping alone is xDiT's code in a placement that no flag of xDiT's gives: it is no xDiT configuration."""
    return "ours" if name.startswith("mapping") else "xdit"


# -- bytes between machines -------------------------------------------------------------------------------------------


def _elements(case: Case) -> int:
    return case.batch * case.seq_len * case.heads * case.head_dim


def _itemsize(case: Case) -> int:
    return int(torch.empty(0, dtype=getattr(torch, case.dtype)).element_size())


def _torus_egress(case: Case, layout: Layout, packed: float = 1.0) -> float:
    """Elements that leave the machine that sends most, in units of ``B*L*H*D``; ``Layout.egress`` for uneven heads.

    A rank sends every head group of other machines its tokens' Q, K and V, and returns the O of other machines' tokens
    for its own heads; in a ring across machines it passes each KV block on, R_x - 1 times. ``packed``: what an element
    of Q, V and O takes in parts of one of K.
    """
    ways = layout.ulysses_degree
    ranges = head_ranges(case.heads, case.kv_heads or case.heads, ways)
    q, kv = ([high - low for low, high in of_groups] for of_groups in ranges)
    out = [0.0] * layout.num_machines
    for position in range(layout.world_size):
        t, own = layout.coordinates(position)[0], layout.head_group(position)
        away = [p for p in range(ways) if p // layout.ulysses != t]
        heads = sum(packed * q[p] + (1 + packed) * kv[p] for p in away) + packed * len(away) * q[own]
        heads += (layout.ring_across - 1) * ways * (1 + packed) * kv[own]
        out[layout.machine(position)] += heads / (case.heads * layout.world_size)
    return max(out)
