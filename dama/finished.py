"""Calls that have finished: the same call again on the same files ends at once, before long imports and reading.

A receipt in the user's cache (dama/cache.py) holds what a finished call depended on. Where anything differs (a flag, a
file, an image, this repository's code, the output itself) the command decides by its inputs' fingerprints, as ever.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dama.cache import cache_folder, cache_name, code_digest, mark_used, save
from dama.console import digest_of_file, write_atomic
from dama.image_table import SETTLED_NS, ImageTable, table_of_images
from dama.images import ImageFolder, plain_folder
from dama.stage import MANIFEST, Record, files_of_stage, log_complete

MAX_FILES = 10_000  # that the flags name; with more of them no receipt is written
# Flags whose values are names, whatever folder has the same one.
NOT_PATHS = (
    "command", "corruption", "loss", "precision", "report_to", "selection", "strategy", "task", "variant", "version"
)  # fmt: skip
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
Stamp = list[Any]  # size, times of modification and change, inode; a digest where the file had just been written


@dataclass(frozen=True)
class Call:
    """A command as it was called, and the files that its flags name as they were then.

    Attributes:
        name: of its receipt. files: path -> stamp; None where there are too many.
    """

    name: str
    files: dict[str, Stamp] | None

    @staticmethod
    def begin(command: str, settings: Any, named: Iterable[str], out: str | Path) -> Call:
        """Take the stamps before anything is read.

        Args:
            settings: all flags, as JSON values. named: those of their values that may name a file, a folder or a model
                on the hub, image folders left out. out: the output folder, whose files do not count.
        """
        name = cache_name("finished", command, settings, str(Path.cwd()), code_digest())
        return Call(name, stamps(files_of(named, Path(out))))

    def is_finished(self) -> bool:
        """Whether the call finished before, and nothing that it depends on is different now."""
        cache = cache_folder()
        receipt = _read(cache / self.name) if cache else None
        if cache is None or receipt is None or self.files is None:
            return False
        try:
            same = (
                all(_is_same(path, stamp, self.files) for path, stamp in receipt["files"].items())
                and len(self.files) == receipt["named"]
                and all(digest_of_file(path) == digest for path, digest in receipt["outputs"].items())
                and table_of_images(receipt["images"], receipt["folders"]).identity == receipt["identity"]
            )
        except (OSError, KeyError, TypeError, AttributeError):
            return False
        mark_used(cache / self.name)
        return same

    def remember(
        self, outputs: Sequence[Path], table: ImageTable, folders: ImageFolder, more: Iterable[str | Path] = ()
    ) -> None:
        """Write the receipt of a call that has finished.

        Args:
            outputs: files that vouch for the output. table: of all images. more: files and folders that the call read
                besides those that its flags name.
        """
        cache = cache_folder()
        others = stamps(files_of(map(str, more), None))
        if cache is None or self.files is None or others is None:
            return
        content = {
            "files": others | self.files,
            "named": len(self.files),
            "outputs": {str(path.absolute()): digest_of_file(path) for path in outputs},
            "images": [*table.good, *table.bad, *table.outside],
            "folders": plain_folder(folders),
            "identity": table.identity,
        }
        text = json.dumps(content, separators=(",", ":"))
        save(text, cache / self.name, lambda value, path: write_atomic(path, value))


@dataclass(frozen=True)
class StageCall:
    """A call of a stage's command, by its flags as `dama.flags.add_pair_flags` declares them."""

    stage: str
    args: argparse.Namespace
    call: Call

    @staticmethod
    def begin(stage: str, args: argparse.Namespace) -> StageCall:
        """Take the stamps before anything is read."""
        settings = {name: value for name, value in vars(args).items() if name not in ("local_rank", "rest")}
        inputs = [value for name, value in settings.items() if name not in ("image_folder", "out", *NOT_PATHS)]
        named = [word for value in inputs for word in (value if isinstance(value, list | tuple) else [value])]
        return StageCall(stage, args, Call.begin(stage, settings, filter(_is_text, named), args.out))

    def manifest(self) -> Record | None:
        """The manifest of the complete stage, which is logged; None where the stage has to look at its inputs."""
        if self.args.overwrite or not self.call.is_finished():
            return None
        manifest = json.loads((Path(self.args.out) / MANIFEST).read_bytes())
        log_complete(self.stage, Path(self.args.out), manifest)
        return manifest

    def remember(self, table: ImageTable, more: Iterable[str | Path] = (), additions: Iterable[Path] = ()) -> None:
        """Write the receipt of the complete stage; see `Call.remember`.

        Args:
            additions: folders of complete stages that belong to this one.
        """
        outputs = [path for folder in (Path(self.args.out), *additions) for path in files_of_stage(folder, self.stage)]
        self.call.remember(outputs, table, self.args.image_folder, more)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        receipt = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return receipt if isinstance(receipt, dict) else None


def _is_same(path: str, stamp: Stamp, now: Mapping[str, Stamp]) -> bool:
    """Whether a file is as it was; one that had just been written then is compared by its bytes, too."""
    current = now[path] if path in now else stamp_of(path)
    return current[:4] == stamp[:4] and (len(stamp) == 4 or digest_of_file(path) == stamp[4])


def files_of(named: Iterable[str], out: Path | None) -> Iterator[str]:
    """Absolute paths of the files, of all files below the folders, and of the hub's models in its cache."""
    for word in named:
        path = Path(word) if word and "\0" not in word else None
        if path is None or len(word) > 4096:
            continue
        try:
            place = path if path.exists() else _hub_folder(word)
        except OSError:  # a name too long
            continue
        if place is not None and place.is_file():
            yield str(place.absolute())
        elif place is not None:
            yield from _files_below(place.absolute(), out and out.absolute())


def _files_below(folder: Path, out: Path | None) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = [] if Path(root) == out else folders
        if Path(root) != out:
            yield from (os.path.join(root, name) for name in names)


def _hub_folder(name: str) -> Path | None:
    """Where the hub's library keeps a model that it has downloaded; None for what is no name of one."""
    if not HUB_NAME.fullmatch(name):
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    folder = cache / f"models--{name.replace('/', '--')}"
    return folder if folder.is_dir() else None


def stamps(paths: Iterable[str]) -> dict[str, Stamp] | None:
    """The stamp of every file; None for more than MAX_FILES."""
    found: dict[str, Stamp] = {}
    for path in paths:
        if len(found) >= MAX_FILES:
            return None
        if os.path.exists(path):  # a link may lead nowhere
            found[path] = stamp_of(path)
    return found


def stamp_of(path: str) -> Stamp:
    """Size, times in nanoseconds and inode; with the digest of a file that may still change within its times' steps."""
    about = os.stat(path)
    stamp = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
    settled = max(about.st_mtime_ns, about.st_ctime_ns) < time.time_ns() - SETTLED_NS
    return stamp if settled or not os.path.isfile(path) else [*stamp, digest_of_file(path)]
