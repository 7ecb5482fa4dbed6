"""What test_warm.py starts: says what it is, then ends as its first argument says."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time


def main(how: str) -> None:
    """Print what this process is, and end."""
    mask = os.umask(0)
    torch = sys.modules.get("torch")
    about: dict[str, object] = {"gpus": torch.cuda.device_count() if torch else None}
    about |= {"pid": os.getpid(), "words": sys.argv[1:], "folder": os.getcwd(), "umask": mask, "said": sys.stdin.read()}
    about["scratch"] = tempfile.gettempdir()
    sys.stdout.write(json.dumps(about | {"warm": torch is not None, "given": os.environ.get("GIVEN")}) + "\n")
    sys.stdout.flush()
    if how == "exit 3":
        sys.exit(3)
    if how == "message":
        sys.exit("a message")
    if how == "error":
        raise ValueError("an error")
    if how == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "sleep":
        time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1])
