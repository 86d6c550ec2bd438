"""HookSet on a small package: applies hooks once, on import, and restores the originals."""

from __future__ import annotations

import importlib
import sys

import pytest

from sf_xfuser.integrations.hooks import Hook, HookSet, wrapper


@pytest.fixture
def package(tmp_path, monkeypatch):
    """hosted/core.py defines attributes; hosted/user.py has one of them by from-import."""
    folder = tmp_path / "hosted"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "core.py").write_text(
        "LIMIT = 3\n"
        "def call(x):\n    return x\n"
        "class Base:\n    def inherited(self):\n        return 'base'\n"
        "class Thing(Base):\n"
        "    @staticmethod\n    def static(x):\n        return x\n"
        "    @classmethod\n    def of_class(cls, x):\n        return (cls.__name__, x)\n"
        "    def method(self, x):\n        return x\n"
    )
    (folder / "user.py").write_text("from hosted.core import call\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "hosted"]:
        del sys.modules[name]


def hook(name, wrap, **options):
    return Hook(module="hosted.core", name=name, wrap=wrap, why="test", remove_when="never", **options)


@wrapper
def mark(original, *args):
    return original(*args), "hooked"


NAMES = ("LIMIT", "call", "Thing.static", "Thing.of_class", "Thing.method", "Thing.inherited")


def snapshot(core):
    found = {}
    for name in NAMES:
        *path, attribute = name.split(".")
        owner = getattr(core, path[0]) if path else core
        found[name] = vars(owner).get(attribute, "absent")
    return found


@pytest.mark.parametrize("imported_first", [False, True])
def test_apply_and_restore(package, imported_first):
    hooks = HookSet(
        [hook("LIMIT", lambda limit: limit + 1)] + [hook(name, mark, sweep=name == "call") for name in NAMES[1:]],
        roots=("hosted",),
    )
    before = None
    finders = list(sys.meta_path)
    if imported_first:
        core, user = importlib.import_module("hosted.core"), importlib.import_module("hosted.user")
        before = snapshot(core)
    hooks.install()
    hooks.install()  # idempotent
    core, user = importlib.import_module("hosted.core"), importlib.import_module("hosted.user")
    thing = core.Thing()
    assert core.LIMIT == 4
    assert user.call(1) == core.call(1) == (1, "hooked")
    assert core.Thing.static(2) == thing.static(2) == (2, "hooked")
    assert core.Thing.of_class(3) == (("Thing", 3), "hooked")
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


def test_missing_attributes_are_reported(package):
    hooks = HookSet([hook("gone", mark), hook("Gone.method", mark), hook("call", mark)], roots=("hosted",))
    assert [hooks.state(h) for h in hooks.hooks] == ["off"] * 3
    hooks.install()
    assert [hooks.state(h) for h in hooks.hooks] == ["pending"] * 3
    core = importlib.import_module("hosted.core")
    assert [hooks.state(h) for h in hooks.hooks] == ["missing", "missing", "applied"]
    hooks.remove()
    assert core.call(1) == 1


def test_a_hooked_module_keeps_its_source_and_loader(package):
    import inspect
    import runpy

    hooks = HookSet([hook("call", mark)], roots=("hosted",))
    hooks.install()
    core = importlib.import_module("hosted.core")
    assert "def call" in inspect.getsource(core) and type(core.__loader__).__name__ == "SourceFileLoader"
    assert runpy.run_module("hosted.core")["call"](1) == 1  # `python -m` runs it as a script, unhooked
    hooks.remove()


def test_add_a_hook_after_import(package):
    hooks = HookSet([], roots=("hosted",))
    hooks.install()
    core = importlib.import_module("hosted.core")
    for _ in range(2):
        hooks.add(hook("Thing.method", mark))
    assert core.Thing().method(1) == (1, "hooked") and len(hooks.hooks) == 1
    hooks.remove()
    assert core.Thing().method(1) == 1
