"""The other faults of ``ranks/cluster_faults.py``, in a file of their own so that two workers share the slow ones."""

from __future__ import annotations

import pytest

from tests.integration.test_cluster_faults import NAMES, QUICK, SLOW, needs_namespaces, run_scenarios

pytestmark = [pytest.mark.slow, needs_namespaces]
OTHERS = [name for name in NAMES if name not in (*QUICK, *SLOW)]


@pytest.fixture(scope="module")
def others() -> dict[str, dict]:
    return run_scenarios(OTHERS, 3000)


@pytest.mark.parametrize("name", OTHERS)
def test_more_faults(name, others):
    assert others[name]["problems"] == [], others[name]
