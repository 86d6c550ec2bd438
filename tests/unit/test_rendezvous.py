"""StoreGroup on one rank. test_attention.py and test_refusals.py use it on several ranks."""

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


def test_gather_returns_values_and_the_store_does_not_grow(store):
    group = StoreGroup("test", [0], timeout_s=5)
    assert group.gather("topic", {"a": [1, None]}) == [{"a": [1, None]}]
    before = store.num_keys()
    for n in range(50):
        assert group.gather("topic", n) == [n]
    assert store.num_keys() <= before + 2


def test_a_missing_rank_is_named(store):
    group = StoreGroup("missing", [0, 3], timeout_s=0.2)
    with pytest.raises(
        RuntimeError, match=r"waited 0.2 s for 'topic', but rank\(s\) \[3\] of \(0, 3\) did not reach it"
    ):
        group.gather("topic", 1)


def test_different_topics_raise(store):
    group = StoreGroup("mixed", [0, 3], timeout_s=5)
    dist.distributed_c10d._get_default_store().set("sf_xfuser/mixed/0/3", '["other", 1]')
    with pytest.raises(RuntimeError, match="rank 0 is at 'topic' while rank 3 is at 'other'"):
        group.gather("topic", 1)


def test_flags_of_one_rank_are_the_same(store):
    StoreGroup.world(5).require_same("flags", {"--sp-plan": "auto"})
