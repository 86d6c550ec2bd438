"""Prints one sentence, instead of a traceback per rank, when the plugin refuses a launch and nobody catches the error.

The hooks on xDiT's start raise ``ValueError`` and ``RuntimeError`` as ever, and a program that catches them sees no
difference. Only an error that would end the program reaches ``sys.excepthook``: then rank 0 prints its text, a rank
with another text prints its own, and every rank exits with status 2.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

from sf_xfuser import config

EXIT_STATUS = 2
_MARK = "sf_xfuser_refusal"
_WAIT = timedelta(seconds=30)
"""Ranks wait for each other this long before they exit: torchrun ends all ranks as soon as one has failed, so a rank
that exits early would end rank 0 before it prints."""

_default_hook: Any = sys.__excepthook__


@contextmanager
def one_sentence() -> Iterator[None]:
    """Mark an error of the plugin that leaves the block, so that it ends the program with one sentence."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if _raised_by_the_plugin(error) and not config.traceback_wanted():
            setattr(error, _MARK, True)
            _install()
        raise


def _raised_by_the_plugin(error: BaseException) -> bool:
    """Whether the plugin raised it itself, on purpose: not PyTorch, xDiT or another library that it called."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").startswith("sf_xfuser.")


def _install() -> None:
    global _default_hook
    if sys.excepthook is not _excepthook:
        _default_hook, sys.excepthook = sys.excepthook, _excepthook


def _excepthook(kind: Any, error: BaseException, traceback: Any) -> None:
    if getattr(error, _MARK, False):
        _end(str(error))
    _default_hook(kind, error, traceback)


def _end(text: str) -> NoReturn:
    launched = config.launch_environment()
    rank, world_size = launched.rank or 0, launched.world_size or 1
    if rank == 0:
        print(f"sf-xfuser: {text}", file=sys.stderr, flush=True)
    text_of_rank_0 = _exchange(text, rank, world_size) if world_size > 1 else text
    if rank and text != text_of_rank_0:
        print(f"sf-xfuser (rank {rank}): {text}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as another rank has exited
    raise SystemExit(EXIT_STATUS)


def _exchange(text: str, rank: int, world_size: int) -> str | None:
    """Wait until all ranks refuse, or for ``_WAIT``. The text of rank 0; None if it has none."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    try:
        if dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
        else:
            store, _, _ = next(rendezvous("env://", rank, world_size, timeout=_WAIT))
        store = dist.distributed_c10d.PrefixStore("sf_xfuser/refusal", store)
        store.set(str(rank), text)
        with suppress(RuntimeError):  # a rank does not refuse
            store.wait([str(other) for other in range(world_size)], _WAIT)
        return store.get("0").decode() if store.check(["0"]) else None
    except Exception:  # no store, or its host is gone
        return None
