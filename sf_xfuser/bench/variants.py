"""The variants of an attention benchmark: all ways to compute one attention call on the same ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch

from sf_xfuser.autotune.selector import Selector, build_selector
from sf_xfuser.bench import peers, usp_variants
from sf_xfuser.bench.case import Case
from sf_xfuser.bench.peers import Call
from sf_xfuser.bench.usp_variants import call_usp
from sf_xfuser.config import COMPRESSIONS, TRANSPORTS, TorusArgs
from sf_xfuser.integrations.xdit.usp_groups import XditGroups
from sf_xfuser.kernels import AttendFunction, sdpa_attend
from sf_xfuser.layout.plan import UNEVEN, Layout, head_ranges
from sf_xfuser.layout.schedule import Granularity
from sf_xfuser.layout.usp_layouts import XditConfig, egress, legal_configs, variant_name
from sf_xfuser.simulator import TorusVariant
from sf_xfuser.torus.attention import torus_attention
from sf_xfuser.torus.build import build_mesh
from sf_xfuser.torus.call import Tokens
from sf_xfuser.torus.mesh import Mesh
from sf_xfuser.transport.base import OneSided, Parcel, Transfer, Transport, TransportError

SINGLE = "single"
ALONE = "attention-alone"
AUTO = "auto"
UNSTAGED = "torus-unstaged"
RELATIVE_ERROR = {"int8": 0.04, "fp8": 0.1}
COMPRESSED = tuple(name for name in COMPRESSIONS if name != "none")
_OURS = (("torus-no-overlap", "torus, waits for each transfer before it continues"), ("torus", "Torus Attention"))


def torus_name(name: str) -> str:
    """The name of the variant with this transport or compression format."""
    return f"torus-{name.replace('_', '-')}"


NAMED_TRANSPORTS = tuple(name for name in TRANSPORTS if name != "auto")
#: All variants; ``xdit-uUrR-ROTATION`` stands for other degrees.
NAMES = (
    SINGLE, ALONE, "usp-allgather", "usp-alltoall", "usp-ulysses", "ulysses", "ring-allgather", "ring-alltoall",
    "xdit-uUrR-ROTATION", "mapping", "mapping-allgather", "mapping-alltoall", "torus-no-overlap", "torus", UNSTAGED,
    AUTO, *map(torus_name, (*NAMED_TRANSPORTS, *COMPRESSED)), *(peer.name for peer in peers.PEERS),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """``call`` takes and returns this rank's [B,H,S,D]; it is None if the variant cannot run, because of ``reason``.

    ``family``: ``"reference"``, ``"xdit"``, ``"peer"`` or ``"ours"``. ``formula_bytes``: bytes that the busiest machine
    sends to others. ``mesh``: set for variants that can record a trace. ``relative_error``: allowed root mean square
    error of a variant that compresses; None for rounding errors only. ``simulated``: its counterpart in the simulator.
    ``selector``: the autotuner of ``auto``.
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
    simulated: TorusVariant | XditConfig | None = None
    selector: Selector | None = None

    def described(self) -> tuple[str, str]:
        """(description, layout); for ``auto``, with the candidate that its trials selected."""
        if self.selector is None or not self.selector.trials:
            return self.description, self.layout
        trial = next(iter(self.selector.trials.values()))
        return f"{self.description}: {trial}", trial.selected or ""


def open_variants(
    case: Case, topology: str, timeout_s: float, names: Sequence[str] | None, against: Sequence[str] = ()
) -> list[Variant]:
    """The variants of ``case`` with these names, and ``attention-alone``. Collective; the same on every rank.

    ``names``: None for all except ``auto``, ``torus-unstaged``, named transports, compression and peers. ``against``:
    peers in addition to these.
    """
    opened = _open_variants(case, topology, timeout_s, names)
    first_of_ours = next((n for n, variant in enumerate(opened) if variant.family == "ours"), len(opened))
    opened[first_of_ours:first_of_ours] = _peer_variants(case, {*(names or ()), *against})
    return opened


def _open_variants(case: Case, topology: str, timeout_s: float, names: Sequence[str] | None) -> list[Variant]:
    single = Variant(name=SINGLE, description="one process; the other ranks wait", family="reference")
    args = TorusArgs(backend="torus", plan=case.plan, topology=topology, timeout=timeout_s)
    kv_heads = case.kv_heads or case.heads
    mesh: Mesh | None = None
    reason = ""
    try:
        mesh = _mesh(case, args)
    except ValueError as error:
        reason = str(error)
    if usp_variants.unavailable() is None:  # registered_attention needs xDiT even if none of its layouts is legal
        usp_variants.make_groups([], ranks_per_machine=case.ranks_per_machine)
    xdit = _xdit_variants(case, mesh, names)
    if mesh is None:
        ours = [Variant(name=name, description=text, family="ours", reason=reason) for name, text in _OURS]
        return [variant for variant in (single, *xdit, *ours) if names is None or variant.name in names]
    attend = sdpa_attend if usp_variants.unavailable() else usp_variants.registered_attention()
    needs_torus = names is None or any(name in names for name, _ in _OURS)
    if needs_torus and not mesh.transport_reason:
        # A first call selects the transport, which torus-no-overlap uses as well.
        rows = case.tokens[mesh.position]
        heads = (case.heads, kv_heads, kv_heads)
        dtype = getattr(torch, case.dtype)
        _torus(case, mesh, None, attend)(*(torch.zeros(case.batch, h, rows, case.head_dim, dtype=dtype) for h in heads))
    blocking = replace(mesh, links={link: _Blocking(t) for link, t in mesh.links.items()}, calls={}, transports={})
    formula = _torus_egress(case, mesh.layout) * _tensor_bytes(case)
    text = "the same attention on every rank, without communication"
    call = _alone(case, mesh, attend)
    alone = Variant(name=ALONE, description=text, family="reference", layout=str(mesh.layout), call=call)
    variants = [single, alone, *xdit]
    for (name, text), variant_mesh in zip(_OURS, (blocking, mesh), strict=True):
        variants.append(_torus_variant(name, text, case, variant_mesh, attend, formula))
    variants += _optional_variants(case, args, attend, mesh.layout, names or ())
    if not needs_torus:
        mesh.close()  # attention-alone needs only its layout
    return [variant for variant in variants if names is None or variant.name in (ALONE, *names)]


def _peer_variants(case: Case, names: Collection[str]) -> Iterator[Variant]:
    for peer in peers.PEERS:
        if peer.name not in names:
            continue
        call, reason = peers.open_peer(peer, case)
        variant = Variant(name=peer.name, description=peer.description, family="peer", call=call, reason=reason)
        if call is not None:
            config = peers.degrees(peer, case)
            layout = f"ulysses={config.ulysses_degree} ring={config.ring_degree}"
            even = case.seq_len % case.world_size == case.heads % config.ulysses_degree == 0
            formula = egress(config, case.num_machines, case.ranks_per_machine) * _tensor_bytes(case) if even else None
            variant = replace(variant, layout=layout, formula_bytes=formula)
        yield variant


def _optional_variants(
    case: Case, args: TorusArgs, attend: AttendFunction, layout: Layout, names: Sequence[str]
) -> Iterator[Variant]:
    """The variants that are measured only on request."""
    formula = _torus_egress(case, layout) * _tensor_bytes(case)
    if UNSTAGED in names:
        text = "torus unstaged: all chunks, then one attention"
        yield _own_mesh_variant(UNSTAGED, text, case, args, attend, formula)
    if AUTO in names:
        yield _auto(case, args, attend)
    for name in NAMED_TRANSPORTS:
        if torus_name(name) in names:
            text = f"Torus Attention over {name}"
            yield _own_mesh_variant(torus_name(name), text, case, replace(args, transport=name), attend, formula)
    for name in COMPRESSED:
        if torus_name(name) in names:
            text = f"Torus Attention with Q, V and O in {name} between machines"
            packed = (case.head_dim + 4) / (case.head_dim * _itemsize(case))  # a byte per element, a scale per head
            fewer = _torus_egress(case, layout, packed) * _tensor_bytes(case)
            variant = _own_mesh_variant(torus_name(name), text, case, replace(args, compress=name), attend, fewer)
            yield replace(variant, relative_error=RELATIVE_ERROR[name])


def _mesh(case: Case, args: TorusArgs) -> Mesh:
    heads, kv_heads = case.heads, case.kv_heads or case.heads
    group = list(range(case.world_size))
    return build_mesh([group], args, heads=heads, kv_heads=kv_heads, max_imbalance=UNEVEN)


def _torus_variant(
    name: str, description: str, case: Case, mesh: Mesh, attend: AttendFunction, formula: float
) -> Variant:
    granularity: Granularity | None = "unstaged" if name == UNSTAGED else None
    return Variant(
        name=name,
        description=description,
        family="ours",
        layout=str(mesh.layout),
        call=_torus(case, mesh, granularity, attend),
        formula_bytes=formula,
        mesh=mesh,
        simulated=TorusVariant(
            layout=mesh.layout,
            pattern="message" if mesh.transport == "two_sided" else "put",
            overlap=not any(isinstance(link, _Blocking) for link in mesh.links.values()),
            granularity=granularity,
        ),
    )


def _own_mesh_variant(
    name: str, description: str, case: Case, args: TorusArgs, attend: AttendFunction, formula: float
) -> Variant:
    """Torus in the same layout on its own mesh, with windows of the size that this variant needs."""
    try:
        mesh = _mesh(case, args)
    except (ValueError, TransportError) as error:
        return Variant(name=name, description=description, family="ours", reason=str(error))
    return _torus_variant(name, description, case, mesh, attend, formula)


def _auto(case: Case, args: TorusArgs, attend: AttendFunction) -> Variant:
    """``--sp-backend auto`` on its own meshes."""
    text = "selects the fastest of torus and xDiT's own"
    if (reason := _no_xdit(case)) is not None:
        return Variant(name=AUTO, description=text, family="ours", reason=reason)
    kv_heads, m = case.kv_heads or case.heads, case.ranks_per_machine
    degree = gcd(m, gcd(case.heads, kv_heads))
    own = XditConfig(ulysses_degree=degree, ring_degree=case.world_size // degree)
    selector = build_selector([range(case.world_size)], args, own, lambda degrees: groups.use(degrees),
                              heads=case.heads, kv_heads=kv_heads, log=lambda message: None)  # fmt: skip
    groups = usp_variants.make_groups([own], ranks_per_machine=m, members=selector.mesh.members)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        tensors = query, key, value

        def torus(mesh: Mesh, granularity: Granularity | None) -> torch.Tensor:
            return _torus(case, mesh, granularity, attend)(*tensors)

        with groups.use(own):
            return selector.run(query, key, None, "registered attention", torus, lambda: call_usp(*tensors))[1]

    return Variant(name=AUTO, description=text, family="ours", call=call, selector=selector)


def _torus(case: Case, mesh: Mesh, granularity: Granularity | None, attend: AttendFunction) -> Call:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        tokens = Tokens(case.tokens, case.tokens)
        return torus_attention(query, key, value, mesh=mesh, attention=attend, tokens=tokens, granularity=granularity)

    return call


def _alone(case: Case, mesh: Mesh, attend: AttendFunction) -> Call:
    """This rank's attention in the torus variant as one local call, on random tensors."""
    layout = mesh.layout
    queries, _ = head_ranges(case.heads, case.heads, layout.ulysses_degree)
    low, high = queries[layout.head_group(mesh.position)]
    tokens = sum(case.tokens[position] for position in layout.ulysses_group(mesh.position))
    inputs: list[torch.Tensor] = []

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if not inputs:
            generator = torch.Generator().manual_seed(mesh.position)
            shape = (case.batch, high - low, case.seq_len, case.head_dim)
            q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float32).to(query) for _ in range(3))
            inputs.extend((q[:, :, :tokens].contiguous(), k, v))
        out: torch.Tensor = attend(*inputs)[0]
        return out

    return call


class _Blocking(Transport):
    """Waits for each exchange before it returns, so that nothing overlaps."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def one_sided(self) -> OneSided | None:
        return self._transport.one_sided

    def record(self, round: int, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> Transfer:
        return _BlockingTransfer(self._transport.record(round, sends, receives))

    def record_end(self) -> Callable[[torch.Tensor | None], None]:
        return self._transport.record_end()

    def drain(self) -> None:
        self._transport.drain()

    def close(self) -> None:
        self._transport.close()


class _BlockingTransfer(Transfer):
    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer

    def post(self) -> None:
        self._transfer.post()
        self._transfer.wait()

    def wait(self) -> None:
        pass


def _xdit_variants(case: Case, mesh: Mesh | None, requested: Sequence[str] | None) -> list[Variant]:
    kv_heads = case.kv_heads or case.heads
    n, m = case.num_machines, case.ranks_per_machine
    own = gcd(m, gcd(case.heads, kv_heads))  # xDiT's default: Ulysses inside a machine as far as the heads allow
    degree = own if mesh is None else mesh.layout.ulysses_degree
    legal = legal_configs(case.world_size, m, case.heads, kv_heads)
    mapped = legal_configs(case.world_size, m, case.heads, kv_heads, placement="machines-first")
    mapped = [config for config in mapped if config.ulysses_degree == degree]
    named = {variant_name(config, own): config for config in (*legal, *mapped)}
    reasons: dict[str, str] = {}
    if "ulysses" not in named and "usp-ulysses" not in named:
        reasons["ulysses"] = f"{gcd(case.heads, kv_heads)} heads cannot be split over {case.world_size} ranks"
    if not mapped and case.heads % degree:
        reasons["mapping"] = f"xDiT cannot split {case.heads} heads over {degree} ranks"
    elif not mapped:
        reasons["mapping"] = f"with ulysses={degree} it equals xDiT's own placement"
    order = ("usp", "ulysses", "ring", "xdit", "mapping")
    names = sorted({*named, *reasons}, key=lambda name: (order.index(name.split("-")[0]), name))
    names = [name for name in names if requested is None or name in requested]
    if (missing := _no_xdit(case)) is not None:
        return [Variant(name=name, description="xDiT", family=_family(name), reason=missing) for name in names]
    configs = [named[name] for name in names if name in named]
    members = None if mesh is None else mesh.members
    groups = usp_variants.make_groups(configs, ranks_per_machine=m, members=members)
    variants = []
    for name in names:
        variant = Variant(name=name, description=_DESCRIPTIONS[name.split("-")[0]], family=_family(name))
        if (config := named.get(name)) is None:
            variants.append(replace(variant, reason=reasons[name]))
        else:
            formula = egress(config, n, m, kv_heads / case.heads) * _tensor_bytes(case)
            call = _usp(groups, config)
            variants.append(replace(variant, layout=str(config), call=call, formula_bytes=formula, simulated=config))
    return variants


def _usp(groups: XditGroups, config: XditConfig) -> Call:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with groups.use(config):
            return call_usp(query, key, value)

    return call


def _no_xdit(case: Case) -> str | None:
    """Why xDiT cannot run the case; None if it can."""
    missing = usp_variants.unavailable()
    if missing is None and case.seq_len % case.world_size:
        missing = f"xDiT needs equal token counts; {case.seq_len} tokens cannot be split over {case.world_size} ranks"
    return missing


_DESCRIPTIONS = {
    "usp": "xDiT's USP in its own layout",
    "ulysses": "xDiT, Ulysses over all ranks",
    "ring": "xDiT, Ring over all ranks",
    "xdit": "xDiT, other degrees",
    "mapping": "xDiT's code, Ulysses across machines",
}


def _family(name: str) -> str:
    """``mapping`` is xDiT's code in a placement that xDiT has no flag for, so it is not an xDiT variant."""
    return "ours" if name.startswith("mapping") else "xdit"


# -- bytes between machines -------------------------------------------------------------------------------------------


def _tensor_bytes(case: Case) -> int:
    """Bytes of one [B, L, H, D] tensor."""
    return case.batch * case.seq_len * case.heads * case.head_dim * _itemsize(case)


def _itemsize(case: Case) -> int:
    return int(getattr(torch, case.dtype).itemsize)


def _torus_egress(case: Case, layout: Layout, packed: float = 1.0) -> float:
    """Elements sent to other machines by the machine that sends most, in units of ``B*L*H*D``.

    As ``Layout.egress``, but exact for uneven heads and for compression. A rank sends its tokens' Q, K and V to the
    head groups of other machines and returns O for their tokens. In a ring across machines it forwards each KV block
    R_x - 1 times. ``packed``: size of an element of Q, V and O relative to one of K.
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
