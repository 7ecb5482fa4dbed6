"""The benchmarks' official files, from their own sources: `python -m eval.download [BENCHMARK ...]`.

Files have a pinned revision and are checked against their SHA-256. Where none is known, the content is checked, and the
digest of the first download is recorded in downloads.json, printed, and required from then on. Files go to
playground/data/eval, or to the folder that DAMA_BENCH_DATA names; files that are there already are only checked.
Interrupted downloads are continued.
"""

from __future__ import annotations

import argparse
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

from dama.console import log, report_error, write_atomic, write_json
from dama.images import probe_image, resolve_image
from dama.redact import redacted
from eval import benchmarks
from eval.core.record import DEFAULT_FOLDER, RECORD, DownloadError, data_folder, read_record, reason_of
from eval.core.sources import File, ImageSource
from eval.core.transfer import Received, digest, download

AT_ONCE = 8  # downloads
LARGEST_IMAGE = 1 << 26  # bytes
# Raised by a file whose content is not as expected.
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
REMEDY = (
    "Remedy: run `python -m eval.download` where the sources can be reached (it continues what was interrupted), put "
    "the files in their places by hand (`--list` names every one), or name a folder that has them as DAMA_BENCH_DATA"
)


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
    """Download what these benchmarks are missing, check everything, and return the data folder.

    chosen: names of the images that are needed; all where None. mirror: URL of a copy of the data folder, used instead
    of the sources. offline: only check, and leave the folder as it is. judge: include what only a judge needs.
    accept: files without a published digest whose present content replaces the recorded one.
    Raises DownloadError, which names each file that is missing or damaged, its source and its place.
    """
    folder = folder or data_folder()
    run = _Run(folder, mirror.rstrip("/"), offline, frozenset(accept))
    for name in names:
        run.bring_files([file for file in benchmarks.named(name).files if judge or not file.judge_only])
        run.bring_images(benchmarks.named(name).images, chosen)
    if run.errors:
        title = f"benchmark data in {folder}: {', '.join(names)} cannot be had complete and right"
        raise DownloadError("\n".join([title, *(f"  {error}" for error in dict.fromkeys(run.errors)), REMEDY]))
    return folder


def unpublished(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Return path -> digest of the files that downloads.json accepts although they are not the published ones.

    A file without a published digest is another one where the record names its edition.
    """
    files = [file for name in names for file in benchmarks.named(name).files]
    present = [file for file in files if file.sha256 and (folder / file.path).is_file()]
    found = {file: digest(folder / file.path) for file in present}
    other = {file.path: sha256 for file, sha256 in found.items() if sha256 != file.sha256}
    recorded = read_record(folder / RECORD)
    replaced = [file.instead for file in files if file.instead in recorded]
    replaced += [file.path for file in files if file.sha256 is None and recorded.get(file.path, {}).get("edition")]
    return other | {path: digest(folder / path) for path in replaced if (folder / path).is_file()}


@dataclass
class _Run:
    """The downloads of one call, and their errors. unreachable: host -> reason."""

    folder: Path
    mirror: str
    offline: bool
    accept: frozenset[str] = frozenset()
    errors: list[str] = field(default_factory=list)
    unreachable: dict[str, str] = field(default_factory=dict)
    lock: Any = field(default_factory=Lock)

    # --------------------------------------------------------------------------------------------------- files

    def bring_files(self, files: Sequence[File]) -> None:
        """Check the files that are there, download the others, and make those that come in a package."""
        missing = [file for file in files if not self._have(file)]
        for file, reason in self._download([file for file in missing if file.package is None]):
            self.errors.append(f"{file.path}: {file.source} ({reason})")
        for file in missing:
            if file.package is not None:
                self._make(file, file.package)

    def _have(self, file: File) -> bool:
        """Whether it is there. A digest neither published nor recorded is an error, and so is another content."""
        if file.instead and (self.folder / file.instead).is_file():
            return True
        path = self.folder / file.path
        if not path.is_file():
            return False
        if problem := self._error(file, path):
            self.errors.append(f"{file.path}: {problem}")
        return True

    def _error(self, file: File, path: Path) -> str:
        """Return what is wrong with a file that is there, and the remedy; "" where nothing is."""
        anew = f"delete it to have it {file.source}"
        recorded = self._recorded().get(file.path, {}).get("sha256")
        accepted, found = {file.sha256, recorded} - {None}, digest(path)
        if accepted and found not in accepted and file.path not in self.accept:
            wanted = " or ".join(sorted(map(str, accepted)))
            other = "" if file.sha256 else f", or add --accept {file.path} if what is there now is right"
            return f"expected SHA-256 {wanted}, got {found}; {anew}{other}"
        if error := _content_error(file, path) if file.sha256 is None else "":
            return f"{error}; {anew}"
        if file.path in self.accept and found != recorded:
            self._record(file, Received(found, path.stat().st_size, ""), "accepted by --accept")
        return ""

    def _make(self, file: File, package: File) -> None:
        assert file.make is not None
        if not self._have(package):
            for _, reason in self._download([package]):
                self.errors.append(f"{file.path}: {file.source} ({reason})")
                return
        try:
            content = file.make(self.folder / package.path, self.folder)
        except DAMAGED as error:
            self.errors.append(f"{file.path}: cannot be made from {package.path} ({reason_of(error)})")
            return
        write_atomic(self.folder / file.path, content)
        if problem := _content_error(file, self.folder / file.path):
            (self.folder / file.path).unlink()
            self.errors.append(f"{file.path}: cannot be made from {package.path} ({problem})")
            return
        found = digest(self.folder / file.path)
        if found != file.sha256:
            other = f", another content than the published {file.sha256}" if file.sha256 else ""
            self._record(file, Received(found, len(content), ""), f"made from {package.path}{other}")

    # -------------------------------------------------------------------------------------------------- images

    def bring_images(self, images: ImageSource, chosen: Collection[str] | None) -> None:
        """Unpack missing images where their package is there or they have no other source; download the others."""
        try:
            urls = images.urls(self.folder)
        except DAMAGED:
            self.errors.append(f"{images.folder}/: its images, whose names are in the files above; {images.source}")
            return
        folder = self.folder / images.folder
        if chosen is not None and images.url_of is not None:
            urls = {name: images.url_of(name) for name in chosen} | urls
        urls = {name: url for name, url in urls.items() if chosen is None or name in chosen}
        urls = {name: url for name, url in urls.items() if not resolve_image(folder, name).is_file()}
        if urls and images.package is not None and self._has_package(images.package, not all(urls.values())):
            self._take(images, images.package, urls)
        wanted = [File(f"{images.folder}/{name}", url) for name, url in urls.items()]
        failed: dict[str, list[str]] = {}
        for file, reason in self._download(wanted, check=probe_image):
            failed.setdefault(reason, []).append(Path(file.path).name)
        for reason, names in failed.items():
            self.errors.append(f"{images.folder}/: {_some(names)}, {images.source} ({reason})")

    def _has_package(self, package: File, needed: bool) -> bool:
        """Whether it is there now; it is downloaded only where the images have no other source."""
        return self._have(package) or (needed and bool(package.url) and not self._download([package]))

    def _take(self, images: ImageSource, package: File, urls: dict[str, str]) -> None:
        """Unpack images, and remove their names from `urls`."""
        try:
            for name, content in images.take(self.folder / package.path, list(urls)):
                probe_image(BytesIO(content))
                write_atomic(resolve_image(self.folder / images.folder, name), content)
                del urls[name]
        except DAMAGED as error:
            self.errors.append(f"{package.path}: {reason_of(error)}; delete it to have it {package.source}")

    # ----------------------------------------------------------------------------------------------- transport

    def _download(self, files: Sequence[File], check: Callable[[Path], Any] | None = None) -> list[tuple[File, str]]:
        """Download several at a time. Returns those that failed, and why."""
        if not files or self.offline:
            return [(file, "missing") for file in files]
        title = files[0].path if len(files) == 1 else f"{len(files)} files"
        with tqdm(total=0, desc=title, unit="B", unit_scale=True) as bar, ThreadPoolExecutor(AT_ONCE) as pool:
            reasons = list(pool.map(lambda file: self._attempt(file, bar, check), files))
        return [(file, reason) for file, reason in zip(files, reasons) if reason]

    def _attempt(self, file: File, bar: Any, check: Callable[[Path], Any] | None) -> str:
        """Download one file. Returns why it failed, or ""."""
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
                size=LARGEST_IMAGE if check else file.size,
                check=check or (file.check if file.sha256 is None else None),
                report=report,
            )
        except DAMAGED as error:
            if str(error).startswith("URLError"):  # so that 800 images need not all find out
                self.unreachable[host] = reason_of(error)
            return reason_of(error)
        if file.sha256 is None and check is None:
            self._record(file, received, redacted(url))
        return ""

    # -------------------------------------------------------------------------------------------------- record

    def _recorded(self) -> dict[str, Any]:
        return read_record(self.folder / RECORD)

    def _record(self, file: File, received: Received, source: str) -> None:
        """Record and print the digest of a file without a published one."""
        entry = {"sha256": received.sha256, "bytes": received.size, "source": source}
        if received.revision:
            entry["revision"] = received.revision
        with self.lock:
            write_json(self.folder / RECORD, self._recorded() | {file.path: entry})
        at = f" at revision {received.revision}" if received.revision else ""
        log(f"recorded: {file.path}  {source}{at}  {received.size} bytes  SHA-256 {received.sha256}")


def _content_error(file: File, path: Path) -> str:
    """Return why the content of the file is not as expected, or ""."""
    try:
        if file.check is not None:
            file.check(path)
    except DAMAGED as error:
        return f"its content is that of another file: {reason_of(error)}"
    return ""


def _some(names: Sequence[str]) -> str:
    """Return how many, and up to three by name."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} images ({', '.join(names[:3])}{more})"


# ------------------------------------------------------------------------------------------------------------- command


def table(names: Sequence[str], folder: Path) -> Iterator[str]:
    """Yield one line per file, separated by tabs: path, there or missing, SHA-256, bytes, source; then the images."""
    for name in names:
        for file in benchmarks.named(name).files:
            there = any((folder / path).is_file() for path in (file.path, file.instead) if path)
            yield "\t".join([file.path, _state(there), file.sha256 or "-", str(file.size or "-"), file.source])
        images = benchmarks.named(name).images
        try:
            urls = images.urls(folder)
        except DAMAGED:
            urls = {"*": ""}  # the files that name them are not there yet
        for image, url in urls.items():
            there = (folder / images.folder / image).is_file()
            yield "\t".join([f"{images.folder}/{image}", _state(there), "-", "-", url or images.source])


def _state(there: bool) -> str:
    return "there" if there else "missing"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.download", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "benchmarks", nargs="*", metavar="BENCHMARK", help=f"{', '.join(benchmarks.names())} (default: all)"
    )
    parser.add_argument("--folder", type=Path, help=f"default: DAMA_BENCH_DATA, else {DEFAULT_FOLDER}")
    parser.add_argument("--mirror", default="", metavar="URL",
                        help="a copy of a complete folder, used instead of the sources; `python -m http.server` in one "
                        "makes it a mirror")  # fmt: skip
    parser.add_argument("--accept", nargs="+", default=(), metavar="FILE",
                        help="files without a published digest, named as by --list: what is there now replaces what "
                        "was recorded")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="only print each file, its state, digest, bytes and source")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after an error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    names, folder = args.benchmarks or benchmarks.names(), args.folder or data_folder()
    unknown = [name for name in names if name not in benchmarks.names()]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; expected some of {', '.join(benchmarks.names())}")
    known = {path for name in names for path in benchmarks.named(name).paths_without_digest()}
    if wrong := [path for path in args.accept if path not in known]:
        parser.error(f"--accept {', '.join(wrong)}: expected some of {', '.join(sorted(known)) or 'none'}")
    try:
        if args.list:
            for line in table(names, folder):
                log(line)
            return 0
        fetch(names, folder, mirror=args.mirror, accept=args.accept)
    except Exception as error:
        report_error(error, "download")
        return 2
    log(f"complete and checked in {folder}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
