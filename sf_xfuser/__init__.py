"""sf-xfuser: StreamFusion's topology-aware sequence parallelism and Torus Attention as a backend for xDiT.

Importing this package has no side effects. Once it is installed, xDiT's commands accept ``--sp-backend torus``;
``enable()`` does the same by hand. Programs without xDiT call ``torus_attention``, ``LongContextAttention`` (in place
of yunchang's) or ``parallelize`` (for diffusers models).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if not os.path.isdir(os.path.join(__path__[0], "kernels")):  # a checkout: kernels/ is beside this folder
    __path__.append(os.path.dirname(__path__[0]))

__version__ = "0.1.0"
__all__ = [
    "Joint",
    "LongContextAttention",
    "Mesh",
    "Tokens",
    "TorusArgs",
    "build_mesh",
    "disable",
    "enable",
    "explain",
    "parallelize",
    "set_seq_parallel_pg",
    "stats",
    "torus_attention",
    "tracing",
]

if TYPE_CHECKING:
    from sf_xfuser.config import TorusArgs
    from sf_xfuser.integrations.diffusers.parallelize import parallelize
    from sf_xfuser.integrations.xdit.plugin import disable, enable
    from sf_xfuser.integrations.xdit.session import explain
    from sf_xfuser.integrations.yunchang.attention import LongContextAttention, set_seq_parallel_pg
    from sf_xfuser.metrics import stats, tracing
    from sf_xfuser.torus.attention import torus_attention
    from sf_xfuser.torus.build import build_mesh
    from sf_xfuser.torus.call import Joint, Tokens
    from sf_xfuser.torus.mesh import Mesh

_MODULES = {
    "TorusArgs": "config",
    "torus_attention": "torus.attention",
    "Joint": "torus.call",
    "Tokens": "torus.call",
    "parallelize": "integrations.diffusers.parallelize",
    "LongContextAttention": "integrations.yunchang.attention",
    "set_seq_parallel_pg": "integrations.yunchang.attention",
    "Mesh": "torus.mesh",
    "build_mesh": "torus.build",
    "disable": "integrations.xdit.plugin",
    "enable": "integrations.xdit.plugin",
    "explain": "integrations.xdit.session",
    "stats": "metrics",
    "tracing": "metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
