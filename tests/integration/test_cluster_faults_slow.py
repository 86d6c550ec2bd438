"""The faults that test_cluster_faults.py leaves out: a file of its own, so that both workers of pytest share them."""

from __future__ import annotations

import pytest

from tests.integration.test_cluster_faults import NAMES, QUICK, SLOW, fared, needs_namespaces

pytestmark = [pytest.mark.slow, needs_namespaces]
OTHERS = [name for name in NAMES if name not in (*QUICK, *SLOW)]


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return fared(OTHERS, 3000)


@pytest.mark.parametrize("name", OTHERS)
def test_more_faults(name, found):
    assert found[name]["bad"] == [], found[name]
