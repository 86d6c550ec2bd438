"""Groups ranks by machine: every rank runs ``probe``, and ``Topology.from_facts`` combines the gathered facts.

A *machine* is a set of ranks with a fast link: one host, or one NVLink domain that spans hosts. This module does not
communicate.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd, prod
from pathlib import Path

from sf_xfuser.config import launch_environment, parse_grid


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """Location of one rank. Ranks have equal ``machine`` if and only if a fast link connects them. ``nvlink_unknown``:
    why the probe cannot tell the NVLink domain; empty if it can."""

    machine: str
    host: str
    local_rank: int | None = None
    accelerator: str = "cpu"
    nvlink_domain: str | None = None
    nvlink_unknown: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The job's ranks by machine. ``machines[n]`` lists the ranks of machine ``n`` in ascending order; machines are
    ordered by their lowest rank. ``source`` is the origin of this information, for logs."""

    machines: tuple[tuple[int, ...], ...]
    source: str

    def __post_init__(self) -> None:
        ranks = sorted(rank for machine in self.machines for rank in machine)
        if not ranks or ranks != list(range(len(ranks))):
            raise ValueError(f"a topology must hold each of the ranks 0..W-1 once, got machines {self.machines}")

    @property
    def world_size(self) -> int:
        return sum(map(len, self.machines))

    @classmethod
    def uniform(cls, num_machines: int, ranks_per_machine: int, source: str = "explicit") -> Topology:
        """``num_machines`` machines of ``ranks_per_machine`` consecutive ranks each."""
        m = ranks_per_machine
        return cls(machines=tuple(tuple(range(n * m, (n + 1) * m)) for n in range(num_machines)), source=source)

    @classmethod
    def parse(cls, text: str, world_size: int) -> Topology:
        """``"NxM"``: N machines of M consecutive ranks. Raises ValueError unless N*M is ``world_size``."""
        grid = parse_grid(text)
        if grid is None:
            raise ValueError(f"--sp-topology must be 'auto' or 'NxM' (machines x ranks per machine), got {text!r}")
        if prod(grid) != world_size:
            raise ValueError(
                f"--sp-topology {text} describes {prod(grid)} ranks, but the job has {world_size}: give machines x "
                "ranks per machine with that product, or 'auto'"
            )
        return cls.uniform(*grid, source=f"--sp-topology {text}")

    @classmethod
    def from_facts(cls, facts: Sequence[RankFacts]) -> Topology:
        """Group ranks (list position = rank) by ``RankFacts.machine``."""
        machines: dict[str, list[int]] = {}
        for rank, fact in enumerate(facts):
            machines.setdefault(fact.machine, []).append(rank)
        domains = any(fact.nvlink_domain for fact in facts)
        source = "NVLink domains and hosts" if domains else "hosts"
        unknown = "".join(f" ({reason})" for reason in sorted({fact.nvlink_unknown for fact in facts} - {""}))
        return cls(
            machines=tuple(tuple(ranks) for ranks in machines.values()), source=f"{source} of the ranks{unknown}"
        )

    def fold(self, ranks: Sequence[int]) -> MachineGrid:
        """One sequence-parallel group (``ranks``, global, ascending) as a full N x M grid.

        Machines with unequal numbers of ranks are split into equal virtual machines of the greatest common divisor. A
        virtual machine never spans two machines. ``note`` is the explanation for logs.
        """
        member = set(ranks)
        covered = [[rank for rank in machine if rank in member] for machine in self.machines]
        covered = [machine for machine in covered if machine]
        counts = [len(machine) for machine in covered]
        size = reduce(gcd, counts)
        rows = tuple(tuple(machine[i : i + size]) for machine in covered for i in range(0, len(machine), size))
        note = ""
        if len(set(counts)) > 1:
            sizes = ", ".join(f"{count} x {ranks}" for ranks, count in sorted(Counter(counts).items()))
            note = f"machines of unequal size (machines x ranks: {sizes}) are split into {len(rows)} of {size} rank(s)"
        return MachineGrid(rows=rows, note=note)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineGrid:
    """One sequence-parallel group as N equal machines (``rows``) of M global ranks each."""

    rows: tuple[tuple[int, ...], ...]
    note: str = ""

    @property
    def num_machines(self) -> int:
        return len(self.rows)

    @property
    def ranks_per_machine(self) -> int:
        return len(self.rows[0])

    @property
    def members(self) -> tuple[int, ...]:
        """Global rank at each machine-major position ``w = n*M + m``."""
        return tuple(rank for row in self.rows for rank in row)


def probe() -> RankFacts:
    """Location of this process. Local. Never raises: unknown fields keep their defaults."""
    launched = launch_environment()
    host = host_id()
    accelerator, domain, unknown = _probe_gpu(launched.local_rank or 0)
    return RankFacts(
        machine=launched.machine or domain or host,
        host=host,
        local_rank=launched.local_rank,
        accelerator=accelerator,
        nvlink_domain=domain,
        nvlink_unknown=unknown,
    )


def host_id() -> str:
    """Equal on ranks that run on the same host."""
    return f"{socket.gethostname()}/{boot_id()}"


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _probe_gpu(local_rank: int) -> tuple[str, str | None, str]:
    """(name of this rank's accelerator, its NVLink domain, why the domain is unknown). The domain is None unless the
    driver reports a multi-node NVLink fabric, as on GB200 NVL72 (NVML ``nvmlDeviceGetGpuFabricInfo``: cluster uuid and
    clique)."""
    try:
        import torch

        if not torch.cuda.is_available():
            return "cpu", None, ""
        device = local_rank % torch.cuda.device_count()
        name = torch.cuda.get_device_name(device)
    except Exception:  # a broken driver must not break the probe
        return "cpu", None, ""
    try:
        import pynvml
    except ImportError:
        return name, None, "NVLink domains that span hosts are unknown: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        try:
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            fabric = pynvml.c_nvmlGpuFabricInfo_t()
            pynvml.nvmlDeviceGetGpuFabricInfo(handle, pynvml.byref(fabric))
            cluster = bytes(fabric.clusterUuid).hex()
            if fabric.state == pynvml.NVML_GPU_FABRIC_STATE_COMPLETED and cluster.strip("0"):
                return name, f"nvlink:{cluster}:{fabric.cliqueId}", ""
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no NVML, an older driver, or no fabric: the host counts as the machine
        pass
    return name, None, ""
