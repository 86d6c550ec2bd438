"""Recorded transfers of a window: what each round copies, raises and waits for, with all addresses bound.

On the host, a post is an event and two batches, of copies and of flags. A wait is one batch and an event. While a CUDA
graph is captured, copies are single, since CUDA cannot capture batches of them, and flags are copied from the window's
word ``expected``, since their value changes from replay to replay. NCCL's collectives with copy engines do the same
(src/ce_coll.cc).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sf_xfuser.transport.base import Transfer
from sf_xfuser.transport.gpu.driver import CopyBatch, WordBatch
from sf_xfuser.transport.gpu.watchdog import RoundWait

if TYPE_CHECKING:
    import torch

    from sf_xfuser.transport.gpu.device import DeviceWindow


class Chunk(NamedTuple):
    """A copy to byte ``offset`` in a peer's block from the address ``source``."""

    offset: int
    source: int
    nbytes: int


class NetworkPut(NamedTuple):
    """Chunks for a peer whose memory is not mapped, then the flag at byte ``flag`` of its block."""

    peer: int
    chunks: tuple[Chunk, ...]
    flag: int


class DeviceTransfer(Transfer):
    """A round. ``flags``: for each peer, the byte of the flag in its block that the round raises. ``chunks``: by peer.
    ``held``: the tensors to send.

    ``post_launches``, ``wait_launches``: driver calls that enqueue copies, flags and waits; a batch counts once, events
    do not count."""

    def __init__(
        self,
        window: DeviceWindow,
        round: int,
        chunks: Mapping[int, Sequence[Chunk]],
        flags: Mapping[int, int],
        awaited: RoundWait,
        held: Sequence[torch.Tensor] = (),
    ) -> None:
        self._window, self._round, self._held = window, round, held
        mapped = {peer: window.address_of(peer) for peer in flags if window.maps(peer)}
        self._copies = CopyBatch(
            [(start + c.offset, c.source, c.nbytes) for peer, start in mapped.items() for c in chunks.get(peer, ())]
        )
        far = window.other_hosts
        self._flags = WordBatch.writes([start + flags[peer] for peer, start in mapped.items() if peer not in far])
        self._far_flags = [start + flags[peer] for peer, start in mapped.items() if peer in far]
        self._all_flags = [start + flags[peer] for peer, start in mapped.items()]
        network = [
            NetworkPut(peer, tuple(chunks.get(peer, ())), flag) for peer, flag in flags.items() if peer not in mapped
        ]
        self._put_network: Callable[[], None] | None
        self._put_network, network_launches = window.record_network(network) if network else (None, 0)
        self.awaited = awaited
        self.alone = DeviceWait(window, [awaited])
        self.post_launches = (
            window.driver.copy_launches(self._copies) + self._flags.launches + len(self._far_flags) + network_launches
        )
        self.wait_launches = self.alone.launches

    def post(self, after: DeviceWait | None = None) -> None:
        """As ``Transfer.post``. Starts after the work that is already on the current stream, and ``after`` a wait. The
        sends wait on a stream of their own, so that neither the current stream nor other sends wait."""
        window = self._window
        window.require_usable()
        if after is not None and window.capturing:  # see "Graphs" in device.py
            after()
            after = None
        try:
            driver, streams = window.driver, window.streams
            driver.record(streams.handoff, driver.current_stream(window.device))
            if self._all_flags:
                put = streams.put if after is None else streams.forward
                window.sending.add(put)
                driver.wait_event(put, streams.handoff)
                if after is not None:
                    after.enqueue(put)
                if window.capturing:
                    for target, source, nbytes in self._copies.copies:
                        driver.copy(target, source, nbytes, put)
                    copied = self._all_flags
                else:
                    driver.copy_all(self._copies, put)
                    self._flags.values.fill(window.value)
                    driver.run(self._flags, put)
                    copied = self._far_flags
                for target in copied:
                    driver.copy(target, window.expected_address, 8, put)
            if self._put_network is not None:
                window.sending.add(streams.network)
                driver.wait_event(streams.network, streams.handoff)
                if after is not None:
                    after.enqueue(streams.network)
                self._put_network()
        except BaseException as error:
            window.fail(f"could not post round {self._round}", error)

    def wait(self) -> None:
        self.alone()


class DeviceWait:
    """Makes the current stream wait for flags. ``words``: more of them, as (peer, address). ``launches``: as in
    ``DeviceTransfer``. ``parts``: the wait for each round alone. A CUDA graph waits once for a round, since it
    resets the flags."""

    def __init__(
        self,
        window: DeviceWindow,
        waits: Sequence[RoundWait],
        words: Sequence[tuple[int, int]] = (),
        parts: Sequence[DeviceWait] = (),
    ) -> None:
        self._window, self._parts = window, parts
        self._rounds = tuple(wait for wait in waits if wait.flags)
        flags = [flag for each in self._rounds for flag in each.flags]
        found = [(flag.peer, window.flag_address(flag.word)) for flag in flags] + [*words]
        seen = [address for peer, address in found if window.sees_flags(peer)]
        self._exact = WordBatch.waits(seen, window.wait_flags)
        self._any = WordBatch.waits_for_any(seen, window.wait_flags)
        self._network = [address for peer, address in found if not window.sees_flags(peer)]
        self._index = window.index_of([(flag.peer, flag.number) for flag in flags])  # checked in a graph
        self.launches = self._exact.launches + len(self._network)

    def __call__(self) -> None:
        if not self.launches:
            return
        window = self._window
        window.require_usable()
        if window.capturing and self._parts:
            for part in self._parts:
                part()
            return
        if window.capturing and not window.checked.isdisjoint(self._rounds):
            return
        try:
            driver, streams = window.driver, window.streams
            current = driver.current_stream(window.device)
            if window.capturing:  # see "Graphs" in device.py
                window.checked.update(self._rounds)
                window.join_puts(current)
                waiting = current
            else:
                waiting = streams.wait
            self.enqueue(waiting)
            if waiting != current:
                driver.record(streams.handoff, waiting)
                driver.wait_event(current, streams.handoff)
            if window.capturing and self._rounds:
                window.check(self._index)
        except BaseException as error:
            rounds = [each.round for each in self._rounds]
            window.fail(f"could not enqueue the wait of rounds {rounds}", error)

    def enqueue(self, stream: int) -> None:
        """Make ``stream`` wait."""
        window = self._window
        window.waits.append(self._rounds)
        if window.capturing:
            window.driver.run(self._any, stream)
        else:
            self._exact.values.fill(window.value)
            window.driver.run(self._exact, stream)
        for address in self._network:
            window.await_network_flag(address, stream)
