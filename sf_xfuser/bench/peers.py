"""Sequence parallelism of other packages as variants of the attention benchmark, each through its own public code.

``PEERS`` has one record for each. ``reason`` probes whether a peer can run a case and says why not; ``open_peer``
creates its groups and returns its call. All ranks come to the same answer.

A call takes and returns this rank's [B,H,S,D]: B batch, H all heads, S tokens of this rank, D head size. Ranks are
placed as in xDiT: consecutive ranks share a Ulysses group, so Ulysses stays inside machines where Ring is used too.

Importing this module imports no peer.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import gcd
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sf_xfuser.bench.case import Case
from sf_xfuser.integrations.xdit.cpu_platform import flash_attention
from sf_xfuser.layout.usp_layouts import XditConfig

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

ALL = "all"
#: Package of ``--against`` -> the module that it imports; the first NCCL with an all-to-all that uses no SM.
PACKAGES = {"diffusers": "diffusers", "yunchang": "yunchang", "para-attn": "para_attn", "torch": "torch",
            "nccl": "torch"}  # fmt: skip
_ZERO_SM_NCCL = (2, 30, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """``split``: over how much of the ranks Ulysses goes (all, a machine, none). ``uneven``: whether token and head
    counts need not divide. ``needs``: why it cannot run on this device, if so. ``open(case, degrees, **options)``: its
    call; collective."""

    name: str
    description: str
    package: str
    split: Literal["ulysses", "unified", "ring"]
    open: Callable[..., Call]
    options: Mapping[str, Any] = field(default_factory=dict)
    uneven: bool = False
    needs: Callable[[], str | None] = lambda: None


def names_of(packages: Sequence[str]) -> tuple[str, ...]:
    """The variants of these packages, ``all`` for every package. Raises ValueError for an unknown one."""
    for package in packages:
        if package not in (*PACKAGES, ALL):
            raise ValueError(f"--against: unknown package {package!r}; choose from {', '.join((*PACKAGES, ALL))}")
    return tuple(peer.name for peer in PEERS if ALL in packages or peer.package in packages)


def degrees(peer: Peer, case: Case) -> XditConfig:
    """The degrees that a user of the peer would choose for the case."""
    w = case.world_size
    ulysses = {"ulysses": w, "unified": gcd(case.ranks_per_machine, case.heads), "ring": 1}[peer.split]
    return XditConfig(ulysses_degree=ulysses, ring_degree=w // ulysses)


def reason(peer: Peer, case: Case) -> str | None:
    """Why the peer cannot run the case on this device; None if it can. Local, never raises."""
    config, w = degrees(peer, case), case.world_size
    if importlib.util.find_spec(PACKAGES[peer.package]) is None:
        return f"{peer.package} is not installed"
    if (missing := peer.needs()) is not None:
        return missing
    if case.kv_heads not in (None, case.heads):
        return "needs as many key heads as query heads"
    if w == 1:
        return "needs at least 2 ranks"
    if peer.split == "unified" and 1 in (config.ulysses_degree, config.ring_degree):
        same = "ulysses" if config.ring_degree == 1 else "ring"
        return f"with ulysses={config.ulysses_degree} it equals {peer.name.replace('unified', same)}"
    if case.seq_len % w and not peer.uneven:
        return f"needs equal token counts; {case.seq_len} tokens cannot be split over {w} ranks"
    if rest := case.heads % config.ulysses_degree:
        padding, per_rank = config.ulysses_degree - rest, case.heads // config.ulysses_degree + 1
        if not peer.uneven:
            return f"{case.heads} heads cannot be split over {config.ulysses_degree} ranks"
        if padding >= per_rank:
            return f"{case.heads} heads on {w} ranks: {padding} heads of padding exceed the {per_rank} of a rank"
    return None


def open_peer(peer: Peer, case: Case) -> tuple[Call | None, str]:
    """The peer's call, or None and the reason. Collective over the world."""
    if (why := reason(peer, case)) is not None:
        return None, why
    try:
        return peer.open(case, degrees(peer, case), **peer.options), ""
    except Exception as error:  # code of another package, in a version that nobody tested here
        return None, f"{type(error).__name__}: {error}"


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _mesh(config: XditConfig) -> DeviceMesh:
    """(ring, ulysses), row by row, with the names that diffusers and ParaAttention ask for."""
    shape = config.ring_degree, config.ulysses_degree
    return init_device_mesh(_device().type, shape, mesh_dim_names=("ring", "ulysses"))


@functools.cache
def _register_flash_for_cpu() -> torch.library.Library | None:
    """Give ``aten::_scaled_dot_product_flash_attention`` a CPU kernel for this process, if it has none.

    The rings of diffusers, yunchang and PyTorch call this operator; PyTorch names the same kernel for a CPU
    ``..._for_cpu``. Returns what keeps the registration.
    """
    operator = "_scaled_dot_product_flash_attention"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", "CPU"):
        return None

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        return_debug_mask: bool = False, *, scale: float | None = None,
    ) -> Any:  # fmt: skip
        out, lse = flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
        unused = [query.new_empty((), dtype=torch.int64) for _ in range(5)]  # DTensor takes scalars only
        return out, lse, *unused[:2], query.shape[2], key.shape[2], *unused[2:]

    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl(operator, kernel, "CPU")
    kept: torch.library.Library = library
    return kept


# -- diffusers: ContextParallelConfig ----------------------------------------------------------------------------------


def parallelize(transformer: Any, peer: Peer, config: XditConfig) -> Any:
    """A copy of a diffusers model that shares its weights, under diffusers' context parallelism. Collective.

    Raises diffusers' error, such as ValueError for a model without a ``_cp_plan``.
    """
    shared = {id(tensor): tensor for tensor in (*transformer.parameters(), *transformer.buffers())}
    model = copy.deepcopy(transformer, shared)
    model.set_attention_backend(_backend(config))
    with _counting_the_cpu():
        model.enable_parallelism(config=_context_parallel(config, **peer.options))
    return model


@contextmanager
def _counting_the_cpu() -> Iterator[None]:
    """diffusers takes a rank modulo the number of accelerators, of which a CPU rank has none."""
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: count() or 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count


def _backend(config: XditConfig) -> str:
    """A ring needs the log-sum-exp, which diffusers' default backend has not."""
    if config.ring_degree == 1:
        return "native"
    _register_flash_for_cpu()
    return "_native_flash"


def _context_parallel(config: XditConfig, **options: bool) -> Any:
    diffusers: Any = importlib.import_module("diffusers")
    degrees = {"ulysses_degree": config.ulysses_degree, "ring_degree": config.ring_degree}
    return diffusers.ContextParallelConfig(**degrees, **options)


def _diffusers(case: Case, config: XditConfig, **options: bool) -> Call:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    diffusers: Any = importlib.import_module("diffusers")
    parallel = diffusers.ParallelConfig(context_parallel_config=_context_parallel(config, **options))
    parallel.setup(dist.get_rank(), case.world_size, _device(), mesh=_mesh(config))
    backend: Any = _backend(config)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return dispatch_attention_fn(q, k, v, backend=backend, parallel_config=parallel).transpose(1, 2)

    return call


# -- yunchang ----------------------------------------------------------------------------------------------------------


def _yunchang(case: Case, config: XditConfig) -> Call:
    import yunchang
    from yunchang.globals import HAS_FLASH_ATTN, PROCESS_GROUP
    from yunchang.kernels import AttnType

    _register_flash_for_cpu()
    kept = dict(vars(PROCESS_GROUP))  # xDiT's USP reads its groups here
    yunchang.set_seq_parallel_pg(config.ulysses_degree, config.ring_degree, dist.get_rank(), case.world_size)
    flash = HAS_FLASH_ATTN and torch.cuda.is_available()
    layer = yunchang.LongContextAttention(attn_type=AttnType.FA if flash else AttnType.TORCH_FLASH)
    vars(PROCESS_GROUP).update(kept)
    return _layer(layer)


def _yunchang_ulysses_attention(case: Case, config: XditConfig) -> Call:
    import yunchang

    return _layer(yunchang.UlyssesAttention(dist.group.WORLD))


def _layer(layer: torch.nn.Module) -> Call:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = layer(*(x.transpose(1, 2) for x in (query, key, value)))
        return out.transpose(1, 2)

    return call


def _no_flash_attn() -> str | None:
    if torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None:
        return None
    # With AttnType.TORCH_*, UlyssesAttention runs a ring over the default group after its all-to-all, which adds keys
    # of other heads.
    return "UlyssesAttention needs flash-attn on a GPU; with PyTorch's attention its result is wrong"


# -- ParaAttention -----------------------------------------------------------------------------------------------------


def _para_attn(case: Case, config: XditConfig) -> Call:
    from para_attn import UnifiedAttnMode

    mesh = _mesh(config)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with UnifiedAttnMode(mesh):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    return call


def _no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "ParaAttention's ring calls CUDA kernels only"


# -- PyTorch's context parallel ----------------------------------------------------------------------------------------


def _torch(case: Case, config: XditConfig, rotation: str) -> Call:
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options, set_rotate_method

    mesh = init_device_mesh(_device().type, (case.world_size,))
    # context_parallel() splits whole buffers and needs at least one; the tensors of a case are split already.
    buffer = torch.zeros(case.world_size, device=_device())
    if not torch.cuda.is_available():
        _register_flash_for_cpu()

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_available():
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)
        # On CPUs scaled_dot_product_attention calls an operator that context_parallel() does not know; this is the one
        # that it calls on GPUs.
        split = [DTensor.from_local(x, mesh, [Shard(2)], run_check=False) for x in (query, key, value)]
        out: DTensor = torch.ops.aten._scaled_dot_product_flash_attention(*split)[0]
        return out.to_local()

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        kept = dict(vars(_cp_options))  # xDiT's rings read them too
        try:
            set_rotate_method(rotation)
            _cp_options.enable_load_balance = False  # it is for causal attention only
            with context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0]):
                return attend(query, key, value)
        finally:
            vars(_cp_options).update(kept)

    return call


# -- NCCL's all-to-all without SMs -------------------------------------------------------------------------------------


def _zero_sm(case: Case, config: XditConfig) -> Call:
    """Ulysses over a group with NCCL's zero-CTA policy, in registered symmetric memory as that policy asks for."""
    options: Any = dist.ProcessGroupNCCL.Options()
    options.config.cta_policy = dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO  # type: ignore[attr-defined]
    group = dist.new_group(backend="nccl", pg_options=options)
    dist.barrier(group)  # connects, which the registration needs
    backend: Any = group._get_backend(_device())
    pool = torch.cuda.MemPool(backend.mem_allocator)
    with torch.cuda.use_mem_pool(pool):
        call = ulysses(group, case, _device())
    backend.register_mem_pool(pool, True)
    return call


def ulysses(group: dist.ProcessGroup, case: Case, device: torch.device) -> Call:
    """Ulysses with one ``all_to_all_single`` in, of Q, K and V, and one out. Allocates what it sends and receives now.

    Heads and tokens must divide by the ranks. The result is memory of the call: the next call overwrites it.
    """
    w = group.size()
    numel = case.batch * case.heads * (case.seq_len // w) * case.head_dim
    dtype = getattr(torch, case.dtype)
    sent, received = (torch.empty(3 * numel, dtype=dtype, device=device) for _ in range(2))

    def exchange(x: torch.Tensor) -> torch.Tensor:
        """Send ``x[r]`` to rank r; returns the parts of all ranks in their order."""
        send, receive = (flat[: x.numel()].view(x.shape) for flat in (sent, received))
        send.copy_(x)
        dist.all_to_all_single(receive, send, group=group)
        return receive

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, size = query.shape
        heads_W3BHSD = torch.stack((query, key, value)).view(3, batch, w, heads // w, tokens, size).movedim(2, 0)
        q, k, v = exchange(heads_W3BHSD).movedim(0, 3).flatten(3, 4)  # [B, H / w, all tokens, D] each
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        tokens_WBHSD = out.reshape(batch, heads // w, w, tokens, size).movedim(2, 0)
        return exchange(tokens_WBHSD).movedim(0, 1).flatten(1, 2)

    return call


def _no_zero_sm() -> str | None:
    found = torch.cuda.nccl.version() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
    if isinstance(found, tuple) and found[:3] >= _ZERO_SM_NCCL:
        return None
    needed = ".".join(map(str, _ZERO_SM_NCCL))
    return f"needs NVIDIA GPUs and NCCL {needed} or newer, found {found or 'no GPU'}"


PEERS = (
    Peer(name="diffusers-ulysses", description="diffusers, Ulysses over all ranks", package="diffusers",
         split="ulysses", open=_diffusers),
    Peer(name="diffusers-ulysses-anything", description="diffusers, Ulysses for any token and head count",
         package="diffusers", split="ulysses", uneven=True, open=_diffusers, options={"ulysses_anything": True}),
    Peer(name="diffusers-unified", description="diffusers, Ulysses inside machines and Ring across",
         package="diffusers", split="unified", open=_diffusers),
    Peer(name="diffusers-ring", description="diffusers, Ring over all ranks", package="diffusers", split="ring",
         open=_diffusers),
    Peer(name="diffusers-ring-anything", description="diffusers, Ring for any token count", package="diffusers",
         split="ring", uneven=True, open=_diffusers, options={"ring_anything": True}),
    Peer(name="yunchang-ulysses", description="yunchang, LongContextAttention with Ulysses over all ranks",
         package="yunchang", split="ulysses", open=_yunchang),
    Peer(name="yunchang-unified", description="yunchang, LongContextAttention, Ulysses inside machines and Ring across",
         package="yunchang", split="unified", open=_yunchang),
    Peer(name="yunchang-ring", description="yunchang, LongContextAttention with Ring over all ranks",
         package="yunchang", split="ring", open=_yunchang),
    Peer(name="yunchang-ulysses-attention", description="yunchang, UlyssesAttention", package="yunchang",
         split="ulysses", open=_yunchang_ulysses_attention, needs=_no_flash_attn),
    Peer(name="para-attn-ulysses", description="ParaAttention, Ulysses over all ranks", package="para-attn",
         split="ulysses", open=_para_attn),
    Peer(name="para-attn-unified", description="ParaAttention, Ulysses inside machines and Ring across",
         package="para-attn", split="unified", open=_para_attn, needs=_no_cuda),
    Peer(name="para-attn-ring", description="ParaAttention, Ring over all ranks", package="para-attn", split="ring",
         open=_para_attn, needs=_no_cuda),
    Peer(name="torch-allgather", description="PyTorch's context_parallel, which gathers KV", package="torch",
         split="ring", open=_torch, options={"rotation": "allgather"}),
    Peer(name="torch-alltoall", description="PyTorch's context_parallel, which rotates KV", package="torch",
         split="ring", open=_torch, options={"rotation": "alltoall"}),
    Peer(name="nccl-zero-sm", description="Ulysses over NCCL's all-to-all that uses no SM", package="nccl",
         split="ulysses", open=_zero_sm, needs=_no_zero_sm),
)  # fmt: skip
