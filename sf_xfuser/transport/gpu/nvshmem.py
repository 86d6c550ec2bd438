"""One-sided transfers between NVIDIA GPUs of one or many machines: NVSHMEM through nvshmem4py (0.3.1 or newer). See
``device.py`` for the protocol.

Most mistakes with NVSHMEM end the process without a Python exception: an allocation after a failed start, a wait that
is not supported where processes share a GPU, a library of the wrong CUDA. So what each rank knows (``Facts``) is
gathered, judged by a pure function, and refused on all ranks with the reasons of each before anything is called.

A sequence-parallel group is one NVSHMEM world of its own, in which a rank's PE is its position; replicas beside it do
not know of it. A process can be in one world only, so NVSHMEM must not have another owner in it (DeepEP, the NVSHMEM
backend of PyTorch's symmetric memory).

Puts go through ``putmem_signal_on_stream``, whose flag follows its data whatever the fabric does: by copy engine where
the GPU maps the peer's memory, else by NVSHMEM's proxy thread, and then only from symmetric memory. Waits are stream
memory operations for mapped peers; for others NVSHMEM's own, which spins in one thread.
"""

from __future__ import annotations

import importlib.metadata
import re
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sf_xfuser.config import environment
from sf_xfuser.transport.base import TransportError, raise_if_unavailable
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.gpu.device import DeviceWindow
from sf_xfuser.transport.gpu.driver import OLDEST, Driver, gpu_name, supported

_SET = 9  # nvshmemx signal operation
_EQUAL = 0  # NVSHMEM_CMP_EQ; a wait takes no signal operation, and returns at once if given one
_INITIALIZED, _LIMITED = 2, 3  # init_status(); 3: several processes on a GPU, without MPS
_OLDEST_BINDINGS, _OLDEST_LIBRARY = (0, 3, 1), (3, 3)
_HEAP_GRAIN = 512 << 20  # bytes by which the symmetric heap grows

# What is read of the environment; NVSHMEM reads its own variables itself.
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
_AS_NCCL = {
    "NCCL_SOCKET_IFNAME": ("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME",),
    "NCCL_IB_HCA": ("NVSHMEM_HCA_LIST", "NVSHMEM_HCA_PE_MAPPING"),
    "NCCL_IB_GID_INDEX": ("NVSHMEM_IB_GID_INDEX",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What one rank knows of its means; plain values, for the others to read.

    ``cuda``: of PyTorch. ``bindings``: version of nvshmem4py by flavour (``"cu13"``). ``problem``: why the library or
    the driver cannot be asked. ``library`` and ``driver``: versions. ``status``: NVSHMEM's in this process. ``world``:
    the members of the world that we made in it. ``host``, ``gpu``: where this rank computes.
    """

    cuda: str | None = None
    gpus: int = 0
    bindings: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None
    library: str = ""
    driver: int = 0
    missing: Sequence[str] = ()
    stream_operations: bool = False
    status: int = 0
    world: Sequence[int] | None = None
    host: str = ""
    gpu: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def look() -> Facts:
    """Local; never raises, makes no CUDA context and starts nothing."""
    known: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count(),
        "bindings": _bindings(),
        "world": _world,
        "host": socket.gethostname(),
        "environment": environment(VARIABLES),
    }
    if not known["gpus"] or not known["bindings"]:
        return Facts(**known)
    try:
        import nvshmem.core as core

        driver = Driver()
        known |= {"driver": driver.version, "missing": driver.missing()}
        known["stream_operations"] = not known["missing"] and driver.has_64_bit_stream_operations(0)
        known["library"] = str(core.get_version().libnvshmem_version)
        known["status"] = int(core.init_status())
    except Exception as error:
        known["problem"] = f"{type(error).__name__}: {error}"
    return Facts(**known)


def refusal(facts: Facts) -> str | None:
    """Why a process with these facts cannot use it, whatever its peers can; None where it can. Pure."""
    if facts.cuda is None:
        return "this PyTorch is built without CUDA"
    if not facts.gpus:
        return "no NVIDIA GPU is visible"
    flavour = f"cu{facts.cuda.split('.')[0]}"
    install = f"pip install 'nvshmem4py-{flavour}>=0.3.1'"
    if not facts.bindings:
        return f"nvshmem4py is not installed: {install}"
    if len(facts.bindings) > 1:
        return f"nvshmem4py is installed for {' and '.join(sorted(facts.bindings))}: keep that for {flavour} only"
    ((found, version),) = facts.bindings.items()
    if found != flavour:
        return f"nvshmem4py is installed for {found}, but PyTorch is built for CUDA {facts.cuda}: {install}"
    if _numbers(version) < _OLDEST_BINDINGS:
        return f"nvshmem4py {version} is too old: {install}"
    if facts.problem:
        return f"NVSHMEM cannot be used: {facts.problem}"
    if _numbers(facts.library) < _OLDEST_LIBRARY:
        return f"libnvshmem {facts.library} may crash on signals from other machines: update nvidia-nvshmem-{flavour}"
    if facts.driver < OLDEST or facts.missing:
        return f"{supported(facts.driver)}, NVSHMEM's flags need 12.5"
    if not facts.stream_operations:
        return "the GPU has no 64-bit stream memory operations"
    if facts.status and facts.world is None:
        if facts.status < _INITIALIZED:
            return "an earlier start of NVSHMEM in this process has failed: restart the job"
        return "something else in this process has started NVSHMEM, and a process can be in one NVSHMEM world only"
    provider = facts.environment.get("NVSHMEM_LIBFABRIC_PROVIDER", "")
    if provider != provider.lower():
        return f"NVSHMEM_LIBFABRIC_PROVIDER={provider} is not understood: write it in lower case"
    return None


def refusals(ranks: Sequence[Facts], members: Sequence[int], job_size: int) -> list[str | None]:
    """Why the ranks of a group cannot use it together, said for each of them. Pure."""
    alone = [refusal(facts) for facts in ranks]
    if any(alone):
        return alone
    hosts = {facts.host for facts in ranks}
    on_gpu = Counter((facts.host, facts.gpu) for facts in ranks)
    libraries = {facts.library for facts in ranks}
    started = any(facts.world is not None for facts in ranks)

    def together(facts: Facts) -> str | None:
        if len(libraries) > 1:
            return f"has libnvshmem {facts.library}, others have not"
        if started and list(facts.world or ()) != list(members):
            return f"is in an NVSHMEM world of ranks {facts.world}, this would be one of {list(members)}"
        if len(hosts) > 1 and facts.environment.get("NVSHMEM_REMOTE_TRANSPORT", "").lower() == "none":
            return f"NVSHMEM_REMOTE_TRANSPORT=none, but the ranks are on {len(hosts)} hosts"
        if on_gpu[facts.host, facts.gpu] == 1:
            return None
        if len(members) < job_size:
            return (
                "shares its GPU with another rank, which NVSHMEM allows for one sequence-parallel group of a job only"
            )
        if facts.environment.get("NVSHMEM_DISABLE_NVLS") != "1":
            return "shares its GPU with another rank, which needs NVSHMEM_DISABLE_NVLS=1"
        return None

    return [together(facts) for facts in ranks]


def unavailable() -> str | None:
    """Why this process cannot use it, whatever its peers can; None where it can. Local."""
    return refusal(look())


def cautions(variables: Mapping[str, str], efa: bool = False) -> dict[str, str]:
    """What of the environment is likely to fail or to be slow, by variable; ``efa``: with AWS's network cards. Pure.
    Source: NVSHMEM's environment variables and release notes (3.3.24 for EFA).
    """
    found = {}
    remote = variables.get("NVSHMEM_REMOTE_TRANSPORT", "ibrc").lower()
    provider = variables.get("NVSHMEM_LIBFABRIC_PROVIDER", "")
    if efa and remote != "libfabric":
        found["NVSHMEM_REMOTE_TRANSPORT"] = "EFA cards are here: set it to libfabric for more than one machine"
    if remote == "libfabric" and provider != "efa" and (efa or provider != provider.lower()):
        found["NVSHMEM_LIBFABRIC_PROVIDER"] = "must be efa on EFA, in lower case"
    if remote == "libfabric" and provider == "efa" and variables.get("FI_EFA_ENABLE_SHM_TRANSFER") != "0":
        found["FI_EFA_ENABLE_SHM_TRANSFER"] = "must be 0 for NVSHMEM over EFA"
    for name, own in _AS_NCCL.items():
        if name in variables and not any(other in variables for other in own):
            found[name] = f"={variables[name]} is NCCL's alone: set {' or '.join(own)} alike"
    if variables.get("NVSHMEM_DISABLE_CUDA_VMM") == "1" and "NVSHMEM_SYMMETRIC_SIZE" not in variables:
        found["NVSHMEM_SYMMETRIC_SIZE"] = "is 1 GiB where NVSHMEM_DISABLE_CUDA_VMM=1: set it to hold three windows"
    if variables.get("NVSHMEM_BYPASS_FLUSH") == "1":
        found["NVSHMEM_BYPASS_FLUSH"] = "=1 makes waits fail on GPUs that cannot flush remote writes: unset it"
    return found


def has_efa() -> bool:
    """Whether this machine has AWS's network cards. Local."""
    cards = Path("/sys/class/infiniband").glob("*/device/driver")
    return any(driver.resolve().name == "efa" for driver in cards)


def exchange_unique_id(control: ControlPlane, members: Sequence[int], position: int) -> Any:
    """The id of a new world, made at position 0, which has to stay alive. Collective; TransportError on every rank."""
    import nvshmem.core as core

    made, refused = "", None
    if position == 0:
        try:
            made = core.get_unique_id()._data.tobytes().hex()
        except Exception as error:
            refused = f"no unique id: {error}"
    said = control.gather("nvshmem unique id", [made, refused])
    raise_if_unavailable("nvshmem", members, [text for _, text in said])
    received = torch.frombuffer(bytearray.fromhex(said[0][0]), dtype=torch.uint8)
    unique_id = core.get_unique_id(empty=True)
    unique_id._data.view("uint8")[...] = received.numpy().reshape(unique_id._data.view("uint8").shape)
    return unique_id


def finalize() -> None:
    """End this process's NVSHMEM world, if it is in one of ours and none of its windows is open any more. Collective
    over the group; hangs if a member does not come, so not for a job that fails. Nobody has to call it."""
    global _world
    if _world is None or _open:
        return
    import nvshmem.core as core

    if int(core.init_status()) >= _INITIALIZED:
        torch.cuda.synchronize()
        core.finalize()
    _world = None


_world: list[int] | None = None  # the members of this process's world
_open: list[Nvshmem] = []  # another mesh of the same members may use it, too


class Nvshmem(DeviceWindow):
    """As ``DeviceWindow``; ``members`` are the world, and a position is a PE. Memory stays in NVSHMEM's heap."""

    name = "nvshmem"

    def __init__(
        self, control: ControlPlane, members: Sequence[int], position: int, peers: Sequence[int], timeout_s: float
    ) -> None:
        self._not_captured()
        self._status, self._sharing = _join(control, members, position)
        self._maps: dict[int, bool] = {}
        self._heap: torch.Tensor | None = None
        from nvshmem import bindings

        self._bindings = bindings
        super().__init__(control, members, position, peers, timeout_s)
        _open.append(self)

    def close(self) -> None:
        super().close()
        if self in _open:
            _open.remove(self)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        import nvshmem.core as core

        heap: torch.Tensor = core.tensor((nbytes,), dtype=torch.uint8)
        self._heap = heap
        self._maps = {peer: bool(self._bindings.ptr(heap.data_ptr(), peer)) for peer in self._reachable}
        far = [self._members[peer] for peer in self._peers if not self._maps[peer]]
        if self._status == _LIMITED and far:
            raise RuntimeError(f"ranks {far} are not mapped, and NVSHMEM cannot wait for them where GPUs are shared")
        return heap

    def _free(self) -> None:
        import nvshmem.core as core

        core.free_tensor(self._heap)
        self._heap = None

    def _footprint(self, nbytes: int, going: int) -> int:
        """What goes may leave a hole in the heap that is too small."""
        return -(-nbytes // _HEAP_GRAIN) * _HEAP_GRAIN

    @property
    def _reachable(self) -> Sequence[int]:
        return [peer for peer in range(len(self._members)) if peer != self._position]

    def _mapped(self, peer: int) -> bool:
        return self._maps[peer]

    def _put(self, peer: int, offset: int, source: int, nbytes: int, stream: int) -> None:
        self._bindings.putmem_on_stream(self._base + offset, source, nbytes, peer, stream)

    def _put_and_raise(
        self, peer: int, offset: int, source: int, nbytes: int, flag: int, value: int, stream: int
    ) -> None:
        signal = self._base + flag
        if nbytes:
            self._bindings.putmem_signal_on_stream(
                self._base + offset, source, nbytes, signal, value, _SET, peer, stream
            )
        else:
            self._bindings.signal_op_on_stream(signal, value, _SET, peer, stream)

    def _wait(self, peer: int, address: int, value: int, stream: int) -> None:
        if self._maps[peer]:
            self._driver.wait_64(address, value, stream)
        else:
            self._bindings.signal_wait_until_on_stream(address, _EQUAL, value, stream)


def _join(control: ControlPlane, members: Sequence[int], position: int) -> tuple[int, int]:
    """Start NVSHMEM as the world of ``members``, unless it has been; its status, and how many of them are on this GPU.
    Collective; TransportError on every rank where it cannot."""
    global _world
    facts = asdict(look())
    if facts["gpus"]:
        device = torch.cuda.current_device()
        torch.zeros(1, device=device)  # a CUDA context has to be current: without one NVSHMEM starts by halves
        facts["gpu"] = gpu_name(device)
    ranks = [Facts(**said) for said in control.gather("nvshmem", facts)]
    raise_if_unavailable("nvshmem", members, refusals(ranks, members, dist.get_world_size()))

    import nvshmem.core as core

    if _world is None:
        unique_id = exchange_unique_id(control, members, position)
        failed = None
        try:
            core.init(
                device=_current_device(),
                uid=unique_id,
                rank=position,
                nranks=len(members),
                initializer_method="uid",
            )
        except Exception as error:
            failed = f"NVSHMEM did not start: {error}"
        status = int(core.init_status())
        if failed is None and status < _INITIALIZED:  # it says so on stderr only
            failed = f"NVSHMEM started by halves (status {status}); NVSHMEM_DEBUG=INFO tells why, on stderr"
        raise_if_unavailable("nvshmem", members, control.gather("nvshmem started", failed))
        if (core.my_pe(), core.n_pes()) != (position, len(members)):
            raise TransportError(f"NVSHMEM made this rank PE {core.my_pe()}, not {position}")
        _world = list(members)
    mine = ranks[position]
    return int(core.init_status()), sum((facts.host, facts.gpu) == (mine.host, mine.gpu) for facts in ranks)


def _current_device() -> Any:
    try:
        from cuda.core import Device
    except ImportError:
        from cuda.core.experimental import Device
    device = Device(torch.cuda.current_device())
    device.set_current()
    return device


def _bindings() -> dict[str, str]:
    found = {}
    for flavour in ("cu12", "cu13"):
        try:
            found[flavour] = importlib.metadata.version(f"nvshmem4py-{flavour}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:3])
