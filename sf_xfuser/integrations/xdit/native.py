"""The plugin as a backend of an xDiT that has the dispatch point of ``patches/``: no attribute of xDiT is replaced.

xDiT finds :data:`backend` under the entry-point group ``xfuser.sp_backends`` and calls it where the hooks of
``plugin.py`` would have been; both run the functions of ``session``. Docstrings of the methods are xDiT's
(``xfuser/core/distributed/sp_backend.py``).
"""

from __future__ import annotations

from argparse import _ArgumentGroup
from collections.abc import Callable
from typing import Any

from sf_xfuser import config as sp_args
from sf_xfuser.integrations.xdit import degrees as launch
from sf_xfuser.integrations.xdit import plugin, session


class NativeBackend:
    """What xDiT calls; one instance serves every name of ``args.BACKENDS``."""

    def add_cli_args(self, parser: _ArgumentGroup) -> None:
        sp_args.add_options(parser, backend=False)

    def num_processes(self, args: list[str], num_processes: int) -> int:
        return launch.num_processes(args, lambda rest: num_processes)

    def configure(self, args: Any) -> None:
        given = sp_args.from_mapping({**(args.sp_backend_options or {}), "sp_backend": args.sp_backend})
        assert given is not None  # xDiT asks for a backend that was named
        plugin.settle(args, given)

    def start(self, parallel_config: Any) -> None:
        config = parallel_config.sp_config
        options = {**(config.sp_backend_options or {}), "sp_backend": config.sp_backend}
        session.start(parallel_config, sp_args.from_mapping(options))

    def build_groups(
        self, group_ranks: list[list[int]], backend: str, ulysses_group: Any, ring_group: Any
    ) -> tuple[Any, Any]:
        return session.build_groups(group_ranks, backend, ulysses_group, ring_group)

    def select_attention_backend(self, attention_backend: Any, named: bool) -> Any:
        if not named:
            return session.with_lse(attention_backend)
        session.require_lse(attention_backend)
        return attention_backend

    def attention(self, usp: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return session.attend(usp, *args, **kwargs)

    def destroy(self) -> None:
        session.leave_groups()
        session.forget_flags()  # the next run may name no backend: xDiT then calls none of these methods


backend = NativeBackend()
