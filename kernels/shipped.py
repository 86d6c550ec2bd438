"""Kernels as they are shipped, compiled ahead of time: what each needs of a GPU, said without one.

Each ``triton_<name>`` module lists its configurations with ``shipped()``; ``MODULES`` names those modules.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODULES = ("triton_merge", "triton_packing")
ARCHITECTURES = (80, 90, 100)
"""Compute capabilities, times 10: A100, H100, B200."""


_LOAD = r"\b(?:ld\.global|cp\.async\.c[ag]\.shared\.global)[.:\w]*?(?:\.v(\d))?\.[bfsu](\d+)\b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """One configuration of a ``@triton.jit`` function.

    ``types``: Triton's name for the type of each argument that is no int32 (``"*bf16"``); pointers are taken to be
    aligned to 16 bytes. ``constants``: the constexpr arguments. ``options``: of the launch (``num_warps``, ...).
    ``only``: architectures, where not all.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    only: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Per thread: ``registers``, and bytes spilled to memory; per program: bytes of shared memory. ``load_bits``: of
    the widest load from global memory, 128 at best; 0 where there is none but those of a copy engine (TMA)."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    load_bits: int


def all_shipped() -> list[Shipped]:
    """Those of every kernel. Needs Triton."""
    modules = [importlib.import_module(f"sf_xfuser.kernels.{name}") for name in MODULES]
    return [each for module in modules for each in module.shipped()]


def compile_for(shipped: Shipped, architecture: int) -> Usage:
    """Compile for a compute capability; no GPU is needed. Raises what Triton and its assembler raise."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    names = shipped.kernel.arg_names
    signature = {x: "constexpr" if x in shipped.constants else shipped.types.get(x, "i32") for x in names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, x in enumerate(names) if signature[x].startswith("*")}
    source = triton.compiler.ASTSource(shipped.kernel, signature, dict(shipped.constants), aligned)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=dict(shipped.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Usage(
        registers=_number(r"REG:(\d+)", said),
        spilled_bytes=_number(r"STACK:(\d+)", said) + _number(r"LOCAL:(\d+)", said),
        shared_bytes=int(compiled.metadata.shared),
        load_bits=max((int(n or 1) * int(bits) for n, bits in re.findall(_LOAD, compiled.asm["ptx"])), default=0),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the assembler does not say {pattern!r}: {text}")
    return int(found[1])
