"""What the plugin has done in this process: counts of calls, fallbacks and bytes, and a collector for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sf_xfuser.integrations.fallback import drop_ins
from sf_xfuser.integrations.xdit import session
from sf_xfuser.torus.mesh import meshes
from sf_xfuser.torus.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts of this rank since its meshes were built, as JSON types (``dataclasses.asdict``).

    ``backend``: that of ``--sp-backend``, if any. ``calls``: by path: ``"torus"``, or the function or candidate that
    ran the call instead. ``fallbacks``: by reason. ``received_bytes``: by link (``inside`` machines, ``across``
    machines). ``traced_calls``: calls of ``torus_attention`` inside :func:`tracing`, and ``exposed_ms``: how long they
    waited for transfers altogether.
    """

    backend: str | None
    calls: dict[str, int]
    fallbacks: dict[str, int]
    received_bytes: dict[str, int]
    traced_calls: int
    exposed_ms: float


def stats() -> Stats:
    """What the open meshes of this process have done. Local; takes some microseconds and waits for no GPU.

    ``calls`` and ``fallbacks`` count calls of xDiT, of ``parallelize`` and of yunchang's functions. Calls of
    ``torus_attention`` by the program itself count in ``received_bytes`` only. A CUDA graph of a whole model counts
    once, when it is captured.
    """
    open_meshes = [mesh for mesh in list(meshes) if not mesh.guard.closed]
    calls, fallbacks, received = Counter[str](), Counter[str](), Counter[str]()
    for each in list(drop_ins):
        if not each.mesh.guard.closed:
            calls.update(each.calls())
            fallbacks.update(each.fallbacks)
    for mesh in open_meshes:
        received.update(mesh.received_bytes)
    args = session.current.args
    return Stats(
        backend=None if args is None else args.backend,
        calls={path: n for path, n in calls.items() if n},
        fallbacks=dict(fallbacks),
        received_bytes=dict(received),
        traced_calls=sum(mesh.traced_calls for mesh in open_meshes),
        exposed_ms=sum(mesh.exposed_ms for mesh in open_meshes),
    )


@contextmanager
def tracing() -> Iterator[None]:
    """Measure the waits of all calls in the block for ``stats().exposed_ms``. Local; needs a mesh, so run one request
    before. Synchronizes with the GPU at the end. Calls use no CUDA graph of the plugin inside."""
    traces = {mesh: Trace() for mesh in list(meshes) if not mesh.guard.closed}
    for mesh, trace in traces.items():
        mesh.trace = trace
    try:
        yield
    finally:
        for mesh, trace in traces.items():
            mesh.trace = None
            mesh.traced_calls += trace.calls
            waits = [span for span in trace.finished(0.0) if span["link"] == "wait"]
            mesh.exposed_ms += 1e3 * sum(span["end_s"] - span["start_s"] for span in waits)


class Collector:
    """``stats()`` for Prometheus: ``prometheus_client.REGISTRY.register(Collector())``. Needs the extra ``metrics``."""

    def collect(self) -> Iterator[object]:
        """The metrics, in the types of ``prometheus_client``."""
        from prometheus_client.core import CounterMetricFamily

        found = stats()
        for name, text, label, values in (
            ("calls", "Calls by the path that ran them", "path", found.calls),
            ("fallbacks", "Calls that fell back, by reason", "reason", found.fallbacks),
            ("received_bytes", "Bytes that this rank received, by link", "link", found.received_bytes),
        ):
            family = CounterMetricFamily(f"sf_xfuser_{name}", text, labels=[label])
            for value, count in values.items():
                family.add_metric([value], count)
            yield family
        yield CounterMetricFamily("sf_xfuser_traced_calls", "Calls whose waits were measured", found.traced_calls)
        seconds = found.exposed_ms / 1e3
        yield CounterMetricFamily("sf_xfuser_exposed_seconds", "Time that traced calls waited for transfers", seconds)
