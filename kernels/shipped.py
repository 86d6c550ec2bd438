"""Compiles the shipped kernel configurations ahead of time and reports their resource usage, without a GPU.

Each module in ``MODULES`` lists its configurations with ``shipped()``.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODULES = ("triton_merge", "triton_copies", "triton_packing", "triton_flags", "triton_fused")
ARCHITECTURES = (80, 90, 100)
"""Compute capabilities times 10: A100, H100, B200."""

_LOAD = r"\b(?:ld\.global|cp\.async\.c[ag]\.shared\.global)[.:\w]*?(?:\.v(\d))?\.[bfsu](\d+)\b"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedConfig:
    """One configuration of a ``@triton.jit`` function.

    ``types``: Triton type of each argument that is not int32, such as ``"*bf16"``. Pointers are assumed aligned to 16
    bytes. ``constants``: the constexpr arguments. ``options``: launch options such as ``num_warps``.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceUsage:
    """``registers`` and ``spilled_bytes`` per thread, ``shared_bytes`` per program. ``load_bits``: width of the widest
    load from global memory, at most 128; 0 if all loads use the copy engine (TMA)."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    load_bits: int


def all_shipped() -> list[ShippedConfig]:
    """The configurations of every kernel. Needs Triton."""
    modules = [importlib.import_module(f"sf_xfuser.kernels.{name}") for name in MODULES]
    return [config for module in modules for config in module.shipped()]


def compile_for(config: ShippedConfig, architecture: int) -> ResourceUsage:
    """Compile for a compute capability, without a GPU. Raises the errors of Triton and its assembler."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    names = config.kernel.arg_names
    signature = {x: "constexpr" if x in config.constants else config.types.get(x, "i32") for x in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(names) if signature[x].startswith("*")}
    source = triton.compiler.ASTSource(config.kernel, signature, dict(config.constants), aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=dict(config.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return ResourceUsage(
        registers=_number(r"REG:(\d+)", usage),
        spilled_bytes=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        shared_bytes=int(compiled.metadata.shared),
        load_bits=max((int(n or 1) * int(bits) for n, bits in re.findall(_LOAD, compiled.asm["ptx"])), default=0),
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"cannot find {pattern!r} in the assembler's output: {text}")
    return int(match[1])
