"""What the stand-in and the server agree on. Standard library only: the stand-in starts with little else."""

from __future__ import annotations

import json
import os
import signal
import socket

RELAYED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SOCKET, PYTHON, COLD = "DAMA_WARM_SOCKET", "DAMA_WARM_PYTHON", "DAMA_COLD"
NULL_DEVICE, NULL_SERVER = "NULLCUDA_DEVICES", "null"  # in the environment of a process on the null device; its server
COUNTS = ".counts"  # behind the address: the file of what stand-ins became
SERVERS = 2  # the ranks of a group have hash seeds of their own, as real processes have
PACKAGES = ("dama", "llava", "eval", "playground", "scripts", "tools", "tests")
LAUNCHERS = ("torch.distributed.run", "deepspeed.launcher.runner", "deepspeed.launcher.launch")
# What libraries, or the interpreter, read once, when they are imported.
AT_IMPORT = (
    "LD_", "OMP_", "GOMP_", "MKL_", "HF_", "TRANSFORMERS_", "DIFFUSERS_", "TORCH_", "LC_", "LANG",
    "PYTHONHASHSEED", "PYTHONIOENCODING", "PYTHONUTF8", "PYTHONOPTIMIZE", "PYTHONSAFEPATH", "PYTHONHOME",
    "PYTHONNOUSERSITE", "PYTHONDEVMODE", "PYTHONPROFILEIMPORTTIME", "CUDA_HOME", "TRITON_", "BNB_",
)  # fmt: skip
# Gradio's import sets the last one, in whatever process of the tests that happens; nothing asks a hub here.
NOT_AT_IMPORT = ("TORCH_NCCL_", "TORCH_DISTRIBUTED_", "HF_HUB_DISABLE_TELEMETRY")


def at_import(environment: dict[str, str]) -> dict[str, str]:
    """The part of an environment that only a new process can follow."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(AT_IMPORT) and not name.startswith(NOT_AT_IMPORT)
    }


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The names of variables that two environments do not share."""
    return sorted({name for name, _ in one.items() ^ other.items()})


def is_command(words: list[str]) -> bool:
    """Whether the arguments of a Python name a module or a script of this repository, or a launcher of ranks."""
    while words[:1] == ["-u"]:
        words = words[1:]
    if words[:1] == ["-m"] and len(words) > 1:
        return words[1] in LAUNCHERS or words[1].split(".")[0] in PACKAGES
    return bool(words) and words[0].endswith(".py") and is_ours(words[0])


def is_ours(script: str) -> bool:
    """Whether a script lies in a package of this repository."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    place = os.path.relpath(os.path.realpath(script), root)
    return place.split(os.sep)[0] in PACKAGES


def send(to: socket.socket, message: object, descriptors: tuple[int, ...] = ()) -> None:
    """A message on one line of JSON, with open files."""
    line = json.dumps(message).encode() + b"\n"
    sent = socket.send_fds(to, [line[:1]], list(descriptors)) if descriptors else 0
    to.sendall(line[sent:])


def receive(source: socket.socket, descriptors: int = 0) -> tuple[object, list[int]]:
    """The next message and its open files; None at the end."""
    first, files, *_ = socket.recv_fds(source, 1, descriptors) if descriptors else (source.recv(1), [])
    line = bytearray(first)
    while line and not line.endswith(b"\n"):
        got = source.recv(1 << 16 if descriptors else 1)
        if not got:
            break
        line += got
    return (json.loads(line) if line.endswith(b"\n") else None), list(files)
