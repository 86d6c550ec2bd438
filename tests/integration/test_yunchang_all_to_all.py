"""Ulysses' all-to-all over the links of a mesh gives the same bits as yunchang's own function in the same groups."""

from __future__ import annotations

import re

import pytest

from sf_xfuser import TorusArgs
from sf_xfuser.transport.cpu import shm
from tests.launch import check, reports, torchrun

EACH = 4
SHM_REASON = shm.unavailable()

# case -> regex of what ranks 0 to 3 print
CASES = {
    "shm": ("240 equal",) * EACH,
    "tcp": ("240 equal",) * EACH,
    "two_sided": ("240 equal",) * EACH,
    "ranks_out_of_order": ("80 equal",) * EACH,
    "interleaved": ("equal",) * EACH,
    "windows_grow": ("equal",) * EACH,
    "many_shapes": ("64 kept",) * EACH,
    "no_gradient": ("requires_grad: False",) * EACH,
    "disagree": (r"ValueError: ranks disagree on an all-to-all.* rank 2: \[\[1, 5, 4, 8\], 'torch.float32'",) * EACH,
    "a_rank_has_failed": (*[r"TransportError: rank 3 on \S+ failed: AttributeError"] * 3, "AttributeError"),
}


@pytest.fixture(scope="module")
def printed() -> dict[str, dict[str, str]]:
    """case -> rank -> text, from one launch."""
    return reports(torchrun("all_to_all.py", *CASES, nproc=EACH, timeout=300).output, CASES)


@pytest.mark.skipif(SHM_REASON is not None, reason=SHM_REASON or "")
@pytest.mark.parametrize("case", CASES)
def test_over_a_mesh(case, printed):
    check(case, printed, CASES[case])


# -- the layers that call it, through xDiT ---------------------------------------------------------------------------

ON_MESH = {
    "xfusers_layer": 4,
    "xfusers_layer_causal": 4,
    "xfusers_layer_front": 4,
    "xfusers_layer_rear": 4,
    "yunchangs_layer": 4,
    "yunchangs_layer_sync": 4,
    "gradient": 2,
    "by_its_name": 1,
}
FALLBACKS = {
    "another_group": "equal | its process group is not the mesh's Ulysses group",
    "another_group_again": "equal | its process group is not the mesh's Ulysses group",
    "heads_do_not_divide": "same error | 5 heads are not divisible by {degree} ranks",
}
UNCHANGED = ("five_dimensions", "compiled")
LAYER_CASES = (*ON_MESH, *FALLBACKS, *UNCHANGED, "links")


def layers(*flags: str, args: str = "") -> tuple[dict[str, set[str]], str]:
    """case -> the set of texts of its four ranks; and the whole output."""
    output = torchrun("all_to_all_layers.py", *flags, nproc=EACH, env={"SF_XFUSER_ARGS": args}).output
    found = reports(output, LAYER_CASES)
    assert all(len(ranks) == EACH for ranks in found.values()), f"{found}\n{output[-4000:]}"
    return {case: set(ranks.values()) for case, ranks in found.items()}, output


RUNS = {
    "torus auto ring": (("torus", "auto", 2), r"transport (shm|tcp): the fastest of shm [\d.]+ ms, tcp [\d.]+ ms, "),
    "ulysses two_sided": (("ulysses", "two_sided", 4), r"transport two_sided: as requested \[\]"),
    "usp tcp ring": (("usp", "tcp", 2), r"transport tcp: as requested \['sf-xfuser tcp'"),
}


@pytest.mark.skipif(SHM_REASON is not None, reason=SHM_REASON or "")
@pytest.mark.parametrize("run", [*list(RUNS)[:-1], pytest.param(list(RUNS)[-1], marks=pytest.mark.slow)])
def test_layers_run_on_the_mesh(run):
    (backend, transport, degree), links = RUNS[run]
    found, output = layers(
        "--sp-backend", backend, "--sp-transport", transport, "--sp-topology", "2x2",
        "--ulysses_degree", str(degree), "--ring_degree", str(EACH // degree),
    )  # fmt: skip
    for case, number in ON_MESH.items():
        assert found[case] == {f"equal | {number} on mesh"}, case
    for case, expected in FALLBACKS.items():
        assert found[case] == {expected.format(degree=degree)}, case
    for case in UNCHANGED:
        assert found[case] == {"equal | unchanged"}, case
    assert all(re.match(links, text) for text in found["links"]), found["links"]
    assert output.count("falls back to yunchang's own all-to-all: its process group") == 1


def test_groups_without_xfuser_args_run_on_the_mesh():
    """Scripts that use only the layers call ``initialize_model_parallel``."""
    given = TorusArgs(backend="torus", transport="tcp", topology="2x2")
    found, _ = layers("groups", "2", "2", args=given.to_json())
    assert {found[case].pop() for case in ON_MESH} == {f"equal | {number} on mesh" for number in ON_MESH.values()}
    assert not any(found[case] for case in ON_MESH)
    assert {text.partition(" [")[0] for text in found["links"]} == {"transport tcp: as requested"}


def test_ulysses_without_sp_transport_is_unchanged():
    found, _ = layers("--sp-backend", "ulysses", "--sp-topology", "2x2", "--ulysses_degree", "4")
    assert found.pop("links") == {"transport xDiT's own collectives: no --sp-transport was given []"}
    assert found.pop("heads_do_not_divide") == {"same error | unchanged"}
    assert all(texts == {"equal | unchanged"} for texts in found.values()), found


@pytest.mark.slow
def test_without_sp_backend_nothing_changes():
    found, _ = layers("--ulysses_degree", "4")
    assert found.pop("links") == {" []"}
    assert found.pop("heads_do_not_divide") == {"same error | unchanged"}
    assert all(texts == {"equal | unchanged"} for texts in found.values()), found


def test_strict_raises_on_every_rank():
    found, _ = layers(
        "--sp-backend", "torus", "--sp-transport", "tcp", "--sp-topology", "2x2", "--ulysses_degree", "4", "--sp-strict"
    )
    for case, expected in FALLBACKS.items():
        (text,) = found[case]
        reason = expected.format(degree=4).partition(" | ")[2]
        assert text.startswith(f"--sp-strict: the mesh cannot run this all-to-all: {reason}. Without"), text
    for case, number in ON_MESH.items():
        assert found[case] == {f"equal | {number} on mesh"}, case
