"""One-sided transfers between NVIDIA GPUs of one or many machines: NCCL's host operations (2.29 or newer) through the
bindings of nccl4py. ``device.py`` describes the protocol.

NCCL's own plugins and variables apply, so a fabric that NCCL uses needs no further setup. Copy engines and stream
memory operations reach peers that NCCL maps, as with ``symm_mem``. ``ncclPutSignal`` reaches the others: a CPU thread
of NCCL moves the data, and no multiprocessor is used.

A flag is the data of one more put, after all puts of its round have completed on the stream, so it arrives last on
every fabric. Streams wait for this word, not for NCCL's signals, which each put also counts. In NCCL 2.30 a wait for a
signal cannot be released after the loss of a peer, holds all later puts of its communicator, and sees no signals of
captured puts. Puts of one group run at once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sf_xfuser.config import environment
from sf_xfuser.transport.base import CALL_TIMEOUT_FACTOR, TransportError, raise_if_unavailable
from sf_xfuser.transport.control_plane import ControlPlane
from sf_xfuser.transport.gpu.device import DeviceWindow
from sf_xfuser.transport.gpu.driver import Driver
from sf_xfuser.transport.gpu.facts import RankFacts, gather, has_efa, other_hosts, ranks_on_gpu, version_numbers
from sf_xfuser.transport.gpu.transfer import NetworkPut
from sf_xfuser.transport.rendezvous import run_with_timeout

_OLDEST_NCCL = 22900
_OLDEST_BINDINGS = (0, 3)  # of nccl4py, the first with one-sided operations
_IN_FLIGHT = 64  # at most: NCCL loses puts beyond 256 (NVIDIA/nccl#2119)
_CHUNKS, _NOTIFICATIONS = 0, 1  # communicators: a put waits for earlier ones, and chunks wait for a rank that is lost
_UINT8 = 1  # ncclDataType_t
_SYMMETRIC, _STRICT_ORDERING = 1, 2  # flags of ncclCommWindowRegister
_LOCK_LIMIT_S = 5.0  # time limit for another thread to enqueue its puts
_PRODUCT = Path("/sys/devices/virtual/dmi/id/product_name")
# They turn one-sided operations off:
_DISABLING = {"NCCL_CUMEM_ENABLE": "0", "NCCL_WIN_ENABLE": "0", "NCCL_RMA_DISABLE": "1", "NCCL_NUM_RMA_CTX": "0"}
_SHARED_GPU = "NCCL_MULTI_RANK_GPU_ENABLE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts(RankFacts):
    """Capabilities of one rank, gathered by all.

    ``bindings``: version of nccl4py. ``library``: version of the loaded NCCL, such as 23007 for 2.30.7. ``efa``: the
    machine has AWS EFA cards. ``product``: name of the machine's type.
    """

    bindings: str = ""
    library: int = 0
    efa: bool = False
    product: str = ""


def probe() -> Facts:
    """Probe this process. Local; never raises, creates no CUDA context."""
    facts: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count(),
        "host": socket.gethostname(),
        "environment": environment((*_DISABLING, _SHARED_GPU)),
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        facts["bindings"] = importlib.metadata.version("nccl4py")
    if not facts["gpus"] or not facts["bindings"]:
        return Facts(**facts)
    try:
        from nccl.bindings import nccl

        facts |= Driver().facts()
        facts["library"] = int(nccl.get_version())
        facts["efa"] = has_efa()
        facts["product"] = _PRODUCT.read_text().strip() if _PRODUCT.exists() else ""
    except Exception as error:
        facts["problem"] = f"{type(error).__name__}: {error}"
    return Facts(**facts)


def unsupported_reason(facts: Facts) -> str | None:
    """Why a process with these facts cannot use ``nccl_put``, regardless of its peers, or None. Pure."""
    if reason := facts.no_gpu_reason():
        return reason
    if not facts.bindings:
        return "nccl4py is not installed: pip install 'sf-xfuser[nccl]'"
    if version_numbers(facts.bindings) < _OLDEST_BINDINGS:
        return f"nccl4py {facts.bindings} is too old: pip install 'sf-xfuser[nccl]'"
    if facts.problem:
        return f"NCCL cannot be used: {facts.problem}"
    if facts.library < _OLDEST_NCCL:
        loaded = f"{facts.library // 10000}.{facts.library // 100 % 100}.{facts.library % 100}"
        return f"NCCL {loaded} is loaded, one-sided operations need 2.29: use a newer PyTorch, or two_sided"
    if reason := facts.old_driver_reason():
        return reason
    for name, value in _DISABLING.items():
        if facts.environment.get(name) == value:
            return f"{name}={value} turns off NCCL's one-sided operations: unset it"
    return None


def group_unsupported_reasons(ranks: Sequence[Facts]) -> list[str | None]:
    """For each rank of a group, why the group cannot use ``nccl_put``, or None. Pure."""
    own_reasons = [unsupported_reason(facts) for facts in ranks]
    if any(own_reasons):
        return own_reasons
    hosts = {facts.host for facts in ranks}
    on_gpu = Counter((facts.host, facts.gpu) for facts in ranks)
    libraries = {facts.library for facts in ranks}

    def reason(facts: Facts) -> str | None:
        if len(libraries) > 1:
            return f"has NCCL {facts.library}, but other ranks have a different version"
        if on_gpu[facts.host, facts.gpu] > 1 and facts.environment.get(_SHARED_GPU) != "1":
            return f"shares its GPU with another rank, which NCCL allows with {_SHARED_GPU}=1 only"
        if len(hosts) > 1 and facts.efa and facts.product.startswith("p4d"):  # also p4de
            return f"AWS's NCCL plugin has no one-sided operations on {facts.product}: use two_sided or nvshmem"
        return None

    return [reason(facts) for facts in ranks]


def unavailable() -> str | None:
    """Why this process cannot use ``nccl_put``, regardless of its peers, or None. Local."""
    return unsupported_reason(probe())


class NcclPut(DeviceWindow):
    """As ``DeviceWindow``. A position is a rank of the communicator."""

    name = "nccl_put"

    def __init__(
        self, control: ControlPlane, members: Sequence[int], position: int, peers: Sequence[int], timeout_s: float
    ) -> None:
        self._require_no_capture()
        self._communicators, self._nccl, ranks = _connect(control, members, position, timeout_s)
        self._ranks_on_gpu, self.other_hosts = ranks_on_gpu(ranks, position), other_hosts(ranks, position)
        self._windows, self._allocated = list[Any](), 0  # NCCL's handles and the address of the block
        self._lock = threading.Lock()  # a communicator serves one thread at a time
        super().__init__(control, members, position, peers, timeout_s)
        self.wait_flags = self.driver.flush_flag(self.device)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        nccl = self._nccl
        self._allocated = nccl.mem_alloc(nbytes)
        for communicator in self._communicators:  # Strict: else a flag could pass chunks on the receiver's PCIe bus.
            window = nccl.comm_window_register(communicator, self._allocated, nbytes, _SYMMETRIC | _STRICT_ORDERING)
            if not window:
                raise RuntimeError("NCCL has not registered the window")
            self._windows.append(window)
        addresses = {peer: nccl.get_peer_device_pointer(self._windows[0], 0, peer) for peer in self._reachable}
        self._address = {peer: address for peer, address in addresses.items() if address}
        return torch.as_tensor(_Bytes(self._allocated, nbytes), device=torch.device("cuda", self.device))

    def _free(self) -> None:
        for communicator, window in zip(self._communicators, self._windows, strict=False):
            self._nccl.comm_window_deregister(communicator, window)
        if self._allocated:
            self._nccl.mem_free(self._allocated)
        self._windows, self._allocated = [], 0
        if self._closed:
            end = self._nccl.comm_destroy if self._watchdog.error is None else self._nccl.comm_abort
            for communicator in self._communicators:
                end(communicator)

    def sees_flags(self, peer: int) -> bool:
        """As ``DeviceWindow.sees_flags``: also flags of unmapped peers are plain words."""
        return True

    def record_network(self, puts: Sequence[NetworkPut]) -> tuple[Callable[[], None], int]:
        """As ``DeviceWindow.record_network``: all chunks, then all flags."""
        bind = partial(self._bind, _CHUNKS, self.streams.network)
        chunks = [bind(put.peer, *chunk) for put in puts for chunk in put.chunks]
        flags = [bind(put.peer, put.flag, self.expected_address, 8) for put in puts]
        groups = [part[at : at + _IN_FLIGHT] for part in (chunks, flags) for at in range(0, len(part), _IN_FLIGHT)]
        return partial(self._put_groups, groups), len(groups)

    def _put(self, peer: int, offset: int, source: int, nbytes: int, stream: int) -> None:
        self._put_groups([[self._bind(_NOTIFICATIONS, stream, peer, offset, source, nbytes)]])

    def _bind(self, n: int, stream: int, peer: int, offset: int, source: int, nbytes: int) -> Callable[[], None]:
        where = peer, self._windows[n], offset, 0, 0, 0, self._communicators[n], stream
        return partial(self._nccl.put_signal, source, nbytes, _UINT8, *where)

    def _put_groups(self, groups: Sequence[Sequence[Callable[[], None]]]) -> None:
        """Enqueue groups of puts. Those of a group complete in any order, before later work of the stream."""
        if not self._lock.acquire(timeout=_LOCK_LIMIT_S):
            raise TransportError("another thread does not return from NCCL")
        try:
            for group in groups:
                self._nccl.group_start()
                try:
                    for put in group:
                        put()
                finally:
                    self._nccl.group_end()
        finally:
            self._lock.release()


def _connect(
    control: ControlPlane, members: Sequence[int], position: int, timeout_s: float
) -> tuple[list[Any], Any, list[Facts]]:
    """Two communicators of the group, nccl4py's bindings, and the facts of all ranks. Collective; raises TransportError
    on every rank."""
    ranks = gather(control, "nccl_put", probe())
    raise_if_unavailable("nccl_put", members, group_unsupported_reasons(ranks))
    device = torch.cuda.current_device()

    from nccl.bindings import nccl

    ids = [bytes(nccl.get_unique_id()).hex() for _ in (_CHUNKS, _NOTIFICATIONS)] if position == 0 else []
    (ids, *_) = control.gather("nccl_put unique ids", ids)
    communicators, problem = list[Any](), None

    def connect() -> None:
        torch.cuda.set_device(device)
        unique_ids = [nccl.UniqueId.from_buffer(bytes.fromhex(each)) for each in ids]
        communicators.extend(nccl.comm_init_rank(len(members), each, position) for each in unique_ids)

    try:
        run_with_timeout(connect, CALL_TIMEOUT_FACTOR * timeout_s, "connecting NCCL", "a rank did not")
        if not nccl.comm_query_properties(communicators[0]).host_rma_support:
            problem = (
                "NCCL has no one-sided operations between these ranks: they need peer-to-peer access between the GPUs "
                "of a host, GPUDirect RDMA, and network cards that all reach each other (not a rail-only fabric)"
            )
    except Exception as error:
        problem = f"NCCL did not connect: {error}"
    problems = control.gather("nccl_put connected", problem)
    for communicator in communicators if any(problems) else ():
        nccl.comm_abort(communicator)
    raise_if_unavailable("nccl_put", members, problems)
    return communicators, nccl, ranks


class _Bytes:
    """Memory of NCCL, for ``torch.as_tensor``, which does not own it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}
