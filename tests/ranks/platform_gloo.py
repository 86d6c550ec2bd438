"""Two or three ranks: all-to-all and all-gather with receives posted first equal those of gloo."""

import gc
import time

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from sf_xfuser.integrations.xdit.cpu_platform.gloo import _Works

dist.init_process_group("gloo")
RANK, SIZE = dist.get_rank(), dist.get_world_size()
WORLD = dist.group.WORLD
SUBGROUP = dist.new_group([0, 1])
order = []


def recorded(name):
    """The method of process groups with its name added to ``order``."""
    original = getattr(dist.ProcessGroup, name)

    def method(*args, **kwargs):
        order.append(name)
        return original(*args, **kwargs)

    return method


dist.ProcessGroup.recv, dist.ProcessGroup.send = recorded("recv"), recorded("send")


def checked(call, group, receives, sends=None):
    """Compare ``call`` with the hooks to gloo's own; it must post ``receives``, then ``sends`` (None: as many)."""
    stock = call(True)
    order.clear()
    time.sleep(0.01 * dist.get_rank(group))
    out = call(False)
    assert order == ["recv"] * receives + ["send"] * (receives if sends is None else sends), order
    assert out.dtype == stock.dtype and torch.equal(out, stock), (out, stock)


def plain(x, sizes, group, asynchronous):
    def call(stock):
        sends, receives = sizes
        out = torch.zeros(sum(receives) if receives else x.shape[0], *x.shape[1:], dtype=x.dtype)
        all_to_all = dist.all_to_all_single
        work = (all_to_all.__wrapped__ if stock else all_to_all)(out, x, receives, sends, group, async_op=asynchronous)
        gc.collect()
        assert (work is None) != asynchronous and (work is None or work.wait())
        return out

    return call


def used(collective, *args):
    def call(stock):
        out = (collective.__wrapped__ if stock else collective)(*args)
        gc.collect()
        assert stock or len(_Works._pending) == 1, "the Python object of a pending Work was deleted"
        return out * 1

    return call


rows = torch.arange(12.0).view(12, 1) + 100 * RANK
for dtype in (torch.float32, torch.bfloat16, torch.uint8):
    large = rows.repeat(1, 50_000).to(dtype)
    # Row counts by (source, destination); some are zero.
    counts = [[(source + 2 * to + 1) % 3 for to in range(SIZE)] for source in range(SIZE)]
    sends, receives = counts[RANK], [row[RANK] for row in counts]
    from_others, to_others = (sum(n > 0 for at, n in enumerate(x) if at != RANK) for x in (receives, sends))
    uneven = large[: sum(sends)]
    for asynchronous in (False, True):
        checked(plain(large, (None, None), WORLD, asynchronous), WORLD, SIZE - 1)
        checked(plain(uneven, (sends, receives), WORLD, asynchronous), WORLD, from_others, to_others)
    checked(used(functional.all_to_all_single, large, None, None, WORLD), WORLD, SIZE - 1)
    checked(used(functional.all_to_all_single, uneven, receives, sends, WORLD), WORLD, from_others, to_others)
    around = [int(to == (RANK + 1) % SIZE) * 12 for to in range(SIZE)]
    back = [int(source == (RANK - 1) % SIZE) * 12 for source in range(SIZE)]
    checked(used(functional.all_to_all_single, large, back, around, WORLD), WORLD, 1)
    if RANK < 2:
        for name in ("all_gather_single", "all_gather_tensor"):
            if gather := getattr(functional, name, None):
                checked(used(gather, large, 0, SUBGROUP), SUBGROUP, 1)
        checked(plain(large, (None, None), SUBGROUP, False), SUBGROUP, 1)
    print("as gloo's own", flush=True)

# PyTorch's ring uses the same function.
order.clear()
passed_on = functional.permute_tensor(rows, [*range(1, SIZE), 0], WORLD)
assert torch.equal(passed_on * 1, rows + 100 * ((RANK - 1) % SIZE - RANK))
assert order == ["recv", "send"], order

# Calls that need a gradient use gloo's own.
order.clear()
functional.all_to_all_single(rows.clone().requires_grad_(), None, None, WORLD).sum().backward()
assert not order, order

# Input strides may differ between ranks; an output must be contiguous.
strided = torch.stack([rows, rows], dim=1)[:, RANK % 2] if RANK else rows
assert strided.is_contiguous() == (RANK == 0)
expected = torch.empty_like(rows)
dist.all_to_all_single.__wrapped__(expected, rows)
assert torch.equal(functional.all_to_all_single(strided, [], [], WORLD) * 1, expected)

for what, sends, receives in (
    (f"{SIZE + 1} rows do not split evenly over {SIZE} ranks", torch.empty(SIZE + 1), torch.empty(SIZE + 1)),
    ("must be contiguous", rows, torch.empty(12, 2)[:, :1]),
):
    try:
        dist.all_to_all_single(receives, sends)
    except ValueError as error:
        assert what in str(error), error
    else:
        raise AssertionError(f"receives: {what}")
assert not _Works._pending, "a finished Work is still stored"
dist.destroy_process_group()
