"""Signatures of checkpoints: only what this user's own runs wrote is resumed.

DeepSpeed's checkpoints are pickles that can run code when they are loaded. A checkpoint's seal therefore has the
SHA-256 of each of its files under an HMAC, whose key is kept in the user's configuration folder, outside every output
folder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dama.console import log

SEAL_FILE = "dama_seal.json"  # in every checkpoint: its files' sizes and digests, written when every rank has saved
TRAINER_STATE = "trainer_state.json"  # transformers', written after the seal
KEY_FILE = "checkpoint.key"
KEY_BYTES = 32
THREADS = 8  # files read at a time


def key_path() -> Path:
    """The key's place: $DAMA_CONFIG_HOME, else $XDG_CONFIG_HOME/dama, else ~/.config/dama; shared by a home's nodes."""
    if own := os.environ.get("DAMA_CONFIG_HOME"):
        return Path(own) / KEY_FILE
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "dama" / KEY_FILE


def signing_key(create: bool = True) -> bytes | None:
    """The key, made at its first use with mode 0600; None where there is none and none is to be made.

    Raises:
        ValueError: others may read the key, it is of another user, or it is damaged.
    """
    path = key_path()
    try:
        if create and not path.exists():
            _create_key(path)
        with open(path, "rb", opener=_without_following_links) as file:
            about, key = os.fstat(file.fileno()), file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(
            f"signing key '{path}': expected a file that this user can create and read, got an error "
            f"({error.strerror}). Name a folder of yours outside every output folder in DAMA_CONFIG_HOME."
        ) from error
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
        raise ValueError(
            f"signing key '{path}': expected a file of this user with mode 0600, got mode "
            f"{stat.S_IMODE(about.st_mode):04o} of user {about.st_uid}. If nobody else has read it, run chmod 600 on "
            "it; otherwise remove it, and resume older checkpoints with --trust_checkpoint True."
        )
    if len(key) != KEY_BYTES:
        raise ValueError(f"signing key '{path}': expected {KEY_BYTES} bytes, got {len(key)}. Remove the file.")
    return key


def _without_following_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _create_key(path: Path) -> None:
    """Write a new key under a name of its own and link it into place: of several processes the first one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    own = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(own, path)
        except FileExistsError:
            return
    finally:
        own.unlink()


def files_to_seal(folder: Path) -> list[str]:
    """The files of a checkpoint that its seal lists, relative to it; a link to a folder counts as a file.

    Names with a dot in front are what an interrupted save left of files on their way; no loader looks at them.
    """
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [n.as_posix() for n in names if n.name not in (SEAL_FILE, TRAINER_STATE) and not n.name.startswith(".")]


def signed(folder: Path, seal: dict[str, Any]) -> dict[str, Any]:
    """The seal with the digests of its files and their signature."""
    key = signing_key()
    assert key is not None
    seal = seal | {"sha256": digests(folder, list(seal["sizes"]))}
    return seal | {"signature": signature(seal, key)}


def digests(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of each file."""

    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def signature(seal: dict[str, Any], key: bytes) -> str:
    """HMAC-SHA-256 of everything in the seal but the signature itself."""
    content = {name: value for name, value in seal.items() if name != "signature"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode("utf-8"), hashlib.sha256).hexdigest()


def validate_signature(checkpoint: Path, *, trust: bool = False) -> None:
    """Raise unless this user's own run wrote every file of the checkpoint; with `trust` print why not, and go on.

    Ranks of one run share the reading: each checks its part of the files, and none gets past the first collective
    unless all have.

    Raises:
        ValueError: with the reason.
    """
    reason = signature_problem(checkpoint)
    if reason is None:
        return
    if trust:
        log(f"warning: {checkpoint} is resumed although {reason} (--trust_checkpoint True)")
        return
    raise ValueError(
        f"{checkpoint}: expected a checkpoint that a run of this user wrote and signed, but {reason}. Loading it could "
        "run code that its files contain. If you made it yourself, for example on another machine or with an older "
        "release, add --trust_checkpoint True; otherwise remove the folder, or give another --output_dir."
    )


def signature_problem(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being this user's own; None where nothing does."""
    try:
        seal = json.loads((checkpoint / SEAL_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return f"{SEAL_FILE} is missing or damaged"
    if not isinstance(seal, dict) or not isinstance(seal.get("sha256"), dict) or "signature" not in seal:
        return f"{SEAL_FILE} has no signature"
    key = signing_key(create=False)
    if key is None:
        return f"this user has no key to check it with ('{key_path()}')"
    found = str(seal["signature"]).encode("utf-8", "replace")
    if not hmac.compare_digest(found, signature(seal, key).encode("ascii")):
        return f"the signature in {SEAL_FILE} is not of this user's key ('{key_path()}')"
    there, listed = set(files_to_seal(checkpoint)), set(seal["sha256"])
    if there != listed:
        return f"its files are not those that were signed ({', '.join(sorted(there ^ listed)[:4])})"
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    mine = sorted(listed)[rank::ranks]
    changed = [name for name, digest in digests(checkpoint, mine).items() if digest != seal["sha256"][name]]
    return f"{', '.join(changed[:4])} changed after it was signed" if changed else None
