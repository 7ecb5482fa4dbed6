"""Stands in for Python in the tests: a fork of a process that has imported the libraries, or a real Python."""

import os
import resource
import signal
import socket
import sys
from contextlib import suppress

from protocol import (
    COLD,
    COUNTS,
    NULL_DEVICE,
    NULL_SERVER,
    PYTHON,
    RELAYED,
    SERVERS,
    SOCKET,
    at_import,
    is_command,
    receive,
    send,
)


def real(why: str) -> None:
    """Become the real Python."""
    count(why)
    os.execv(os.environ[PYTHON], [os.environ[PYTHON], *sys.argv[1:]])


def count(what: str) -> None:
    """Write a line for the summary of the tests."""
    if SOCKET in os.environ:
        with suppress(OSError), open(os.environ[SOCKET] + COUNTS, "ab", buffering=0) as file:
            file.write(f"{what}\t{os.environ.get('PYTEST_CURRENT_TEST', '')}\t{sys.argv[1:][:3]}\n".encode())


def limits() -> dict[str, list[int]]:
    """Of this process's resources, by name."""
    return {name: list(resource.getrlimit(getattr(resource, name))) for name in dir(resource) if name[:7] == "RLIMIT_"}


def umask() -> int:
    """Of this process, which can only be read by setting it."""
    os.umask(mask := os.umask(0))
    return mask


def address() -> str:
    """Of the server whose kind this process is of."""
    rank = int(os.environ.get("LOCAL_RANK", os.getpid()))
    return f"{os.environ[SOCKET]}{NULL_SERVER if NULL_DEVICE in os.environ else rank % SERVERS}"


def warm() -> int | str:
    """The status of the command, or why there is no fork: the server is gone or of another environment."""
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(address())
        ignored = [number for number in RELAYED if signal.getsignal(number) == signal.SIG_IGN]
        for number in RELAYED:  # what comes before the process id is known waits
            signal.pthread_sigmask(signal.SIG_BLOCK, [number])
        request: dict[str, object] = {
            "words": sys.argv[1:],
            "folder": os.getcwd(),
            "environment": dict(os.environ),
            "ignored": ignored,
        }
        request |= {"at_import": at_import(dict(os.environ)), "limits": limits(), "umask": umask()}
        send(server, request, (0, 1, 2))
        answer, _ = receive(server)
    except OSError:
        answer = None
    if not answer or "pid" not in answer:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, RELAYED)
        return "the server is gone" if answer is None else f"{', '.join(answer['differ'])} differ"
    count("forked")
    for number in RELAYED:
        if number not in ignored:
            signal.signal(number, lambda number, frame: os.kill(answer["pid"], number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, RELAYED)
    ended, _ = receive(server)
    if ended is None:
        sys.exit("tests/warm: the server ended before the command")
    return ended["status"]


if os.environ.get(COLD):
    real("asked for")
if SOCKET not in os.environ or not is_command(sys.argv[1:]):
    real("no command of the repository")
status = warm()
if isinstance(status, str):
    real(status)
else:
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-status])
        os.kill(os.getpid(), -status)
    os._exit(status)
