"""The benchmark of ``import xfuser``: its variants and its limit."""

from __future__ import annotations

import json
from itertools import cycle

import pytest

from sf_xfuser.bench import imports


@pytest.mark.slow
def test_real_imports(tmp_path, capsys, monkeypatch):
    """Three new processes; each checks whether the plugin is loaded. One round is no measurement of time."""
    monkeypatch.setattr(
        imports, "measure", lambda rounds: {variant: [imports._import_once(variant)] for variant in imports.VARIANTS}
    )
    status = imports.main(["--rounds", "1", "--json", str(tmp_path / "times.json")])
    written = json.loads((tmp_path / "times.json").read_text())
    assert set(written["seconds"]) == {"on", "off", "absent"}
    assert all(seconds > 0.1 for [seconds] in written["seconds"].values())
    assert status == int(max(written["ratios"].values()) > imports.LIMIT)
    assert "absent" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "status"), [({"on": 1.01}, 0), ({"on": 1.03}, 1), ({"off": 0.97}, 1)])
def test_the_limit_is_on_medians_against_either_baseline(seconds, status, monkeypatch, capsys):
    noise = {variant: cycle([5.0, 0.1, 0.0]) for variant in imports.VARIANTS}  # the first round is not counted
    monkeypatch.setattr(imports, "_import_once", lambda variant: seconds.get(variant, 1.0) + next(noise[variant]))
    assert imports.main(["--rounds", "5"]) == status
    assert ("times as long" in capsys.readouterr().err) == bool(status)


def test_a_plugin_that_does_not_load_is_no_measurement(monkeypatch):
    monkeypatch.setattr(imports, "_IMPORT", "print('0.5 False')")
    with pytest.raises(
        RuntimeError, match=r"with the plugin on, sf_xfuser\.integrations\.xdit\.plugin in sys\.modules is False"
    ):
        imports.measure(1)
    monkeypatch.setattr(imports, "_IMPORT", "raise SystemExit('no xfuser here')")
    with pytest.raises(RuntimeError, match="cannot be imported with the plugin on:\nno xfuser here"):
        imports.measure(1)
