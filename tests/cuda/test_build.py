"""Building the null device's library, starting programs on it, and what is reported where that is not possible."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from llava.rehearsal import build
from llava.rehearsal.engine import single_rank_world
from llava.rehearsal.launch import environment
from llava.rehearsal.mode import NullMode
from tests.cuda.conftest import ROOT

needs_cuda_build = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dama" / "rehearsal"


def start(*words, **variables):
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=os.environ | variables)  # fmt: skip


@needs_cuda_build
def test_two_processes_build_one_library_and_a_third_finds_it(cache, monkeypatch):
    program = "from llava.rehearsal.build import library; print(library())"
    builders = [start("-c", program) for _ in range(2)]
    outputs = [builder.communicate()[0].strip() for builder in builders]
    assert outputs[0] == outputs[1] and Path(outputs[0]).is_relative_to(cache)
    assert [path.name for path in cache.iterdir()] == [Path(outputs[0]).parent.name]
    monkeypatch.setenv("PATH", "")  # no compiler: it is not built again
    assert build.library() == Path(outputs[0])


@needs_cuda_build
def test_other_sources_get_another_library(cache, tmp_path, monkeypatch):
    before = build.cache_folder()
    changed = tmp_path / "null_cuda.c"
    changed.write_text(build.SOURCE.read_text() + "\n")
    monkeypatch.setattr(build, "SOURCE", changed)
    assert build.cache_folder() != before


@needs_cuda_build
def test_a_compilers_errors_are_shown_and_nothing_is_left(cache, tmp_path, monkeypatch):
    broken = tmp_path / "null_cuda.c"
    broken.write_text("int broken(")
    monkeypatch.setattr(build, "SOURCE", broken)
    with pytest.raises(build.RehearsalError, match=r"cc .* failed:\n(.|\n)*null_cuda\.c:1"):
        build.library()
    assert not list(cache.iterdir())


@needs_cuda_build
@pytest.mark.parametrize("tool, package", [("cc", "a C compiler such as gcc"), ("nm", "binutils")])
def test_a_missing_tool_is_named(cache, tmp_path, monkeypatch, tool, package):
    tools = tmp_path / "tools"
    tools.mkdir()
    for other in {"cc", "nm"} - {tool}:
        (tools / other).symlink_to(shutil.which(other))
    monkeypatch.setenv("PATH", str(tools))
    assert build.unavailable() == f"rehearsal: no {tool} on PATH; install {package}"
    with pytest.raises(build.RehearsalError, match=f"no {tool} on PATH"):
        build.library()
    done = start("-m", "llava.rehearsal", "x.py", PATH=str(tools), XDG_CACHE_HOME=str(tmp_path / "other"))
    assert f"no {tool} on PATH; install {package}" in done.communicate()[0] and done.returncode == 2


@needs_cuda_build
@pytest.mark.parametrize(
    "package, message",
    [("torch", "expected torch with CUDA, no lib/libtorch_cuda.so"), ("triton", "expected CUDA's headers, none in ")],
)
def test_a_missing_part_of_a_package_is_named(tmp_path, monkeypatch, package, message):
    """Folders that hold the package without its CUDA part stand for the packages of a CPU build."""
    found = build.package_folder
    monkeypatch.setattr(build, "package_folder", lambda name: tmp_path if name == package else found(name))
    assert message in build.unavailable() and "; install " in build.unavailable()


@needs_cuda_build
def test_headers_of_another_cuda_are_refused(tmp_path, monkeypatch):
    header = tmp_path / "cuda_runtime_api.h"
    header.write_text("#define CUDART_VERSION  11080\n")
    _, compiler = build.headers()
    monkeypatch.setattr(build, "headers", lambda: [tmp_path, compiler])
    assert "expected headers of CUDA " in build.unavailable() and f"got CUDA 11 in {header}" in build.unavailable()


@needs_cuda_build
def test_an_older_triton_is_no_obstacle(tmp_path, monkeypatch):
    """The wheel of torch 2.11 for CUDA 13 asks for a triton that has the headers of CUDA 12."""
    runtime, compiler = build.headers()
    shutil.copytree(compiler, tmp_path / "include")
    (tmp_path / "include" / build.API).write_text("#define CUDART_VERSION  12080\n")
    monkeypatch.setattr(build, "headers", lambda: [runtime, tmp_path / "include"])
    assert build.unavailable() is None
    build.compile_into(tmp_path)
    assert (tmp_path / build.LIBRARY).exists()


@pytest.mark.parametrize("wrong", [{"gib": 0}, {"gib": -1}, {"devices": 0}, {"devices": 9}])
def test_an_impossible_device_is_refused(wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {wrong[name]}"):
        environment(**wrong)


@needs_cuda_build
def test_a_program_gets_its_arguments_and_device_and_returns_its_status(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, torch; print(sys.argv[1:], torch.cuda.get_device_properties(1).name, "
                      "torch.cuda.get_device_capability(), torch.cuda.mem_get_info()[1]); sys.exit(3)")  # fmt: skip
    child = start("-m", "llava.rehearsal", "--gib", "1.5", "--devices", "2", "--name", "A card", "--capability", "8.6",
                  str(script), "--gib", "7", "-m", "x", CUDA_VISIBLE_DEVICES="")  # fmt: skip
    output = child.communicate()[0]
    assert output.strip() == f"['--gib', '7', '-m', 'x'] A card (8, 6) {3 * 2**29}" and child.returncode == 3


def test_the_mode_refuses_a_process_without_a_null_device():
    with pytest.raises(RuntimeError, match="expected a start by python -m llava.rehearsal SCRIPT"):
        NullMode()


def test_a_rank_of_a_world_and_back():
    import deepspeed.runtime.zero.stage3 as stage3

    before, check = dict(os.environ), stage3.is_invalid_grad_norm
    with single_rank_world(4, rank=1):
        assert (dist.get_rank(), dist.get_world_size(), os.environ["LOCAL_RANK"]) == (1, 4, "1")
        assert stage3.is_invalid_grad_norm(float("nan")) is False
        with pytest.raises(RuntimeError, match="expected no process group"), single_rank_world(2):
            pass
    assert not dist.is_initialized() and dict(os.environ) == before and stage3.is_invalid_grad_norm is check
    with single_rank_world(1, numbers=True):
        assert stage3.is_invalid_grad_norm is check
