"""HookSet on a package made for the test: applied on import, once, and undone exactly."""

from __future__ import annotations

import importlib
import sys

import pytest

from sf_xfuser.integrations.hooks import Hook, HookSet


@pytest.fixture
def package(tmp_path, monkeypatch):
    """hosted/core.py defines things; hosted/user.py binds one of them by from-import."""
    folder = tmp_path / "hosted"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "core.py").write_text(
        "LIMIT = 3\n"
        "def call(x):\n    return x\n"
        "class Base:\n    def inherited(self):\n        return 'base'\n"
        "class Thing(Base):\n"
        "    @staticmethod\n    def fixed(x):\n        return x\n"
        "    @classmethod\n    def made(cls, x):\n        return (cls.__name__, x)\n"
        "    def method(self, x):\n        return x\n"
    )
    (folder / "user.py").write_text("from hosted.core import call\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "hosted"]:
        del sys.modules[name]


def hook(name, wrap, **options):
    return Hook(module="hosted.core", name=name, wrap=wrap, why="test", remove_when="never", **options)


def plus_one(original):
    return lambda *args: (original(*args), "hooked")


NAMES = ("LIMIT", "call", "Thing.fixed", "Thing.made", "Thing.method", "Thing.inherited")


def snapshot(core):
    found = {}
    for name in NAMES:
        *path, attribute = name.split(".")
        owner = getattr(core, path[0]) if path else core
        found[name] = vars(owner).get(attribute, "absent")
    return found


@pytest.mark.parametrize("imported_first", [False, True])
def test_applied_and_undone_exactly(package, imported_first):
    hooks = HookSet(
        [hook("LIMIT", lambda limit: limit + 1)] + [hook(name, plus_one, sweep=name == "call") for name in NAMES[1:]],
        roots=("hosted",),
    )
    before = None
    finders = list(sys.meta_path)  # the plugin's own may be among them, where another test has enabled it
    if imported_first:
        core, user = importlib.import_module("hosted.core"), importlib.import_module("hosted.user")
        before = snapshot(core)
    hooks.install()
    hooks.install()  # a second time changes nothing
    core, user = importlib.import_module("hosted.core"), importlib.import_module("hosted.user")
    thing = core.Thing()
    assert core.LIMIT == 4
    assert user.call(1) == core.call(1) == (1, "hooked")
    assert core.Thing.fixed(2) == thing.fixed(2) == (2, "hooked")
    assert core.Thing.made(3) == (("Thing", 3), "hooked")
    assert thing.method(4) == (4, "hooked") and thing.inherited() == ("base", "hooked")
    assert core.Base().inherited() == "base"
    assert {hooks.state(h) for h in hooks.hooks} == {"applied"}
    hooks.remove()
    hooks.remove()
    after = snapshot(core)
    assert after["Thing.inherited"] == "absent" and core.LIMIT == 3
    assert user.call is core.call and core.call(1) == 1
    assert before is None or all(after[name] is before[name] for name in NAMES[1:])
    assert {hooks.state(h) for h in hooks.hooks} == {"off"}
    assert sys.meta_path == finders


def test_what_is_not_there_is_reported_and_nothing_else_changes(package):
    hooks = HookSet([hook("gone", plus_one), hook("Gone.method", plus_one), hook("call", plus_one)], roots=("hosted",))
    assert [hooks.state(h) for h in hooks.hooks] == ["off"] * 3
    hooks.install()
    assert [hooks.state(h) for h in hooks.hooks] == ["pending"] * 3
    core = importlib.import_module("hosted.core")
    assert [hooks.state(h) for h in hooks.hooks] == ["missing", "missing", "applied"]
    hooks.remove()
    assert core.call(1) == 1


def test_a_hooked_module_still_looks_like_itself(package):
    import inspect
    import runpy

    hooks = HookSet([hook("call", plus_one)], roots=("hosted",))
    hooks.install()
    core = importlib.import_module("hosted.core")
    assert "def call" in inspect.getsource(core) and type(core.__loader__).__name__ == "SourceFileLoader"
    assert runpy.run_module("hosted.core")["call"](1) == 1  # `python -m` runs it as a script, unhooked
    hooks.remove()


def test_a_hook_that_is_added_later(package):
    hooks = HookSet([], roots=("hosted",))
    hooks.install()
    core = importlib.import_module("hosted.core")
    for _ in range(2):
        hooks.add(hook("Thing.method", plus_one))
    assert core.Thing().method(1) == (1, "hooked") and len(hooks.hooks) == 1
    hooks.remove()
    assert core.Thing().method(1) == 1
