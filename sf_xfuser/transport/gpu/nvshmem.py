"""One-sided transfers between NVIDIA GPUs of one or many machines: NVSHMEM through nvshmem4py (0.3.1 or newer).
``device.py`` describes the protocol.

Most mistakes with NVSHMEM end the process without a Python exception: an allocation after a failed start, a library for
another CUDA version, or an unsupported wait where processes share a GPU. So every rank first gathers the ``Facts`` of
all ranks, a pure function finds the ranks that cannot use NVSHMEM, and every rank raises with their reasons.

A sequence-parallel group is one NVSHMEM world. A rank's PE is its position. Other replicas have worlds of their own. A
process can be in one world only, so nothing else in it may use NVSHMEM (DeepEP, the NVSHMEM backend of PyTorch's
symmetric memory).

Copy engines and stream memory operations reach peers whose memory the GPU maps, as with ``symm_mem``. NVSHMEM's proxy
thread reaches the others, from symmetric memory only: ``putmem_signal_on_stream``, whose flag follows its data on every
fabric. Waits for such peers are NVSHMEM's kernel, which spins in one thread. A put to them holds its stream until the
peer has the data, so it has a stream of its own.
"""

from __future__ import annotations

import importlib.metadata
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.config import environment
from sf_xfuser.transport.base import TransportError, raise_if_unavailable
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.gpu.block import round_up
from sf_xfuser.transport.gpu.device import DeviceWindow
from sf_xfuser.transport.gpu.driver import Driver
from sf_xfuser.transport.gpu.facts import RankFacts, gather, other_hosts, ranks_on_gpu, version_numbers
from sf_xfuser.transport.gpu.transfer import NetworkPut

_SET = 9  # NVSHMEM_SIGNAL_SET
_EQUAL, _NOT_EQUAL = 0, 1  # NVSHMEM_CMP_*; a wait with a signal operation in its place returns at once
_INITIALIZED, _LIMITED = 2, 3  # init_status(); 3: several processes on a GPU, without MPS
_OLDEST_BINDINGS, _OLDEST_LIBRARY = (0, 3, 1), (3, 3)
_HEAP_CHUNK = 512 << 20  # bytes by which the symmetric heap grows

# Variables that this module checks. NVSHMEM reads its own variables.
VARIABLES = (
    "NVSHMEM_REMOTE_TRANSPORT",
    "NVSHMEM_LIBFABRIC_PROVIDER",
    "NVSHMEM_DISABLE_NVLS",
    "NVSHMEM_DISABLE_CUDA_VMM",
    "NVSHMEM_SYMMETRIC_SIZE",
    "NVSHMEM_BYPASS_FLUSH",
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME",
    "NVSHMEM_HCA_LIST",
    "NVSHMEM_HCA_PE_MAPPING",
    "NVSHMEM_IB_GID_INDEX",
    "FI_EFA_ENABLE_SHM_TRANSFER",
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_HCA",
    "NCCL_IB_GID_INDEX",
)
_NVSHMEM_EQUIVALENTS = {
    "NCCL_SOCKET_IFNAME": ("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME",),
    "NCCL_IB_HCA": ("NVSHMEM_HCA_LIST", "NVSHMEM_HCA_PE_MAPPING"),
    "NCCL_IB_GID_INDEX": ("NVSHMEM_IB_GID_INDEX",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts(RankFacts):
    """Capabilities of one rank, gathered by all.

    ``bindings``: version of nvshmem4py by flavour (``"cu13"``). ``library``: version of libnvshmem. ``status``:
    NVSHMEM's init status. ``world``: members of the world that this module started in this process.
    """

    bindings: Mapping[str, str] = field(default_factory=dict)
    library: str = ""
    status: int = 0
    world: Sequence[int] | None = None


def probe() -> Facts:
    """Probe this process. Local; never raises, creates no CUDA context, does not start NVSHMEM."""
    facts: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count(),
        "bindings": _installed_bindings(),
        "world": _world,
        "host": socket.gethostname(),
        "environment": environment(VARIABLES),
    }
    if not facts["gpus"] or not facts["bindings"]:
        return Facts(**facts)
    try:
        import nvshmem.core as core

        facts |= Driver().facts()
        facts["library"] = str(core.get_version().libnvshmem_version)
        facts["status"] = int(core.init_status())
    except Exception as error:
        facts["problem"] = f"{type(error).__name__}: {error}"
    return Facts(**facts)


def unsupported_reason(facts: Facts) -> str | None:
    """Why a process with these facts cannot use NVSHMEM, regardless of its peers, or None. Pure."""
    if reason := facts.no_gpu_reason():
        return reason
    flavour = f"cu{str(facts.cuda).split('.')[0]}"
    install = f"pip install 'nvshmem4py-{flavour}>=0.3.1'"
    if not facts.bindings:
        return f"nvshmem4py is not installed: {install}"
    if len(facts.bindings) > 1:
        return f"nvshmem4py is installed for {' and '.join(sorted(facts.bindings))}: keep only the one for {flavour}"
    ((installed, version),) = facts.bindings.items()
    if installed != flavour:
        return f"nvshmem4py is installed for {installed}, but PyTorch is built for CUDA {facts.cuda}: {install}"
    if version_numbers(version) < _OLDEST_BINDINGS:
        return f"nvshmem4py {version} is too old: {install}"
    if facts.problem:
        return f"NVSHMEM cannot be used: {facts.problem}"
    if version_numbers(facts.library) < _OLDEST_LIBRARY:
        return f"libnvshmem {facts.library} may crash on signals from other machines: update nvidia-nvshmem-{flavour}"
    if reason := facts.old_driver_reason():
        return reason
    if facts.status and facts.world is None:
        if facts.status < _INITIALIZED:
            return "an earlier start of NVSHMEM in this process has failed: restart the job"
        return "something else in this process has started NVSHMEM, and a process can be in one NVSHMEM world only"
    provider = facts.environment.get("NVSHMEM_LIBFABRIC_PROVIDER", "")
    if provider != provider.lower():
        return f"NVSHMEM does not recognize NVSHMEM_LIBFABRIC_PROVIDER={provider}: write it in lower case"
    return None


def group_unsupported_reasons(ranks: Sequence[Facts], members: Sequence[int], job_size: int) -> list[str | None]:
    """For each rank of a group, why the group cannot use NVSHMEM, or None. Pure."""
    own_reasons = [unsupported_reason(facts) for facts in ranks]
    if any(own_reasons):
        return own_reasons
    hosts = {facts.host for facts in ranks}
    on_gpu = Counter((facts.host, facts.gpu) for facts in ranks)
    libraries = {facts.library for facts in ranks}
    started = any(facts.world is not None for facts in ranks)

    def reason(facts: Facts) -> str | None:
        if len(libraries) > 1:
            return f"has libnvshmem {facts.library}, but other ranks have a different version"
        if started and list(facts.world or ()) != list(members):
            return f"is in an NVSHMEM world of ranks {facts.world}, but this group needs one of ranks {list(members)}"
        if len(hosts) > 1 and facts.environment.get("NVSHMEM_REMOTE_TRANSPORT", "").lower() == "none":
            return f"NVSHMEM_REMOTE_TRANSPORT=none, but the ranks are on {len(hosts)} hosts"
        if on_gpu[facts.host, facts.gpu] == 1:
            return None
        if len(members) < job_size:
            return "shares its GPU with another rank, which NVSHMEM supports for one sequence-parallel group per job"
        if facts.environment.get("NVSHMEM_DISABLE_NVLS") != "1":
            return "shares its GPU with another rank, which needs NVSHMEM_DISABLE_NVLS=1"
        return None

    return [reason(facts) for facts in ranks]


def unavailable() -> str | None:
    """Why this process cannot use NVSHMEM, regardless of its peers, or None. Local."""
    return unsupported_reason(probe())


def environment_warnings(variables: Mapping[str, str], efa: bool = False) -> dict[str, str]:
    """Warnings about settings that may fail or be slow, by variable. ``efa``: the machine has AWS EFA cards. Pure.
    Source: NVSHMEM's environment variables and release notes (3.3.24 for EFA).
    """
    warnings = {}
    remote = variables.get("NVSHMEM_REMOTE_TRANSPORT", "ibrc").lower()
    provider = variables.get("NVSHMEM_LIBFABRIC_PROVIDER", "")
    if efa and remote != "libfabric":
        warnings["NVSHMEM_REMOTE_TRANSPORT"] = "this machine has EFA cards: set it to libfabric for several machines"
    if remote == "libfabric" and provider != "efa" and (efa or provider != provider.lower()):
        warnings["NVSHMEM_LIBFABRIC_PROVIDER"] = "must be efa on EFA, in lower case"
    if remote == "libfabric" and provider == "efa" and variables.get("FI_EFA_ENABLE_SHM_TRANSFER") != "0":
        warnings["FI_EFA_ENABLE_SHM_TRANSFER"] = "must be 0 for NVSHMEM over EFA"
    for name, equivalents in _NVSHMEM_EQUIVALENTS.items():
        if name in variables and not any(other in variables for other in equivalents):
            warnings[name] = f"={variables[name]} applies to NCCL only: set {' or '.join(equivalents)} too"
    if variables.get("NVSHMEM_DISABLE_CUDA_VMM") == "1" and "NVSHMEM_SYMMETRIC_SIZE" not in variables:
        warnings["NVSHMEM_SYMMETRIC_SIZE"] = "is 1 GiB with NVSHMEM_DISABLE_CUDA_VMM=1: set it to hold three windows"
    if variables.get("NVSHMEM_BYPASS_FLUSH") == "1":
        warnings["NVSHMEM_BYPASS_FLUSH"] = "=1 makes waits fail on GPUs that cannot flush remote writes: unset it"
    return warnings


def exchange_unique_id(control: ControlPlane, members: Sequence[int], position: int) -> Any:
    """The id of a new world. Position 0 creates it and must stay alive. Collective; raises TransportError on every
    rank."""
    import nvshmem.core as core

    created, problem = "", None
    if position == 0:
        try:
            created = core.get_unique_id()._data.tobytes().hex()
        except Exception as error:
            problem = f"cannot create a unique id: {error}"
    answers = control.gather("nvshmem unique id", [created, problem])
    raise_if_unavailable("nvshmem", members, [reason for _, reason in answers])
    received = torch.frombuffer(bytearray.fromhex(answers[0][0]), dtype=torch.uint8)
    unique_id = core.get_unique_id(empty=True)
    unique_id._data.view("uint8")[...] = received.numpy().reshape(unique_id._data.view("uint8").shape)
    return unique_id


def finalize() -> None:
    """End the NVSHMEM world that this module started, unless one of its windows is open. Optional. Collective over the
    group: it hangs if a member does not call it, so do not call it in a failing job."""
    global _world
    if _world is None or _open_windows:
        return
    import nvshmem.core as core

    if int(core.init_status()) >= _INITIALIZED:
        torch.cuda.synchronize()
        core.finalize()
    _world = None


_world: list[int] | None = None  # the members of this process's world
_open_windows: list[Nvshmem] = []  # of any mesh of these members


class Nvshmem(DeviceWindow):
    """As ``DeviceWindow``. ``members`` are the NVSHMEM world, and a position is a PE. Freed memory stays in NVSHMEM's
    heap."""

    name = "nvshmem"

    def __init__(
        self, control: ControlPlane, members: Sequence[int], position: int, peers: Sequence[int], timeout_s: float
    ) -> None:
        self._require_no_capture()
        self._status, self._ranks_on_gpu, self.other_hosts = _start_world(control, members, position)
        self._heap: torch.Tensor | None = None
        from nvshmem import bindings

        self._bindings = bindings
        super().__init__(control, members, position, peers, timeout_s)
        _open_windows.append(self)

    def close(self) -> None:
        super().close()
        if self in _open_windows:
            _open_windows.remove(self)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        import nvshmem.core as core

        heap: torch.Tensor = core.tensor((nbytes,), dtype=torch.uint8)
        self._heap = heap
        addresses = {peer: self._bindings.ptr(heap.data_ptr(), peer) for peer in self._reachable}
        self._address = {peer: address for peer, address in addresses.items() if address}
        unmapped = [self._members[peer] for peer in self._peers if not self.maps(peer)]
        if self._status == _LIMITED and unmapped:
            raise RuntimeError(f"NVSHMEM cannot wait for ranks {unmapped}: they are not mapped, and ranks share a GPU")
        return heap

    def _free(self) -> None:
        import nvshmem.core as core

        core.free_tensor(self._heap)
        self._heap = None

    def _growth(self, nbytes: int, freed_bytes: int) -> int:
        """Freed memory may leave a hole in the heap that is too small, so it does not count."""
        return round_up(nbytes, _HEAP_CHUNK)

    def _put(self, peer: int, offset: int, source: int, nbytes: int, stream: int) -> None:
        self._bindings.putmem_on_stream(self._base + offset, source, nbytes, peer, stream)

    def record_network(self, puts: Sequence[NetworkPut]) -> tuple[Callable[[], None], int]:
        """As ``DeviceWindow.record_network``."""
        launches = sum(len(put.chunks) + 1 if len(put.chunks) > 1 else 1 for put in puts)
        return partial(self._put_rounds, puts, self.streams.network), launches

    def _put_rounds(self, puts: Sequence[NetworkPut], stream: int) -> None:
        for put in puts:
            self._put_round(put, stream)

    def _put_round(self, put: NetworkPut, stream: int) -> None:
        """The flag follows its own chunk on every fabric, and earlier chunks because of the ``quiet``."""
        bindings, peer, flag = self._bindings, put.peer, self._base + put.flag
        chunks = put.chunks
        if self.capturing:  # the value of a signal would be fixed in the graph
            for chunk in chunks:
                self._put(peer, *chunk, stream)
            bindings.quiet_on_stream(stream)
            bindings.putmem_on_stream(flag, self.expected_address, 8, peer, stream)
        elif not chunks:
            bindings.signal_op_on_stream(flag, self.value, _SET, peer, stream)
        else:
            for chunk in chunks[:-1]:
                self._put(peer, *chunk, stream)
            if len(chunks) > 1:
                bindings.quiet_on_stream(stream)
            offset, source, nbytes = chunks[-1]
            bindings.putmem_signal_on_stream(self._base + offset, source, nbytes, flag, self.value, _SET, peer, stream)

    def await_network_flag(self, address: int, stream: int) -> None:
        comparison = (_NOT_EQUAL, 0) if self.capturing else (_EQUAL, self.value)
        self._bindings.signal_wait_until_on_stream(address, *comparison, stream)


def _start_world(control: ControlPlane, members: Sequence[int], position: int) -> tuple[int, int, set[int]]:
    """Start NVSHMEM with ``members`` as its world, unless started. Returns its status, the number of members on this
    GPU, and the positions on other hosts. Collective; raises TransportError on every rank."""
    global _world
    ranks = gather(control, "nvshmem", probe())
    raise_if_unavailable("nvshmem", members, group_unsupported_reasons(ranks, members, dist.get_world_size()))

    import nvshmem.core as core

    if _world is None:
        unique_id = exchange_unique_id(control, members, position)
        problem = None
        try:
            core.init(
                device=_current_device(),
                uid=unique_id,
                rank=position,
                nranks=len(members),
                initializer_method="uid",
            )
        except Exception as error:
            problem = f"NVSHMEM did not start: {error}"
        status = int(core.init_status())
        if problem is None and status < _INITIALIZED:  # NVSHMEM prints the reason and does not raise
            problem = f"NVSHMEM started only partly (status {status}); NVSHMEM_DEBUG=INFO prints the reason on stderr"
        raise_if_unavailable("nvshmem", members, control.gather("nvshmem started", problem))
        if (core.my_pe(), core.n_pes()) != (position, len(members)):
            raise TransportError(f"NVSHMEM assigned PE {core.my_pe()} to this rank, not {position}")
        _world = list(members)
    return int(core.init_status()), ranks_on_gpu(ranks, position), other_hosts(ranks, position)


def _current_device() -> Any:
    try:
        from cuda.core import Device
    except ImportError:
        from cuda.core.experimental import Device
    device = Device(torch.cuda.current_device())
    device.set_current()
    return device


def _installed_bindings() -> dict[str, str]:
    versions = {}
    for flavour in ("cu12", "cu13"):
        try:
            versions[flavour] = importlib.metadata.version(f"nvshmem4py-{flavour}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
