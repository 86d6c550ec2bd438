"""The plugin as a backend for the dispatch point that ``patches/`` adds to xDiT. It replaces most hooks.

xDiT finds :data:`backend` in the entry-point group ``xfuser.sp_backends``. Its methods and the hooks of ``plugin`` call
the same functions of ``session``. xDiT documents the methods (``xfuser/core/distributed/sp_backend.py``).
"""

from __future__ import annotations

from argparse import _ArgumentGroup
from collections.abc import Callable
from typing import Any

from sf_xfuser import config
from sf_xfuser.config import TorusArgs
from sf_xfuser.integrations.xdit import degrees, plugin, session
from sf_xfuser.integrations.xdit.refusals import one_sentence


class NativeBackend:
    """One instance for every name of ``config.BACKENDS``."""

    def add_cli_args(self, parser: _ArgumentGroup) -> None:
        config.add_options(parser, backend=False)

    @one_sentence()
    def num_processes(self, args: list[str], num_processes: int) -> int:
        return degrees.num_processes(args, lambda rest: num_processes)

    @one_sentence()
    def configure(self, args: Any) -> None:
        torus_args = _args_of(args)
        assert torus_args is not None  # xDiT calls this for a named backend only
        plugin.require_supported(torus_args)
        session.configure(args, torus_args)

    @one_sentence()
    def start(self, parallel_config: Any) -> None:
        session.start(parallel_config, _args_of(parallel_config.sp_config))

    @one_sentence()
    def build_groups(
        self, group_ranks: list[list[int]], backend: str, ulysses_group: Any, ring_group: Any
    ) -> tuple[Any, Any]:
        return session.build_groups(group_ranks, backend, ulysses_group, ring_group)

    def select_attention_backend(self, attention_backend: Any, named: bool) -> Any:
        if not named:
            return session.prefer_lse(attention_backend)
        session.require_lse(attention_backend)
        return attention_backend

    def attention(self, usp: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return session.attend(usp, *args, **kwargs)

    def destroy(self) -> None:
        session.close_groups()
        session.deactivate()  # if the next run names no backend, xDiT calls none of these methods


def _args_of(owner: Any) -> TorusArgs | None:
    return config.from_mapping({**(owner.sp_backend_options or {}), "sp_backend": owner.sp_backend})


backend = NativeBackend()
