"""What a start waits for while DeepSpeed compiles its operators, which it does without a word.

torch compiles each operator once on a machine, in a folder of its cache with a file `lock` in it. A process that is
killed meanwhile leaves the file behind, and every later one waits for its removal, for ever.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dama.console import printable

PATIENCE_S = 10.0  # before a line says what a start waits for
PULSE_S = 1.0
LOCK, BUILD = "file_baton.py", "cpp_extension.py"  # torch's files of the functions below
BUILDING = "_write_ninja_file_and_build_library"


@contextmanager
def watched_builds(patience_s: float = PATIENCE_S) -> Iterator[None]:
    """A block that may compile operators, or wait for others that do: a line on standard error names each one.

    The first process on each machine prints.

    Args:
        patience_s: seconds in the same place before that is printed.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    ended, watched = threading.Event(), threading.get_ident()
    watch = threading.Thread(target=_watch, args=(watched, ended, patience_s), daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(thread: int, ended: threading.Event, patience_s: float) -> None:
    place, waited, told = "", 0.0, set[str]()
    while not ended.wait(min(PULSE_S, patience_s)):
        found = _waiting_in(sys._current_frames().get(thread))
        waited = waited + min(PULSE_S, patience_s) if found == place else 0.0
        place = found
        if place and waited >= patience_s and place not in told:
            told.add(place)
            sys.stderr.write(printable(place) + "\n")
            sys.stderr.flush()


def _waiting_in(frame: FrameType | None) -> str:
    """What a thread with this stack waits for; empty where it is neither a build nor a lock."""
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name == "wait" and file.endswith(LOCK):
            return lock_message(Path(frame.f_locals["self"].lock_file_path))
        if name == BUILDING and file.endswith(BUILD):
            return f"compiling DeepSpeed's operator {frame.f_locals['name']}: once on a machine, a minute or more"
        frame = frame.f_back
    return ""


def lock_message(lock: Path) -> str:
    """What waiting for a lock means: another process that compiles, or a file that was left behind."""
    if is_open(lock):
        return f"waiting for another process that compiles DeepSpeed's operator {lock.parent.name}"
    return (
        f"waiting for {lock}, which no process on this machine holds: a training that was killed while DeepSpeed "
        f"compiled has left it behind. If nothing compiles in that folder on another machine either, stop this "
        f"training, remove the folder, and start again: rm -r {lock.parent}"
    )


def is_open(path: Path) -> bool:
    """Whether a process of this machine has a file open, as far as this user may see."""
    try:
        wanted = path.stat()
    except FileNotFoundError:
        return False
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = handle.stat()
        except OSError:  # another user's process, or one that has ended
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False
