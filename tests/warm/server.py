"""Imports libraries once, then forks a process for every command that a stand-in asks for: `server.py ADDRESS PIPE`.

A fork has the libraries, and its caller's arguments, environment, folder, limits, streams and signals. When its
stand-in dies it is killed with the processes of its group, as those are that share a group with a real Python.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import io
import logging
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path[0] = str(Path(__file__).resolve().parent)  # protocol.py, without the package around it
from protocol import NULL_DEVICE, PYTHON, RELAYED, at_import, differing, receive, send  # noqa: E402

# What the commands of this repository import; nothing of this repository itself.
LIBRARIES = (
    "torch", "torch.distributed.run", "torch.utils.cpp_extension", "torchvision", "transformers",
    "transformers.trainer", "transformers.generation.utils", "transformers.models.auto.modeling_auto",
    "transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama", "accelerate", "peft",
    "bitsandbytes", "deepspeed", "deepspeed.runtime.engine", "deepspeed.launcher.launch", "deepspeed.launcher.runner",
    "open_clip", "safetensors.torch", "sentencepiece", "openai", "PIL.Image", "pyarrow.parquet", "jinja2", "numpy",
    "tqdm", "matplotlib.pyplot",
)  # fmt: skip
BIN = Path(sys.argv[1]).with_name("bin")  # the stand-in and the launchers


class Server:
    """One process that forks.

    Attributes:
        known: what of the environment the libraries have read.
        added: what they have written to it.
        callers: the connection to the stand-in of each fork that runs, by process id.
    """

    def __init__(self, address: str, owner: int) -> None:
        self.owner, self.listener = owner, socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        before = dict(os.environ)
        self.known = at_import(before)
        os.environ["DS_ACCELERATOR"] = "cuda" if NULL_DEVICE in before else "cpu"  # what DeepSpeed finds
        with without_counting_devices():
            import_libraries()
        self.added = {name: value for name, value in os.environ.items() if name not in {*before, "DS_ACCELERATOR"}}
        self.ended, self.wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.callers: dict[int, socket.socket] = {}
        self.selector = selectors.DefaultSelector()
        for source in (self.listener, self.owner, self.ended):
            self.selector.register(source, selectors.EVENT_READ)

    def serve(self) -> dict[str, Any] | None:
        """Answer until the owner ends; in a fork, return what it is to run."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.owner:
                    for pid in self.callers:
                        kill_group(pid)
                    return None
                if key.fileobj is self.ended:
                    os.read(self.ended, 4096)
                    self.bury()
                elif key.fileobj is self.listener:
                    if request := self.answer(self.listener.accept()[0]):
                        return request
                elif key.data in self.callers and is_dead(self.callers[key.data]):
                    kill_group(key.data)
                    self.selector.unregister(self.callers[key.data])

    def answer(self, caller: socket.socket) -> dict[str, Any] | None:
        """Fork, or say why this process cannot be what is asked for; in the fork, return the request.

        A stand-in may be killed at any moment: whatever it no longer sends or takes is left at that.
        """
        request, streams = None, []
        with suppress(OSError, ValueError):
            request, streams = receive(caller, 3)
        if not isinstance(request, dict):
            caller.close()
        elif differ := differing(request["at_import"], self.known):
            with suppress(OSError):
                send(caller, {"differ": differ})
            caller.close()
        else:
            if (pid := os.fork()) == 0:
                self.close(caller)
                return request | {"environment": self.added | request["environment"], "streams": streams}
            with suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, pid)  # as the fork does: whoever comes first
            with suppress(OSError):
                send(caller, {"pid": pid})
            self.callers[pid] = caller
            self.selector.register(caller, selectors.EVENT_READ, pid)
        for descriptor in streams:
            os.close(descriptor)
        return None

    def close(self, caller: socket.socket) -> None:
        """In a fork: let go of everything that is the server's."""
        signal.set_wakeup_fd(-1)
        self.selector.close()
        for each in (self.listener, caller, *self.callers.values()):
            each.close()
        for descriptor in (self.owner, self.ended, self.wakeup):
            os.close(descriptor)

    def bury(self) -> None:
        """Tell the stand-ins of forks that have ended."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                caller = self.callers.pop(ended[0])
                with suppress(KeyError):  # of a dead one
                    self.selector.unregister(caller)
                with suppress(OSError):
                    send(caller, {"status": os.waitstatus_to_exitcode(ended[1])})
                caller.close()


@contextmanager
def without_counting_devices() -> Iterator[None]:
    """Importing torch's compiler or bitsandbytes would have torch count the GPUs, of which a fork can have others."""
    import torch

    with patch.multiple(torch.cuda, is_available=lambda: False, device_count=lambda: 0):
        yield


def import_libraries() -> None:
    """Import all of them without a word, and keep their objects out of every later collection."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LIBRARIES:
            importlib.import_module(name)
    logging.disable(logging.NOTSET)
    gc.collect()
    gc.freeze()  # or the first collection of a fork would copy every page


def is_dead(caller: socket.socket) -> bool:
    """Whether the process at the other end of a connection, which says nothing more, has ended."""
    try:
        return not caller.recv(1)
    except OSError:
        return True


def kill_group(group: int) -> None:
    """Kill all processes of a group."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


# --- In a fork -------------------------------------------------------------------------------------------------------


def become(request: dict[str, Any]) -> None:
    """Take over everything that makes this process the command that the caller asked for."""
    with suppress(PermissionError):
        os.setpgid(0, 0)
    for number in (*RELAYED, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.umask(request["umask"])
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, name), tuple(limit))
    environment, words = request["environment"], request["words"]
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    if NULL_DEVICE in environment:
        ctypes.CDLL(None).nullcuda_read_environment()
        sys.modules["torch.cuda"]._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]  # no driver is lost
    tempfile.tempdir = None  # what an import has found, by the server's environment
    take_streams(request["streams"], words[:1] == ["-u"] or bool(environment.get("PYTHONUNBUFFERED")))
    sys.warnoptions[:] = [option for option in environment.get("PYTHONWARNINGS", "").split(",") if option]
    warnings._processoptions(sys.warnoptions)  # type: ignore[attr-defined]
    sys.executable, sys.orig_argv = str(BIN / "python"), [environment[PYTHON], *words]
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def take_streams(streams: list[int], unbuffered: bool) -> None:
    """Make the caller's standard streams this process's, buffered as Python buffers them."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), sys.stdin.encoding, "strict")
    sys.stdout = output(1, sys.stdout, unbuffered, os.isatty(1))
    sys.stderr = output(2, sys.stderr, unbuffered, True)
    vars(sys).update({f"__{name}__": getattr(sys, name) for name in ("stdin", "stdout", "stderr")})


def output(descriptor: int, like: Any, unbuffered: bool, by_lines: bool) -> io.TextIOWrapper:
    """A text stream to an open file."""
    raw = io.FileIO(descriptor, "w", closefd=False)
    binary: Any = raw if unbuffered else io.BufferedWriter(raw)
    return io.TextIOWrapper(binary, like.encoding, like.errors, line_buffering=by_lines, write_through=unbuffered)


def run(words: list[str]) -> None:
    """The command, as the real Python would run it as __main__."""
    while words[:1] == ["-u"]:
        words = words[1:]
    module: Any = types.ModuleType("__main__")
    module.__builtins__ = __builtins__
    sys.modules["__main__"] = module
    if words[0] == "-m":
        sys.argv[:], sys.path[0] = words[1:], os.getcwd()
        sys.modules.pop(words[1], None)  # a launcher among the libraries: runpy warns of a module that is there
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
    else:
        sys.argv[:], sys.path[0] = words, os.path.dirname(os.path.realpath(words[0]))
        module.__file__ = words[0]
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), module.__dict__)


def status_of(words: list[str]) -> int:
    """Run the command; the exit status that the interpreter would have, its message printed."""
    try:
        run(words)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def leave(status: int) -> None:
    """End as the interpreter does, without tearing down the libraries, which takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 120
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    asked = Server(sys.argv[1], int(sys.argv[2])).serve()
    if asked:
        become(asked)
        leave(status_of(asked["words"]))
