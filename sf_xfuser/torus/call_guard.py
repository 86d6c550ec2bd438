"""Keeps the calls of a mesh in step: a call fails on all ranks or on none, and ranks reconnect before the next one."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sf_xfuser.transport.base import CallMismatch, TransportError, TransportUnavailable
from sf_xfuser.transport.control_plane import GroupError

if TYPE_CHECKING:
    from sf_xfuser.torus.mesh import Mesh

# Time for a rank to start the call after a failed one, in a program that makes call after call.
_NEXT_CALL_S = 1.0

_T = TypeVar("_T")


class _CallBehind(TransportError):
    """This rank has failed in an earlier call than the others."""


class CallGuard:
    """The call counters and failure state of one rank of a mesh.

    ``number`` counts calls, ``requests`` counts requests. Both are part of the identity of a call. ``request``: the
    description of the last request; ``first_call``: the number of its first call.

    | flag | meaning | effect on the next call |
    |---|---|---|
    | ``failed`` | the last call has failed, or one is running | ranks reconnect first |
    | ``dirty`` | transfers may be pending, or links differ between ranks | reconnecting also rebuilds the links |
    | ``started`` | the running call may have sent its first chunk | none |
    | ``closed`` | the mesh is closed | RuntimeError |

    The first three are set before the operation that they describe, and cleared after it. So an interruption at any
    point, even during error handling, leaves them set.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh: Mesh = weakref.proxy(mesh)  # a cycle would keep the threads and sockets of a closed mesh alive
        self._control = mesh.control
        self.number = self.requests = self.first_call = 0
        self.failed = self.dirty = self.started = self.closed = False
        self.request = ""
        self.status = "has made no call yet", False
        """What this rank does, for the error messages of other ranks, and whether it is in a call."""
        self._refusal: ValueError | None = None
        self._failed_at: float | None = None  # time at which the caller got the exception of the last call
        self._caller: dict[str, int] = {}  # the thread in a call; ``setdefault`` tests and sets it atomically
        self._requester: dict[str, int] = {}  # the thread in a request
        self._in_call = False
        self._pid = os.getpid()
        self._control.call_status = lambda: self.status

    @property
    def is_forked(self) -> bool:
        return os.getpid() != self._pid

    def describe_call(self) -> str:
        text = f"call {self.number}" + (f" of request {self.requests}" if self.requests else "")
        text += f" ({self.request})" if self.request else ""
        return text + (f" at {self._mesh.layer}" if self._mesh.layer else "")

    def refuse(self, text: str) -> NoReturn:
        """See ``Mesh.refuse``."""
        self._refusal = ValueError(text)
        raise self._refusal

    @contextmanager
    def call(self, check: Callable[[], _T]) -> Iterator[_T]:
        """See ``Mesh.call``."""
        self._enter()
        try:
            self._in_call = True
            if self.closed:
                raise RuntimeError("this mesh has been closed, and no call may follow: build another one")
            self.number += 1
            entered = time.monotonic()
            if self.failed:
                self._reconnect(entered)
            failure = self._control.failure
            if self._has_returned():  # if all ranks make call after call, or request after request, all make this one
                with suppress(TransportError):
                    self._reconnect(entered, None if self.requests else _NEXT_CALL_S)
                    failure = None
            self.failed = True  # until the call has ended
            self._control.call = self.number
            self.status = f"is in {self.describe_call()}", True
            try:
                arguments = check()
                if (failure := failure or self._control.failure) is not None:
                    raise GroupError(failure)
                yield arguments
                self.failed = False
            except BaseException as error:
                if error is self._refusal or (isinstance(error, TransportUnavailable) and not self.started):
                    self.failed = False  # all ranks raise it
                else:
                    self._fail(error)
                raise
            finally:
                self.status = f"is in no call; its last one was {self.describe_call()}", False
                self.started = False
        finally:
            self._in_call = False
            self._caller.clear()

    @contextmanager
    def in_request(self) -> Iterator[None]:
        """See ``Mesh.request``."""
        thread = threading.get_ident()
        is_outer = not self._requester
        if self._requester.setdefault("", thread) != thread:
            raise RuntimeError(
                f"a request is running in another thread ({self.request}), and ranks cannot tell the calls of two "
                f"requests apart: start one request after the other"
            )
        try:
            yield
        except BaseException as error:
            self.fail_request(error)
            raise
        finally:
            if is_outer:
                self._requester.clear()

    def fail_request(self, error: BaseException) -> None:
        """Fail the request on all ranks, after an error outside of its calls: the other ranks would wait for this one.
        No effect after a failed call of this request, nor after one that all ranks have refused."""
        has_called = self.number >= self.first_call
        if self.closed or self.is_forked or error is self._refusal or (self.failed and has_called):
            return
        if self.failed or self._has_returned():  # since an earlier request: the other ranks reconnect for this one
            try:
                self._reconnect(time.monotonic())
            except RuntimeError:  # they are past this request, or the group cannot reconnect
                return
        self._report(error, max(self.number, self.first_call))
        self._abort()

    def _has_returned(self) -> bool:
        """Whether the group has failed in an earlier call or request, which has already returned here."""
        if self._control.failure is None or (failed_call := self._control.failed_call) is None:
            return False
        return failed_call < self.first_call if self.requests else failed_call == self.number - 1

    def _enter(self) -> None:
        """RuntimeError in a forked child, and if another thread is in a call or in a request."""
        if self.is_forked:  # its writes to shared memory would be mistaken for those of the parent
            rank = self._mesh.members[self._mesh.position]
            raise RuntimeError(
                f"this process was forked from rank {rank} and cannot use its mesh: make all calls in the process that "
                f"built the mesh"
            )
        thread = threading.get_ident()
        is_requested = self._requester.get("", thread) != thread
        if is_requested or self._caller.setdefault("", thread) != thread or self._in_call:
            error = RuntimeError(
                "two threads use one mesh at the same time, and ranks cannot tell their calls apart: make all calls of "
                "a mesh from one thread"
            )
            self._report(error, self.number)
            raise error

    def _fail(self, error: BaseException) -> None:
        """Fail the call on all ranks. Replaces an ``error`` that only reports a missing chunk by a TransportError with
        the cause."""
        is_cause = self._is_cause(error)
        cause = self._report(error, self.number)
        self._abort()
        if isinstance(error, GroupError) and not isinstance(error, TransportError):
            raise TransportError(str(error)) from error  # the same type as on all other ranks
        if not is_cause:
            local = str(error)
            raise TransportError(cause if cause in local else f"{cause}. Error on this rank: {local}") from error

    def _report(self, error: BaseException, call: int) -> str:
        is_cause = self._is_cause(error)
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        differs = isinstance(error, CallMismatch)
        return self._control.report_failure(
            text if is_cause else str(error), is_cause=is_cause, mismatch=differs, call=call
        )

    def _is_cause(self, error: BaseException) -> bool:
        """Whether the error originates on this rank, and is not the symptom of a failure elsewhere."""
        return not isinstance(error, GroupError) and not (isinstance(error, TransportError) and self.started)

    def _abort(self) -> None:
        """Close links with pending transfers, so that peers fail instead of waiting."""
        self._mark_failed()
        if self.started or self.dirty or any(link.enqueues for link in self._mesh.links.values()):
            self.dirty = True
            self._mesh.close_links(failed=True)

    def _mark_failed(self) -> None:
        self.failed, self._failed_at = True, time.monotonic()

    def _reconnect(self, entered: float, limit_s: float | None = None) -> None:
        """Bring all ranks into step before the call that this rank entered at ``entered``. Collective, because a call
        fails on all ranks or on none. TransportError if a rank does not come in time."""
        try:
            reports = self._meet(entered, limit_s)
            self.number = max(number for _, number, *_ in reports)
            self.requests = max(requests for _, _, (requests, _), *_ in reports)
            self._mesh.calls.clear()
            self._mesh.reconnect_links([report[3:] for report in reports], any(dirty for dirty, *_ in reports))
        except _CallBehind:
            raise
        except BaseException as error:
            self._mark_failed()
            cause = self._report(error, self.number)
            if isinstance(error, GroupError):
                raise TransportError(cause) from error
            raise
        self.dirty = False

    def _meet(self, entered: float, limit_s: float | None) -> list[list[Any]]:
        """The state of every rank, once all are at the same call or request."""
        while True:
            agreed = self._control.reconnect(self._failed_at if self.failed else None, entered, limit_s)
            mesh = self._mesh
            transports = mesh.transport, mesh.transport_reason, list(mesh.transports)
            request = self.requests, self.request
            reports = self._control.gather("reconnect", [self.dirty, self.number, request, *transports])
            steps, requests = [number for _, number, *_ in reports], [request for _, _, request, *_ in reports]
            agreed |= len(set(steps)) == 1
            if uses_requests := any(count for count, _ in requests):
                steps = [count for count, _ in requests]
                agreed = len(set(steps)) == 1 or len({text for _, text in requests}) == 1
            if agreed:
                return reports
            # Some ranks noticed the failure later than others, in a program that makes call after call.
            if steps[mesh.position] < max(steps):
                self._mark_failed()
                ranks = zip(mesh.members, steps, strict=True)
                behind = [rank for rank, step in ranks if step < max(steps)]
                what = f"request {self.requests} ({self.request})" if uses_requests else f"call {self.number}"
                raise _CallBehind(
                    f"rank(s) {behind} are behind: {what} has failed on the other ranks and fails here too, so that "
                    f"all ranks continue at the same {'request' if uses_requests else 'call'}"
                )
