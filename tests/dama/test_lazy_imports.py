"""Libraries that are loaded at their first use: when a module's file runs, and what can be known before."""

import importlib
import importlib.util
import sys
import threading
from pathlib import Path

import pytest
import torch

from dama.lazy_imports import LazyFinder, UnloadedModule, compile_when_used, load_when_used

pytestmark = pytest.mark.fast

NAME = "a_library_of_this_test"
PACKAGE = """
import builtins, time
time.sleep(0.05)
builtins.{name} = getattr(builtins, {name!r}, 0) + 1
VALUE = 3
from {name}.inner import OTHER
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package that counts its loads in builtins, lazy; the count."""
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "__init__.py").write_text(PACKAGE.format(name=NAME))
    (tmp_path / NAME / "inner.py").write_text("OTHER = 4\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    load_when_used(NAME)
    yield lambda: vars(importlib.import_module("builtins")).get(NAME, 0)
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]
    vars(importlib.import_module("builtins")).pop(NAME, None)


def test_an_import_alone_loads_nothing(library):
    """Nor does a second one, nor what libraries do to learn whether another is installed."""
    module = importlib.import_module(NAME)
    assert importlib.import_module(NAME) is module and type(module) is UnloadedModule
    assert importlib.util.find_spec(NAME).name == NAME and module.__file__.endswith("__init__.py")
    assert library() == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda module: module.VALUE,
        lambda module: vars(module),
        lambda module: setattr(module, "other", 1),
        lambda module: importlib.import_module(f"{NAME}.inner"),
        lambda module: importlib.import_module(NAME).OTHER,
        lambda module: exec(f"from {NAME} import *", {}),
    ],
    ids=["an attribute", "its names", "a new attribute", "a submodule", "a name from a submodule", "a star"],
)
def test_the_first_use_loads_once(library, use):
    module = importlib.import_module(NAME)
    use(module)
    assert library() == 1
    assert (module.VALUE, module.OTHER, module.inner.OTHER) == (3, 4, 4)
    assert library() == 1 and not isinstance(module, UnloadedModule)
    assert module.__loader__ is module.__spec__.loader and not hasattr(module.__loader__, "loader")


@pytest.mark.parametrize(
    "use",
    [lambda module: module.OTHER, lambda module: importlib.import_module(f"{NAME}.inner").OTHER],
    ids=["an attribute", "a submodule"],
)
def test_threads_wait_for_the_load(library, use):
    module, found = importlib.import_module(NAME), []
    threads = [threading.Thread(target=lambda: found.append(use(module))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [4] * 8 and library() == 1


def test_a_module_that_fails_is_imported_anew(library, tmp_path):
    module = importlib.import_module(NAME)
    whole = (tmp_path / NAME / "__init__.py").read_text()
    (tmp_path / NAME / "__init__.py").write_text("raise OSError('no such kernel')\n")
    with pytest.raises(OSError, match="no such kernel"):
        module.VALUE  # noqa: B018
    (tmp_path / NAME / "__init__.py").write_text(f"# mended\n{whole}")
    importlib.invalidate_caches()
    assert importlib.import_module(NAME).VALUE == 3


COMPILED = """
import torch
made = []
def backend(graph, inputs):
    made.append(1)
    return graph.forward
@torch.compile(backend=backend)
def twice(x):
    "Twice x."
    return x + x
@torch.compile
def never(x):
    return x
thrice = torch.compile(lambda x: 3 * x, backend=backend)
"""


def test_functions_are_compiled_at_their_first_call(tmp_path, monkeypatch):
    """With torch.compile as a decorator, with options and without, and called."""
    name = "a_module_with_compiled_functions"
    (tmp_path / f"{name}.py").write_text(COMPILED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    compile_when_used(name)
    compile_now = torch.compile
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    assert torch.compile is compile_now and module.made == [] and module.twice.__doc__ == "Twice x."
    assert module.twice(torch.tensor(2.0)) == 4 and module.twice(torch.tensor(3.0)) == 6
    assert module.thrice(torch.tensor(2.0)) == 6
    assert module.made == [1, 1]


def test_transformers_reads_a_model_folder_once():
    """What a folder's files export is known of all models, and is what the files say."""
    import transformers.models
    from transformers.utils import import_utils

    scan = import_utils.create_import_structure_from_path
    assert scan.cache_info().maxsize is None and scan.cache_info().currsize > 300
    folder = str(Path(transformers.models.__file__).parent / "llama")
    assert scan(folder) == scan.__wrapped__(folder)


def test_a_library_that_is_missing_is_missing():
    assert LazyFinder(["no_such_library"]).find_spec("no_such_library", None) is None
    assert LazyFinder(["no_such_library"]).find_spec("json", None) is None
