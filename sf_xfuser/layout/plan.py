"""Chooses the degrees of a sequence-parallel group of N machines x M ranks, with a reason. Pure.

    axis              degree   splits
    torus             T        heads across machines         (inter-machine Ulysses)
    ulysses           U        heads inside a machine        (intra-machine Ulysses)
    ring, across      R_x      KV across machines
    ring, inside      R_i      KV inside a machine

N = T * R_x and M = U * R_i. A rank's position is w = n*M + m, with n = t + T*r_x and m = u + U*r_i. Example: 2 machines
x 4 ranks and 12 heads give T=2, U=2, R_i=2: rank 5 (n=1, m=1) attends head group t*U + u = 3, which is heads 9 to 11.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd

EVEN = Fraction(1)
"""``max_imbalance`` that only allows equal head counts, which xDiT's own collectives need."""
UNEVEN = Fraction(9, 8)
"""``max_imbalance`` of Torus Attention. 8 heads over 3 machines: the busiest rank computes 1/8 more than the mean, and
a third fewer bytes cross machines than with a ring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The degrees of one sequence-parallel group, and the map from positions to coordinates and groups."""

    torus: int
    ulysses: int
    ring_across: int
    ring_inside: int

    def __post_init__(self) -> None:
        for name in ("torus", "ulysses", "ring_across", "ring_inside"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def on_grid(cls, num_machines: int, ranks_per_machine: int, torus: int, ulysses: int) -> Layout:
        """The layout of N x M ranks with these head degrees; ``torus`` divides N, ``ulysses`` divides M."""
        return cls(
            torus=torus,
            ulysses=ulysses,
            ring_across=num_machines // torus,
            ring_inside=ranks_per_machine // ulysses,
        )

    @property
    def num_machines(self) -> int:
        return self.torus * self.ring_across

    @property
    def ranks_per_machine(self) -> int:
        return self.ulysses * self.ring_inside

    @property
    def world_size(self) -> int:
        return self.num_machines * self.ranks_per_machine

    @property
    def ulysses_degree(self) -> int:
        """xDiT's ``ulysses_degree``: T * U."""
        return self.torus * self.ulysses

    @property
    def ring_degree(self) -> int:
        """xDiT's ``ring_degree``: R_x * R_i."""
        return self.ring_across * self.ring_inside

    def coordinates(self, position: int) -> tuple[int, int, int, int]:
        """``(t, u, r_x, r_i)`` of a position."""
        n, m = divmod(position, self.ranks_per_machine)
        r_x, t = divmod(n, self.torus)
        r_i, u = divmod(m, self.ulysses)
        return t, u, r_x, r_i

    def position(self, t: int, u: int, r_x: int, r_i: int) -> int:
        """Inverse of :meth:`coordinates`. Each coordinate wraps at its degree."""
        n = t % self.torus + self.torus * (r_x % self.ring_across)
        m = u % self.ulysses + self.ulysses * (r_i % self.ring_inside)
        return n * self.ranks_per_machine + m

    def machine(self, position: int) -> int:
        return position // self.ranks_per_machine

    def head_group(self, position: int) -> int:
        """Index of the head group that this position attends, of ``ulysses_degree``."""
        t, u, _, _ = self.coordinates(position)
        return t * self.ulysses + u

    def ulysses_group(self, position: int) -> tuple[int, ...]:
        """Positions with the same ring coordinates, ordered by head group."""
        _, _, r_x, r_i = self.coordinates(position)
        return tuple(self.position(t, u, r_x, r_i) for t in range(self.torus) for u in range(self.ulysses))

    def ring_group(self, position: int) -> tuple[int, ...]:
        """Positions with the same heads, ordered by ring index ``r_x*R_i + r_i``."""
        t, u, _, _ = self.coordinates(position)
        return tuple(self.position(t, u, x, i) for x in range(self.ring_across) for i in range(self.ring_inside))

    def egress(self, kv_ratio: Fraction = Fraction(1)) -> Fraction:
        """Elements that one machine sends to others per attention call, in units of ``B*L*H*D``; ``kv_ratio`` = H_kv/H.

        Ulysses sends Q, K, V and O to the other T-1 machines of its group. The ring sends each KV block R_x - 1 times.
        """
        ulysses = (2 + 2 * kv_ratio) * Fraction(self.torus - 1, self.torus)
        ring = 2 * kv_ratio * (self.ring_across - 1)
        return (ulysses + ring) / self.num_machines

    @property
    def flag(self) -> str:
        """The value of ``--sp-plan`` that gives this layout."""
        return f"torus={self.torus},ulysses={self.ulysses},ring={self.ring_degree}"

    def __str__(self) -> str:
        ring = f"ring={self.ring_degree}"
        if self.ring_across > 1:
            ring += f" ({self.ring_across} across machines x {self.ring_inside} inside)"
        return f"torus={self.torus} ulysses={self.ulysses} {ring}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutOption:
    """One possible layout, and why it was rejected (empty for the chosen one)."""

    layout: Layout
    egress: Fraction
    rejected: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The chosen layout, the rule and reason for it, and all ``options``.

    ``even`` is the layout of xDiT's own USP on the same ranks, which splits heads evenly. It equals ``layout`` if
    ``ulysses_degree`` divides the heads.
    """

    layout: Layout
    even: Layout
    rule: str
    reason: str
    heads: int | None
    options: tuple[LayoutOption, ...] = ()

    def __str__(self) -> str:
        layout = self.layout
        shape = f"{layout.num_machines} machine(s) x {layout.ranks_per_machine} rank(s)"
        uneven = f"; {self.heads} heads split unevenly, xDiT's own code uses {self.even}" if self.even != layout else ""
        return f"{shape}: {layout} (rule {self.rule}: {self.reason}{uneven})"

    def lines(self) -> list[str]:
        """The plan as text: the choice, then every layout with its cost and why it was rejected."""
        return [str(self)] + [
            f"  {option.layout!s:<52} inter-machine: {float(option.egress):.3f} BLHD  {option.rejected or 'chosen'}"
            for option in self.options
        ]


def legal_layouts(
    num_machines: int, ranks_per_machine: int, heads: int | None, max_imbalance: Fraction = EVEN
) -> Iterator[Layout]:
    """Every layout that splits ``heads`` (None: unknown) over T*U ranks within ``max_imbalance``."""
    for torus in _divisors(num_machines):
        for ulysses in _divisors(ranks_per_machine):
            if heads is None or imbalance(heads, torus * ulysses) <= max_imbalance:
                yield Layout.on_grid(num_machines, ranks_per_machine, torus, ulysses)


def head_ranges(
    heads: int, kv_heads: int, ways: int
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """(query heads, KV heads) of each of ``ways`` head groups, as half-open ranges. Where ``ways`` does not divide
    ``heads``, the first groups have one query head more. A KV head that two groups share is in both."""
    repeat = heads // kv_heads
    bounds = [group * (heads // ways) + min(group, heads % ways) for group in range(ways + 1)]
    queries = tuple(pairwise(bounds))
    return queries, tuple((low // repeat, -(-high // repeat)) for low, high in queries)


def imbalance(heads: int, ways: int) -> Fraction:
    """Maximum over mean of the heads per rank: 1 where ``ways`` divides ``heads``, 9/8 for 8 heads over 3."""
    return Fraction(-(-heads // ways) * ways, heads)


def unsplit(heads: int, ways: int, named: str = "") -> str:
    """Why these heads are not split over so many ranks. ``named``: in place of their number."""
    most = f": one would have {float(imbalance(heads, ways)):.2f}x the average" if heads >= ways else ""
    return f"{named or f'{heads} heads'} cannot be split over {ways} ranks{most}"


def split_degree(num_machines: int, ranks_per_machine: int, ulysses_degree: int) -> Layout:
    """The layout with this total Ulysses degree, across machines first. It exists for every divisor of N*M."""
    torus = gcd(num_machines, ulysses_degree)
    ulysses = ulysses_degree // torus
    if ranks_per_machine % ulysses:
        raise ValueError(
            f"ulysses_degree={ulysses_degree} does not divide the {num_machines * ranks_per_machine} ranks of the "
            f"sequence-parallel group; allowed: {_divisors(num_machines * ranks_per_machine)}"
        )
    return Layout.on_grid(num_machines, ranks_per_machine, torus, ulysses)


def paper_layout(num_machines: int, ranks_per_machine: int, heads: int) -> Layout:
    """StreamFusion's rule (arXiv 2601.20273): Ulysses degree gcd(N*M, H), across machines first; then Ring."""
    return split_degree(num_machines, ranks_per_machine, gcd(num_machines * ranks_per_machine, heads))


def usp_layout(num_machines: int, ranks_per_machine: int, ulysses_degree: int) -> Layout:
    """xDiT's own layout: Ulysses on neighbouring ranks, inside a machine first; then Ring."""
    ulysses = gcd(ranks_per_machine, ulysses_degree)
    torus = ulysses_degree // ulysses
    if num_machines % torus:
        raise ValueError(
            f"ulysses_degree={ulysses_degree} cannot be laid out as xDiT does over {num_machines} machine(s) of "
            f"{ranks_per_machine} rank(s); use a divisor of {num_machines * ranks_per_machine} or --sp-plan auto"
        )
    return Layout.on_grid(num_machines, ranks_per_machine, torus, ulysses)


def make_plan(
    num_machines: int,
    ranks_per_machine: int,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    rule: str = "auto",
    explicit: dict[str, int] | None = None,
    ulysses_degree: int | None = None,
    max_imbalance: Fraction = EVEN,
) -> Plan:
    """Choose the layout of a sequence-parallel group of ``num_machines`` x ``ranks_per_machine`` ranks.

    ``explicit`` (torus, ulysses, ring) or ``ulysses_degree`` (xDiT's total) fix the degrees. Otherwise ``rule``
    decides: ``"paper"``, ``"usp"`` or ``"auto"`` (fewest bytes between machines; the paper's layout on a tie).
    No rank gets more than ``max_imbalance`` times the mean number of heads. ``Plan.even`` also has this
    ``ulysses_degree``. Raises ValueError with the wrong value and the allowed ones.
    """
    world_size = num_machines * ranks_per_machine
    divisible = heads if kv_heads is None or heads is None else gcd(heads, kv_heads)
    kv_ratio = Fraction(kv_heads, heads) if heads and kv_heads else Fraction(1)

    if explicit is not None:
        chosen = _explicit_layout(num_machines, ranks_per_machine, divisible, explicit, max_imbalance)
        reason = "explicit degrees"
    elif rule == "usp":
        degree = ulysses_degree or gcd(ranks_per_machine, divisible or ranks_per_machine)
        chosen, reason = usp_layout(num_machines, ranks_per_machine, degree), "xDiT's layout: Ulysses inside machines"
    elif ulysses_degree is not None:
        chosen = placed = split_degree(num_machines, ranks_per_machine, ulysses_degree)
        reason = f"ulysses_degree={ulysses_degree}, placed across machines first"
        if rule == "auto" and divisible is not None and divisible % ulysses_degree == 0:
            legal = legal_layouts(num_machines, ranks_per_machine, divisible, max_imbalance)
            agreeing = (layout for layout in legal if gcd(divisible, layout.ulysses_degree) == ulysses_degree)
            chosen = _fewest_bytes(agreeing, divisible, kv_ratio, placed)
            if chosen != placed:
                reason = f"ulysses_degree={ulysses_degree}, fewest bytes between machines"
    elif divisible is None:
        raise ValueError(
            f"cannot plan for {world_size} ranks: the number of attention heads is unknown; give --ulysses_degree and "
            f"--ring_degree, or --sp-plan torus=T,ulysses=U,ring=R"
        )
    elif rule == "paper":
        chosen = paper_layout(num_machines, ranks_per_machine, divisible)
        reason = f"largest Ulysses degree gcd({world_size} ranks, {divisible} heads), across machines first"
    else:
        paper = paper_layout(num_machines, ranks_per_machine, divisible)
        legal = legal_layouts(num_machines, ranks_per_machine, divisible, max_imbalance)
        chosen = _fewest_bytes(legal, divisible, kv_ratio, paper)
        if num_machines == 1:
            reason = "one machine, no inter-machine traffic: the paper's degrees"
        else:
            reason = "fewest bytes between machines" + (", which is the paper's layout" if chosen == paper else "")
    # xDiT checks its own --ulysses_degree, and pads the heads of some models that it does not divide (Z-Image).
    if ulysses_degree is None and divisible and imbalance(divisible, chosen.ulysses_degree) > max_imbalance:
        raise ValueError(_indivisible(divisible, chosen, world_size, max_imbalance))
    even_ways = gcd(divisible, chosen.ulysses_degree) if divisible else chosen.ulysses_degree
    evenly = chosen.ulysses_degree in (even_ways, ulysses_degree)
    even = chosen if evenly else split_degree(num_machines, ranks_per_machine, even_ways)
    return Plan(
        layout=chosen,
        even=even,
        rule="explicit" if explicit else rule,
        reason=reason,
        heads=heads,
        options=_options(num_machines, ranks_per_machine, divisible, kv_ratio, chosen, max_imbalance),
    )


def _fewest_bytes(layouts: Iterator[Layout], heads: int, kv_ratio: Fraction, preferred: Layout) -> Layout:
    def cost(layout: Layout) -> tuple[Fraction, Fraction, bool, int]:
        ways = layout.ulysses_degree
        return layout.egress(kv_ratio), imbalance(heads, ways), layout != preferred, -ways

    return min(layouts, key=cost)


def _explicit_layout(
    num_machines: int,
    ranks_per_machine: int,
    heads: int | None,
    explicit: dict[str, int],
    max_imbalance: Fraction,
) -> Layout:
    torus, ulysses, ring = explicit["torus"], explicit["ulysses"], explicit["ring"]
    degrees = f"torus={torus},ulysses={ulysses},ring={ring}"
    world_size = num_machines * ranks_per_machine
    if torus * ulysses * ring != world_size:
        raise ValueError(
            f"--sp-plan {degrees} describes {torus * ulysses * ring} ranks, but the sequence-parallel group has "
            f"{world_size}: their product must be {world_size}"
        )
    if num_machines % torus or ranks_per_machine % ulysses:
        raise ValueError(
            f"--sp-plan {degrees} does not fit {num_machines} machine(s) x {ranks_per_machine} rank(s): torus must "
            f"divide {num_machines} and ulysses must divide {ranks_per_machine}; legal: "
            f"{_flags(legal_layouts(num_machines, ranks_per_machine, heads, max_imbalance))}"
        )
    return Layout.on_grid(num_machines, ranks_per_machine, torus, ulysses)


def _indivisible(heads: int, layout: Layout, world_size: int, max_imbalance: Fraction) -> str:
    ways = layout.ulysses_degree
    legal = legal_layouts(layout.num_machines, layout.ranks_per_machine, heads, max_imbalance)
    return (
        f"{heads} heads cannot be split over torus={layout.torus} x ulysses={layout.ulysses} = {ways} ranks; "
        f"legal for {world_size} ranks: {_flags(legal)}"
    )


def _flags(layouts: Iterator[Layout]) -> str:
    return " or ".join(layout.flag for layout in layouts)


def _options(
    num_machines: int,
    ranks_per_machine: int,
    heads: int | None,
    kv_ratio: Fraction,
    chosen: Layout,
    max_imbalance: Fraction,
) -> tuple[LayoutOption, ...]:
    best = chosen.egress(kv_ratio)
    options = []
    for layout in legal_layouts(num_machines, ranks_per_machine, None):
        egress = layout.egress(kv_ratio)
        if layout == chosen:
            rejected = ""
        elif heads is not None and imbalance(heads, layout.ulysses_degree) > max_imbalance:
            rejected = f"illegal: {unsplit(heads, layout.ulysses_degree)}"
        elif egress > best:
            rejected = f"{float(egress / best) if best else float('inf'):.2f}x the bytes between machines"
        elif egress < best:
            rejected = "fewer bytes between machines, but not this rule's layout"
        else:
            rejected = "same bytes between machines, but not this rule's Ulysses degree"
        options.append(LayoutOption(layout=layout, egress=egress, rejected=rejected))
    return tuple(options)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
