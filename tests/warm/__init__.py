"""Child processes of tests that do not import torch, transformers and DeepSpeed anew: `stand_in.py` beside `server.py`.

A Python that trains spends twelve seconds of processor time on importing libraries, and the tests start hundreds.
`start()` starts two processes that have imported the libraries, and nothing of this repository, and a third one on the
null device, and lets `sys.executable` name a stand-in. The stand-in asks one of them to fork, which takes milliseconds;
the fork becomes the command, with the caller's arguments, environment, folder, limits, standard streams and signals,
and with a process id of its own. Bash scripts find the stand-in where they call `python`. What the libraries read from
the environment at import must be the same; else, and for everything that is no command of this repository, the stand-in
becomes a real Python. DAMA_COLD=1 asks for that.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.warm.protocol import COLD, COUNTS, NULL_SERVER, PYTHON, SERVERS, SOCKET

HOME = Path(__file__).parent
LAUNCHERS = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}


def start() -> None:
    """Start the servers, unless they run or DAMA_COLD is set, and let sys.executable name the stand-in."""
    if os.environ.get(COLD) or os.environ.get(SOCKET):
        return
    folder = tempfile.TemporaryDirectory(prefix="dama-warm-")
    atexit.register(folder.cleanup)
    end, ours = os.pipe()  # the servers end when this process does, however that happens
    address, script = f"{folder.name}/socket", str(HOME / "server.py")
    write_programs(Path(folder.name) / "bin")
    servers = [
        subprocess.Popen(
            [sys.executable, script, address + kind, str(end)], env=variables, pass_fds=(end,), start_new_session=True
        )
        for kind, variables in environments().items()
    ]
    os.close(end)
    atexit.register(lambda: (os.close(ours), [server.wait() for server in servers]))
    os.environ |= {SOCKET: address, PYTHON: sys.executable}
    use()


def environments() -> dict[str, dict[str, str]]:
    """The environment of each server, by the end of its address; one is on the null device, where that is possible."""
    from llava.rehearsal.build import RehearsalError  # here: a command of this package has nothing of the repository's
    from llava.rehearsal.launch import environment

    found = {str(number): dict(os.environ) for number in range(SERVERS)}
    with suppress(RehearsalError):
        found[NULL_SERVER] = environment()
    return found


def write_programs(folder: Path) -> None:
    """Write the stand-in and the launchers of ranks beside it; they need nothing on PATH."""
    folder.mkdir()
    stand_in = f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(HOME)!r})\nimport stand_in\n"
    programs = {"python": stand_in} | {
        name: f'#!/bin/sh\nexec "{folder}/python" -m {module} "$@"\n' for name, module in LAUNCHERS.items()
    }
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def use() -> None:
    """Let sys.executable, and `python` in bash scripts, name the stand-in where servers run."""
    if SOCKET in os.environ and not os.environ.get(COLD):
        sys.executable = str(Path(os.environ[SOCKET]).with_name("bin") / "python")
        os.environ["BASH_FUNC_python%%"] = f'() {{ "{sys.executable}" "$@"; }}'  # noqa: SIM112


def counts() -> str:
    """How many processes forked, and why the others did not; empty where no server ran."""
    path = Path(os.environ.get(SOCKET, "") + COUNTS)
    if not path.exists():
        return ""
    became = Counter(line.split("\t")[0] for line in path.read_text().splitlines())
    return f"{became.pop('forked', 0)} processes forked; real Pythons: " + (
        ", ".join(f"{count} ({why})" for why, count in became.most_common()) or "none"
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process whose standard output is a pipe, and wait until its fork has ended, which holds that pipe too."""
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def cold() -> dict[str, str]:
    """The environment of a child process that must import everything itself."""
    return dict(os.environ) | {COLD: "1"}
