"""The benchmarks' official files, from their own homes: `python -m eval.download [objhal amber mmhal ...]`.

Files come at a pinned revision and are checked against their SHA-256. Where none is known, the content is checked, and
the digest of the first download is recorded in downloads.json, shown, and asked for ever after. Files go to
playground/data/eval, or to the folder that DAMA_BENCH_DATA names; what is there already is only checked. Interrupted
downloads are continued.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote, urlsplit

from tqdm import tqdm

from dama.console import report_error, say, write_atomic, write_json
from dama.errors import error_list
from dama.images import probe_image, resolve_image
from dama.redact import redacted
from eval.core.sources import BENCHMARKS, File, Pictures
from eval.core.transfer import Received, digest, download

DEFAULT_FOLDER = Path("playground/data/eval")
RECORD = "downloads.json"
AT_ONCE = 8  # downloads
LARGEST_PICTURE = 1 << 26  # bytes
# Raised by a file that is not as it should be.
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
REMEDY = (
    "Remedy: run `python -m eval.download` where the homes can be reached (it continues what was interrupted), put the "
    "files in their places by hand (`--list` names every one), or name a folder that has them as DAMA_BENCH_DATA"
)


class DownloadError(ValueError):
    """Everything that is missing or damaged, in one message."""


def data_folder() -> Path:
    """DAMA_BENCH_DATA, or the default."""
    return Path(os.environ.get("DAMA_BENCH_DATA") or DEFAULT_FOLDER)


def fetch(
    names: Sequence[str],
    folder: Path | None = None,
    *,
    chosen: Collection[str] | None = None,
    mirror: str = "",
    offline: bool = False,
    judge: bool = True,
    accept: Collection[str] = (),
) -> Path:
    """Brings what these benchmarks lack, checks everything, and returns the data folder.

    chosen: names of the pictures that are needed; all where None. mirror: URL of a copy of the data folder, asked
    instead of the homes. offline: only checks, and leaves the folder as it is. judge: also what only a judge needs.
    accept: files without a published digest whose present content replaces the recorded one.
    Raises DownloadError, which names each file that is missing or damaged, its home and its place.
    """
    folder = folder or data_folder()
    run = _Run(folder, mirror.rstrip("/"), offline, frozenset(accept))
    for name in names:
        run.bring_files([file for file in BENCHMARKS[name].files if judge or not file.judge_only])
        run.bring_pictures(BENCHMARKS[name].pictures, chosen)
    if run.faults:
        title = f"benchmark data in {folder}: {', '.join(names)} cannot be had complete and right"
        raise DownloadError("\n".join([title, *(f"  {fault}" for fault in dict.fromkeys(run.faults)), REMEDY]))
    return folder


def unpublished(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Path -> digest of the files that are accepted, because downloads.json says so, but are not the published ones."""
    files = [file for name in names for file in BENCHMARKS[name].files]
    present = [file for file in files if file.sha256 and (folder / file.path).is_file()]
    found = {file: digest(folder / file.path) for file in present}
    other = {file.path: sha256 for file, sha256 in found.items() if sha256 != file.sha256}
    recorded = read_record(folder / RECORD)
    replaced = [file.instead for file in files if file.instead in recorded and (folder / file.instead).is_file()]
    return other | {path: digest(folder / path) for path in replaced}


@dataclass
class _Run:
    """The downloads of one call, and what went wrong with them. unreachable: host -> why."""

    folder: Path
    mirror: str
    offline: bool
    accept: frozenset[str] = frozenset()
    faults: list[str] = field(default_factory=list)
    unreachable: dict[str, str] = field(default_factory=dict)
    lock: Any = field(default_factory=Lock)

    # --------------------------------------------------------------------------------------------------- files

    def bring_files(self, files: Sequence[File]) -> None:
        """Checks the files that are there, downloads the others, and makes those that come in a package."""
        missing = [file for file in files if not self._have(file)]
        for file, reason in self._download([file for file in missing if file.package is None]):
            self.faults.append(f"{file.path}: {file.home} ({reason})")
        for file in missing:
            if file.package is not None:
                self._make(file, file.package)

    def _have(self, file: File) -> bool:
        """Whether it is there. A digest neither published nor recorded is a fault, and so is another file's content."""
        if file.instead and (self.folder / file.instead).is_file():
            return True
        path = self.folder / file.path
        if not path.is_file():
            return False
        if fault := self._fault(file, path):
            self.faults.append(f"{file.path}: {fault}")
        return True

    def _fault(self, file: File, path: Path) -> str:
        """What is wrong with a file that is there, and the remedy; "" where nothing is."""
        anew = f"delete it to have it {file.home}"
        recorded = self._recorded().get(file.path, {}).get("sha256")
        accepted, found = {file.sha256, recorded} - {None}, digest(path)
        if accepted and found not in accepted and file.path not in self.accept:
            wanted = " or ".join(sorted(map(str, accepted)))
            other = "" if file.sha256 else f", or add --accept {file.path} if what is there now is right"
            return f"expected SHA-256 {wanted}, got {found}; {anew}{other}"
        if fault := _content_fault(file, path) if file.sha256 is None else "":
            return f"{fault}; {anew}"
        if file.path in self.accept and found != recorded:
            self._record(file, Received(found, path.stat().st_size, ""), "accepted by --accept")
        return ""

    def _make(self, file: File, package: File) -> None:
        assert file.make is not None
        if not self._have(package):
            for _, reason in self._download([package]):
                self.faults.append(f"{file.path}: {file.home} ({reason})")
                return
        try:
            content = file.make(self.folder / package.path, self.folder)
        except DAMAGED as error:
            self.faults.append(f"{file.path}: cannot be made from {package.path} ({_reason(error)})")
            return
        write_atomic(self.folder / file.path, content)
        if fault := _content_fault(file, self.folder / file.path):
            (self.folder / file.path).unlink()
            self.faults.append(f"{file.path}: cannot be made from {package.path} ({fault})")
            return
        found = digest(self.folder / file.path)
        if found != file.sha256:
            other = f", another content than the published {file.sha256}" if file.sha256 else ""
            self._record(file, Received(found, len(content), ""), f"made from {package.path}{other}")

    # ------------------------------------------------------------------------------------------------ pictures

    def bring_pictures(self, pictures: Pictures, chosen: Collection[str] | None) -> None:
        """Takes the missing ones out of their package where it is there or they have no other home, or downloads."""
        try:
            urls = pictures.urls(self.folder)
        except DAMAGED:
            self.faults.append(f"{pictures.folder}/: its pictures, whose names are in the files above; {pictures.home}")
            return
        home = self.folder / pictures.folder
        urls = {name: url for name, url in urls.items() if chosen is None or name in chosen}
        urls = {name: url for name, url in urls.items() if not resolve_image(home, name).is_file()}
        if urls and pictures.package is not None and self._has_package(pictures.package, not all(urls.values())):
            self._take(pictures, pictures.package, urls)
        wanted = [File(f"{pictures.folder}/{name}", url) for name, url in urls.items()]
        failed: dict[str, list[str]] = {}
        for file, reason in self._download(wanted, check=probe_image):
            failed.setdefault(reason, []).append(Path(file.path).name)
        for reason, names in failed.items():
            self.faults.append(f"{pictures.folder}/: {_some(names)}, {pictures.home} ({reason})")

    def _has_package(self, package: File, needed: bool) -> bool:
        """Whether it is there now; it is downloaded only where the pictures have no other home."""
        return self._have(package) or (needed and bool(package.url) and not self._download([package]))

    def _take(self, pictures: Pictures, package: File, urls: dict[str, str]) -> None:
        """Moves pictures out of the package, and their names out of `urls`."""
        try:
            for name, content in pictures.take(self.folder / package.path, list(urls)):
                probe_image(BytesIO(content))
                write_atomic(resolve_image(self.folder / pictures.folder, name), content)
                del urls[name]
        except DAMAGED as error:
            self.faults.append(f"{package.path}: {_reason(error)}; delete it to have it {package.home}")

    # ----------------------------------------------------------------------------------------------- transport

    def _download(self, files: Sequence[File], check: Callable[[Path], Any] | None = None) -> list[tuple[File, str]]:
        """Several at a time. Returns those that did not come, and why."""
        if not files or self.offline:
            return [(file, "missing") for file in files]
        title = files[0].path if len(files) == 1 else f"{len(files)} files"
        with tqdm(total=0, desc=title, unit="B", unit_scale=True) as bar, ThreadPoolExecutor(AT_ONCE) as pool:
            reasons = list(pool.map(lambda file: self._attempt(file, bar, check), files))
        return [(file, reason) for file, reason in zip(files, reasons) if reason]

    def _attempt(self, file: File, bar: Any, check: Callable[[Path], Any] | None) -> str:
        """Why the file did not come, or ""."""
        url = f"{self.mirror}/{quote(file.path)}" if self.mirror else file.url
        host = urlsplit(url).netloc
        if not url or host in self.unreachable:
            return self.unreachable.get(host, "no link leads to it")

        def report(new: int, left: int | None) -> None:
            with self.lock:
                bar.total += left or 0
                bar.update(new)

        try:
            received = download(
                url,
                self.folder / file.path,
                file.sha256,
                size=LARGEST_PICTURE if check else file.size,
                check=check or (file.check if file.sha256 is None else None),
                report=report,
            )
        except DAMAGED as error:
            if str(error).startswith("URLError"):  # 800 pictures need not all find out
                self.unreachable[host] = _reason(error)
            return _reason(error)
        if file.sha256 is None and check is None:
            self._record(file, received, redacted(url))
        return ""

    # -------------------------------------------------------------------------------------------------- record

    def _recorded(self) -> dict[str, Any]:
        return read_record(self.folder / RECORD)

    def _record(self, file: File, received: Received, source: str) -> None:
        """Writes down, and says, what a file without a published digest was when it came first."""
        entry = {"sha256": received.sha256, "bytes": received.size, "source": source}
        if received.revision:
            entry["revision"] = received.revision
        with self.lock:
            write_json(self.folder / RECORD, self._recorded() | {file.path: entry})
        at = f" at revision {received.revision}" if received.revision else ""
        say(f"recorded: {file.path}  {source}{at}  {received.size} bytes  SHA-256 {received.sha256}")


def read_record(path: Path) -> dict[str, dict[str, Any]]:
    """What downloads.json holds: path of a file -> what it was when it came. DownloadError for anything else."""
    if not path.exists():
        return {}
    remedy = f"delete {path}, which is written anew; files whose digests are published are checked by these"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DownloadError(f"{path}: cannot be read ({_reason(error)})\nRemedy: {remedy}") from error
    if not isinstance(entries, dict):
        raise DownloadError(f"{path}: expected an object of files, got {type(entries).__name__}\nRemedy: {remedy}")
    faults = [
        f"{name}: expected an object with a SHA-256, got {str(entry)[:60]!r}"
        for name, entry in entries.items()
        if not (isinstance(entry, dict) and re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))))
    ]
    if faults:
        raise DownloadError(error_list(str(path), faults, remedy))
    return entries


def _content_fault(file: File, path: Path) -> str:
    """Why the file at `path` is another than it should be, or ""."""
    try:
        if file.check is not None:
            file.check(path)
    except DAMAGED as error:
        return f"its content is that of another file: {_reason(error)}"
    return ""


def _reason(error: Exception) -> str:
    return redacted(" ".join(str(error).split())[:300] or type(error).__name__)


def _some(names: Sequence[str]) -> str:
    """How many, and up to three by name."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} pictures ({', '.join(names[:3])}{more})"


# ------------------------------------------------------------------------------------------------------------- command


def table(names: Sequence[str], folder: Path) -> Iterator[str]:
    """A line a file, separated by tabs: place, there or missing, SHA-256, bytes, home; then every picture's."""
    for name in names:
        for file in BENCHMARKS[name].files:
            there = any((folder / path).is_file() for path in (file.path, file.instead) if path)
            yield "\t".join([file.path, _state(there), file.sha256 or "-", str(file.size or "-"), file.home])
        pictures = BENCHMARKS[name].pictures
        try:
            urls = pictures.urls(folder)
        except DAMAGED:
            urls = {"*": ""}  # the files that name them are not there yet
        for picture, url in urls.items():
            there = (folder / pictures.folder / picture).is_file()
            yield "\t".join([f"{pictures.folder}/{picture}", _state(there), "-", "-", url or pictures.home])


def _state(there: bool) -> str:
    return "there" if there else "missing"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.download", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=f"{', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--folder", type=Path, help=f"default: DAMA_BENCH_DATA, else {DEFAULT_FOLDER}")
    parser.add_argument("--mirror", default="", metavar="URL",
                        help="a copy of a complete folder, asked instead of the homes; `python -m http.server` in one "
                        "makes it a mirror")  # fmt: skip
    parser.add_argument("--accept", nargs="+", default=(), metavar="FILE",
                        help="files without a published digest, named as by --list: what is there now replaces what "
                        "was recorded")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="only print each file, its state, digest, bytes and home")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    names, folder = args.benchmarks or list(BENCHMARKS), args.folder or data_folder()
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; expected some of {', '.join(BENCHMARKS)}")
    known = {path for name in names for path in BENCHMARKS[name].paths_without_digest()}
    if wrong := [path for path in args.accept if path not in known]:
        parser.error(f"--accept {', '.join(wrong)}: expected some of {', '.join(sorted(known)) or 'none'}")
    try:
        if args.list:
            for line in table(names, folder):
                say(line)
            return 0
        fetch(names, folder, mirror=args.mirror, accept=args.accept)
    except Exception as error:
        report_error(error, "download")
        return 2
    say(f"complete and checked in {folder}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
