"""Builds the null device's library once per torch and source, in the user's cache folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llava.rehearsal import stubs

SOURCE = Path(__file__).with_name("null_cuda.c")
LIBRARY = "libnullcuda.so"
DRIVER = "libcuda.so.1"
API = "cuda_runtime_api.h"
# NVIDIA's management library knows the machine's real GPUs, and torch asks it first. An empty file before it on the
# loader's path hides it, as on a machine without a driver.
HIDDEN = "libnvidia-ml.so.1"


class RehearsalError(RuntimeError):
    """A rehearsal is not possible on this machine; the message names what is missing and the remedy."""


def library() -> Path:
    """The null device's shared library, built if it is not in the cache yet (about 3 seconds).

    Raises:
        RehearsalError: a compiler, nm, torch's CUDA build or CUDA's headers are missing, or compiling fails.
    """
    folder = cache_folder()
    if not (folder / LIBRARY).exists():
        check_tools()
        build(folder)
    return folder / LIBRARY


def unavailable() -> str | None:
    """Why no rehearsal is possible on this machine; None where it is."""
    try:
        check_tools()
    except RehearsalError as error:
        return str(error)
    return None


def cache_folder() -> Path:
    """Folder of the library for this torch and these sources."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    sources = b"".join(path.read_bytes() for path in (SOURCE, Path(stubs.__file__), Path(__file__)))
    key = hashlib.sha256(sources + str(torch_folder()).encode()).hexdigest()[:16]
    return Path(cache) / "dama" / "rehearsal" / f"torch-{importlib.metadata.version('torch')}-{key}"


# --- What it is made from --------------------------------------------------------------------------------------------


def check_tools() -> None:
    """Raise RehearsalError unless Linux, a CUDA build of torch and a C compiler are available."""
    if not sys.platform.startswith("linux"):
        raise RehearsalError(f"rehearsal: expected Linux, whose loader preloads libraries, got {sys.platform}")
    if not (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        raise RehearsalError(
            f"rehearsal: expected torch with CUDA, no lib/libtorch_cuda.so in {torch_folder()}; install a wheel with "
            "CUDA (it needs no GPU)"
        )
    for tool, package in (("cc", "a C compiler such as gcc"), ("nm", "binutils")):
        if not shutil.which(tool):
            raise RehearsalError(f"rehearsal: no {tool} on PATH; install {package}")
    cuda_libraries()
    check_headers()


def torch_folder() -> Path:
    """Return the folder of the torch package."""
    return package_folder("torch")


def package_folder(name: str) -> Path:
    """Where a package is installed; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RehearsalError(f"rehearsal: {name} is not installed; install torch's wheel with CUDA")
    return Path(spec.origin).parent


def torch_libraries() -> list[Path]:
    """Return the shared libraries of torch."""
    return sorted((torch_folder() / "lib").glob("lib*.so"))


def cuda_libraries() -> list[Path]:
    """NVIDIA's libraries that get stand-ins, from the wheels that torch depends on."""
    wheels = torch_folder().parent / "nvidia"
    found = {path.name.split(".")[0]: path for path in sorted(wheels.glob("*/lib/lib*.so.*"))}
    missing = sorted({"libcudart", "libcublas", "libcublasLt"} - set(found))
    if missing:
        raise RehearsalError(f"rehearsal: {', '.join(missing)} not found in {wheels}; install torch's wheel with CUDA")
    return [found[name] for name in stubs.STATUS if name in found]


def headers() -> list[Path]:
    """Return the folders of CUDA's headers: of the runtime's wheel, and of triton.

    Triton's release of CUDA may be older than torch's, but it alone has the compiler's headers (crt/).
    """
    return [cuda_runtime().parents[1] / "include", package_folder("triton") / "backends" / "nvidia" / "include"]


def cuda_runtime() -> Path:
    """Return libcudart of the wheel that torch depends on."""
    return next(path for path in cuda_libraries() if path.name.startswith("libcudart."))


def check_headers() -> None:
    """The layout of structures belongs to a major release of CUDA."""
    runtime, compiler = headers()
    if not (compiler / "crt" / "host_defines.h").exists():
        raise RehearsalError(
            f"rehearsal: expected CUDA's headers, none in {compiler}; install the triton of torch's wheel"
        )
    file = next((folder / API for folder in (runtime, compiler) if (folder / API).exists()), compiler / API)
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    version = re.search(r"#define CUDART_VERSION +(\d+)", text)
    got = int(version[1]) // 1000 if version else 0
    expected = int(cuda_runtime().name.split(".so.")[1].split(".")[0])
    if got != expected:
        raise RehearsalError(
            f"rehearsal: expected headers of CUDA {expected}, which torch uses, got CUDA {got} in {file}; "
            "install the nvidia and triton packages that torch's wheel asks for"
        )


# --- Building --------------------------------------------------------------------------------------------------------


def build(folder: Path) -> None:
    """Compiles into a temporary folder and renames it: of two processes that build at once, the first one's is used."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        compile_into(made)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / LIBRARY).exists():
                raise


def compile_into(folder: Path) -> None:
    """Compile the null device and its stand-in libraries."""
    generated = folder / "stubs.c"
    generated.write_text(stubs.stand_ins(torch_libraries(), cuda_libraries(), SOURCE.read_text(encoding="utf-8")))
    include = [f"-I{path}" for path in headers()]
    command = ["cc", "-O1", "-w", "-shared", "-fPIC", *include, f"-Wl,-soname,{LIBRARY}",
               "-o", str(folder / LIBRARY), str(SOURCE), str(generated), "-lpthread"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RehearsalError(f"rehearsal: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    (folder / DRIVER).symlink_to(LIBRARY)
    (folder / HIDDEN).touch()
