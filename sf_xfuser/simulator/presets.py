"""Available hardware as ``cluster.Cluster``. ``sources`` names the source of every figure.

[spec]: the vendor's data sheet. [measured]: a published measurement. [fit]: the fit of p4de to the paper's ablation
(docs/simulator.md, ``python -m sf_xfuser.bench.ablation``). [assumed]: an order-of-magnitude guess; replace it with a
measurement (``--cluster-file``). We measured none of these figures: no GPU has run this package.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sf_xfuser.simulator.cluster import PATTERNS, Cluster, Compute, LinkSpec, PatternCost

# NCCL kernels need SMs. They wait for the end of an attention call that occupies them all: PyTorch gives NCCL's streams
# no priority, and an event separates the copy from the collective, so attention is queued first.
_NVLINK_NCCL = PatternCost(efficiency=0.75, start_us=20, compute_share=0.2, needs_sms=True)
_NVLINK_PUT = PatternCost(efficiency=0.8, start_us=3, message_us=2)
_PCIE_NCCL = PatternCost(efficiency=0.7, start_us=25, compute_share=0.1, needs_sms=True)
_EFA_NCCL = PatternCost(efficiency=0.93, start_us=190, message_us=10, compute_share=0.34, needs_sms=True)
_EFA_PUT = PatternCost(efficiency=0.9, start_us=5, message_us=75)
_IB_NCCL = PatternCost(efficiency=0.92, start_us=60, message_us=4, compute_share=0.2, needs_sms=True)
_IB_PUT = PatternCost(efficiency=0.9, start_us=5, message_us=6)
_TCP_NCCL = PatternCost(efficiency=0.85, start_us=120, message_us=20, compute_share=0.1, needs_sms=True)


def _link(nccl: PatternCost, put: PatternCost, **rates: Any) -> LinkSpec:
    costs = (("put", 2, put), *((name, 2, nccl) for name in PATTERNS if name != "put"))
    return LinkSpec(costs=costs, **rates)


_A100 = Compute(
    attention_tflops=(("bfloat16", 128, 200.0), ("bfloat16", 64, 176.0)),
    linear_tflops=200.0,
    memory_gbs=1300.0,
    attend_us=10.0,
    launch_us=10.0,
    num_sms=108,
)
_H100 = Compute(
    attention_tflops=(("bfloat16", 128, 600.0), ("bfloat16", 64, 450.0)),
    linear_tflops=600.0,
    memory_gbs=2800.0,
    attend_us=10.0,
    launch_us=10.0,
    num_sms=132,
)
_B200 = Compute(
    attention_tflops=(("bfloat16", 128, 1400.0), ("bfloat16", 64, 900.0)),
    linear_tflops=1500.0,
    memory_gbs=6500.0,
    attend_us=10.0,
    launch_us=10.0,
    num_sms=148,
)
_L40S = Compute(
    attention_tflops=(("bfloat16", 128, 180.0), ("bfloat16", 64, 160.0)),
    linear_tflops=220.0,
    memory_gbs=720.0,
    attend_us=10.0,
    launch_us=10.0,
    num_sms=142,
)

_FA2 = (
    "attention: FlashAttention-2 on A100, forward, not causal, 16k tokens: about 200 TFLOP/s (D=128) and 176 (D=64) "
    "[measured: arXiv 2307.08691, its figure of forward speed]"
)
_FA3 = (
    "attention: cuDNN and FlashAttention-3 on H100, forward, not causal, 16k tokens: 595 and 648 TFLOP/s (D=128), 400 "
    "to 500 (D=64) [measured: arXiv 2407.08608, its figures of forward speed]"
)
_COMMON = (
    "matrix products: about 65 % of the data sheet's dense bf16 peak; memory: about 85 % of the data sheet [assumed]",
    "attend_us, launch_us, NVLink's efficiency and start, NCCL's share of SMs inside machines [assumed]",
)
_EFA = "EFA: NCCL's and NVSHMEM's efficiency, start, cost per message, share of SMs [fit]"

_ALL = (
    Cluster(
        name="p4de",
        num_machines=4,
        ranks_per_machine=8,
        compute=_A100,
        inside=_link(_NVLINK_NCCL, _NVLINK_PUT, rank_gbps=2400, latency_us=2),
        across=_link(_EFA_NCCL, _EFA_PUT, rank_gbps=100, machine_gbps=400, nics=4, latency_us=15),
        sources=(
            "AWS p4d and p4de: 8 A100 (40 GB and 80 GB), NVSwitch 600 GB/s, 4 EFA cards of 100 Gbit/s [spec: AWS, P4 "
            "instances]. The paper ran p4de.24xlarge with A100-40GB, which is p4d; the rates are those of 40 GB",
            _FA2,
            "A100-40GB: 108 SMs, 1555 GB/s, 312 TFLOP/s dense [spec: NVIDIA A100 data sheet]",
            "EFA latency 15 us one way [measured: AWS, second generation of EFA: 15 to 20 us]",
            _EFA,
            *_COMMON,
        ),
    ),
    Cluster(
        name="p5",
        num_machines=4,
        ranks_per_machine=8,
        compute=_H100,
        inside=_link(_NVLINK_NCCL, _NVLINK_PUT, rank_gbps=3600, latency_us=2),
        across=_link(_EFA_NCCL, _EFA_PUT, rank_gbps=400, machine_gbps=3200, nics=8, latency_us=15),
        sources=(
            "AWS p5.48xlarge: 8 H100, NVSwitch 900 GB/s, 32 EFA cards of 100 Gbit/s, 4 for each GPU (counted as one of "
            "400) [spec: AWS, P5 instances]",
            _FA3,
            "H100 SXM: 132 SMs, 3350 GB/s, 989 TFLOP/s dense [spec: NVIDIA H100 data sheet]",
            f"{_EFA}, on p4de; here [assumed] the same",
            *_COMMON,
        ),
    ),
    Cluster(
        name="p5en",
        num_machines=4,
        ranks_per_machine=8,
        compute=replace(_H100, memory_gbs=4000.0),
        inside=_link(_NVLINK_NCCL, _NVLINK_PUT, rank_gbps=3600, latency_us=2),
        across=_link(_EFA_NCCL, _EFA_PUT, rank_gbps=400, machine_gbps=3200, nics=8, latency_us=10),
        sources=(
            "AWS p5en.48xlarge: 8 H200, NVSwitch 900 GB/s, 16 EFAv3 cards of 200 Gbit/s, 2 for each GPU (counted as "
            "one of 400), latency up to 35 % below p5's [spec: AWS, P5 instances]",
            _FA3,
            "H200: 132 SMs, 4800 GB/s, 989 TFLOP/s dense [spec: NVIDIA H200 data sheet]",
            f"{_EFA}, on p4de; here [assumed] the same. NVSHMEM ring transfers were 2.7 to 3.8 times slower than "
            "NCCL's on this machine [measured: NVSHMEM issue 87], which these figures do not show",
            *_COMMON,
        ),
    ),
    Cluster(
        name="dgx-h100",
        num_machines=4,
        ranks_per_machine=8,
        compute=_H100,
        inside=_link(_NVLINK_NCCL, _NVLINK_PUT, rank_gbps=3600, latency_us=2),
        across=_link(_IB_NCCL, _IB_PUT, rank_gbps=400, machine_gbps=3200, nics=8, latency_us=3),
        sources=(
            "DGX H100: 8 H100, NVSwitch 900 GB/s, 8 ConnectX-7 of 400 Gbit/s InfiniBand, one for each GPU [spec: "
            "NVIDIA DGX H100 data sheet]",
            _FA3,
            "H100 SXM: 132 SMs, 3350 GB/s, 989 TFLOP/s dense [spec: NVIDIA H100 data sheet]",
            "InfiniBand: efficiency, start, cost per message, share of SMs [assumed]",
            *_COMMON,
        ),
    ),
    Cluster(
        name="gb200-nvl72",
        num_machines=2,
        ranks_per_machine=72,
        compute=_B200,
        inside=_link(_NVLINK_NCCL, _NVLINK_PUT, rank_gbps=7200, latency_us=2),
        across=_link(_IB_NCCL, _IB_PUT, rank_gbps=400, latency_us=3),
        sources=(
            "GB200 NVL72: a machine is an NVLink domain of up to 72 GPUs, 1.8 TB/s each, in both directions together; "
            "between domains one ConnectX-7 of 400 Gbit/s for each GPU [spec: NVIDIA GB200 NVL72]",
            "attention: cuDNN and FlashAttention-4 on B200, forward, D=128: 1300 to 1600 TFLOP/s [measured: published "
            "figures of FlashAttention-4]; D=64 [assumed]",
            "B200: 148 SMs, 8000 GB/s, 2250 TFLOP/s dense [spec: NVIDIA Blackwell]",
            "InfiniBand: efficiency, start, cost per message, share of SMs [assumed]",
            *_COMMON,
        ),
    ),
    Cluster(
        name="l40s-100g",
        num_machines=2,
        ranks_per_machine=8,
        compute=_L40S,
        inside=_link(_PCIE_NCCL, _NVLINK_PUT, rank_gbps=256, latency_us=5),
        across=_link(_TCP_NCCL, _IB_PUT, rank_gbps=100, machine_gbps=100, latency_us=10),
        sources=(
            "8 L40S on PCIe 4.0 x16: 32 GB/s per direction and GPU [spec: NVIDIA L40S data sheet]; bandwidth that GPUs "
            "share of a host bridge is not counted [assumed]",
            "one card of 100 Gbit/s Ethernet for each machine [as named]; efficiency, start, cost per message, and "
            "that one-sided transfers have RoCE [assumed]",
            "attention: half of the 362 TFLOP/s dense [assumed]; 142 SMs, 864 GB/s [spec: NVIDIA L40S]",
            *_COMMON,
        ),
    ),
)
PRESETS = {cluster.name: cluster for cluster in _ALL}


def preset(name: str) -> Cluster:
    """Raises ValueError naming the presets."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
