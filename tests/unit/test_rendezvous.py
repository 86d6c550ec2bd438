"""StoreGroup, on one rank: what several ranks do with it is in test_attention.py and test_refusals.py."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from sf_xfuser.transport.rendezvous import StoreGroup


@pytest.fixture
def store():
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    dist.destroy_process_group()


def test_values_come_back_and_the_store_does_not_grow(store):
    agreement = StoreGroup("test", [0], timeout_s=5)
    assert agreement.gather("topic", {"a": [1, None]}) == [{"a": [1, None]}]
    before = store.num_keys()
    for n in range(50):
        assert agreement.gather("topic", n) == [n]
    assert store.num_keys() <= before + 2


def test_an_absent_rank_is_named(store):
    agreement = StoreGroup("lonely", [0, 3], timeout_s=0.2)
    with pytest.raises(
        RuntimeError, match=r"waited 0.2 s for 'topic', but rank\(s\) \[3\] of \(0, 3\) did not reach it"
    ):
        agreement.gather("topic", 1)


def test_ranks_at_different_calls_are_told_so(store):
    agreement = StoreGroup("mixed", [0, 3], timeout_s=5)
    dist.distributed_c10d._get_default_store().set("sf_xfuser/mixed/0/3", '["other", 1]')
    with pytest.raises(RuntimeError, match="rank 0 is at 'topic' while rank 3 is at 'other'"):
        agreement.gather("topic", 1)


def test_flags_of_one_rank_are_its_own(store):
    StoreGroup.world(5).require_same("flags", {"--sp-plan": "auto"})
