"""Ulysses' all-to-all over the mesh's links, against yunchang's own function in the same groups: the same bits."""

from __future__ import annotations

import re

import pytest

from sf_xfuser import TorusArgs
from sf_xfuser.transport.cpu import shm
from tests.launch import check, reports, torchrun

EACH = 4
SHM_REASON = shm.unavailable()

# case -> what ranks 0 to 3 print
CASES = {
    "shm": ("240 equal",) * EACH,
    "tcp": ("240 equal",) * EACH,
    "two_sided": ("240 equal",) * EACH,
    "ranks_in_another_order": ("80 equal",) * EACH,
    "interleaved": ("equal",) * EACH,
    "windows_grow": ("equal",) * EACH,
    "many_shapes": ("64 kept",) * EACH,
    "no_gradient": ("requires_grad: False",) * EACH,
    "disagree": (r"ValueError: ranks disagree on an all-to-all.* rank 2: \[\[1, 5, 4, 8\], 'torch.float32'",) * EACH,
    "a_rank_has_failed": (*[r"TransportError: rank 3 on \S+ failed: AttributeError"] * 3, "AttributeError"),
}


@pytest.fixture(scope="module")
def said() -> dict[str, dict[str, str]]:
    """case -> rank -> what it printed, from one launch."""
    return reports(torchrun("all_to_all.py", *CASES, nproc=EACH, timeout=300).output, CASES)


@pytest.mark.skipif(SHM_REASON is not None, reason=SHM_REASON or "")
@pytest.mark.parametrize("case", CASES)
def test_over_a_mesh(case, said):
    check(case, said, CASES[case])


# -- the layers that use it, through xDiT ----------------------------------------------------------------------------

SERVED = {
    "xfusers_layer": 4,
    "xfusers_layer_causal": 4,
    "xfusers_layer_front": 4,
    "xfusers_layer_rear": 4,
    "yunchangs_layer": 4,
    "yunchangs_layer_sync": 4,
    "gradient": 2,
    "by_its_name": 1,
}
HANDED_BACK = {
    "another_group": "equal | its process group is not the mesh's Ulysses group",
    "another_group_again": "equal | its process group is not the mesh's Ulysses group",
    "heads_do_not_divide": "same error | 5 heads do not divide by {ways} ranks",
}
UNTOUCHED = ("five_dimensions", "compiled")
LAYER_CASES = (*SERVED, *HANDED_BACK, *UNTOUCHED, "links")


def layers(*flags: str, args: str = "") -> tuple[dict[str, set[str]], str]:
    """case -> what its four ranks said, as a set; and the whole output."""
    output = torchrun("all_to_all_layers.py", *flags, nproc=EACH, env={"SF_XFUSER_ARGS": args}).output
    found = reports(output, LAYER_CASES)
    assert all(len(ranks) == EACH for ranks in found.values()), f"{found}\n{output[-4000:]}"
    return {case: set(ranks.values()) for case, ranks in found.items()}, output


RUNS = {
    "torus auto ring": (("torus", "auto", 2), r"transport (shm|tcp): the fastest of shm [\d.]+ ms, tcp [\d.]+ ms, "),
    "ulysses two_sided": (("ulysses", "two_sided", 4), r"transport two_sided: as asked for \[\]"),
    "usp tcp ring": (("usp", "tcp", 2), r"transport tcp: as asked for \['sf-xfuser tcp'"),
}


@pytest.mark.skipif(SHM_REASON is not None, reason=SHM_REASON or "")
@pytest.mark.parametrize("run", [*list(RUNS)[:-1], pytest.param(list(RUNS)[-1], marks=pytest.mark.slow)])
def test_layers_are_served(run):
    (backend, transport, ways), links = RUNS[run]
    found, output = layers(
        "--sp-backend", backend, "--sp-transport", transport, "--sp-topology", "2x2",
        "--ulysses_degree", str(ways), "--ring_degree", str(EACH // ways),
    )  # fmt: skip
    for case, number in SERVED.items():
        assert found[case] == {f"equal | {number} served"}, case
    for case, expected in HANDED_BACK.items():
        assert found[case] == {expected.format(ways=ways)}, case
    for case in UNTOUCHED:
        assert found[case] == {"equal | untouched"}, case
    assert all(re.match(links, said) for said in found["links"]), found["links"]
    assert output.count("all-to-all handed back to yunchang: its process group") == 1


def test_groups_made_without_xfuser_args_are_served():
    """By ``initialize_model_parallel``, as scripts do that use the layers alone."""
    given = TorusArgs(backend="torus", transport="tcp", topology="2x2")
    found, _ = layers("groups", "2", "2", args=given.to_json())
    assert {found[case].pop() for case in SERVED} == {f"equal | {number} served" for number in SERVED.values()}
    assert not any(found[case] for case in SERVED)
    assert {said.partition(" [")[0] for said in found["links"]} == {"transport tcp: as asked for"}


def test_ulysses_without_a_named_transport_is_untouched():
    found, _ = layers("--sp-backend", "ulysses", "--sp-topology", "2x2", "--ulysses_degree", "4")
    assert found.pop("links") == {"transport xDiT's own collectives: none of ours was named []"}
    assert found.pop("heads_do_not_divide") == {"same error | untouched"}
    assert all(said == {"equal | untouched"} for said in found.values()), found


@pytest.mark.slow
def test_without_a_backend_nothing_is_touched():
    found, _ = layers("--ulysses_degree", "4")
    assert found.pop("links") == {" []"}
    assert found.pop("heads_do_not_divide") == {"same error | untouched"}
    assert all(said == {"equal | untouched"} for said in found.values()), found


def test_strict_raises_on_every_rank():
    found, _ = layers(
        "--sp-backend", "torus", "--sp-transport", "tcp", "--sp-topology", "2x2", "--ulysses_degree", "4", "--sp-strict"
    )
    for case, expected in HANDED_BACK.items():
        (said,) = found[case]
        why = expected.format(ways=4).partition(" | ")[2]
        assert said.startswith(f"--sp-strict: the mesh cannot serve this all-to-all: {why}. Without"), said
    for case, number in SERVED.items():
        assert found[case] == {f"equal | {number} served"}, case
