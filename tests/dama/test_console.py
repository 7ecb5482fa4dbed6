"""dama.console: files are written with the umask's rights, and never through a symbolic link that somebody left."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dama.chat import _append
from dama.console import UnsafeFileError, open_fresh, regular_file, write_atomic, write_json
from dama.hardness.split_llm import _Batches
from dama.prepare.outputs import LinesFile
from dama.stage import open_stage
from eval.core.transfer import download

pytestmark = pytest.mark.fast


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file of the user's outside the folder that is written to; whatever happens, it must stay as it is."""
    path = tmp_path / "victim"
    path.write_text("precious\n")
    yield path
    assert path.read_text() == "precious\n"


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027], indirect=True)
def test_written_files_have_the_rights_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    write_atomic(tmp_path / "a/atomic", "text")
    write_json(tmp_path / "a/json", {})
    write_atomic(tmp_path / "a/json", "written again")
    with open_fresh(tmp_path / "a/fresh"):
        pass
    with open_stage(tmp_path / "a/stage", "one", {}, [1]) as stage:
        stage.append([{"id": "x"}])
        stage.finish({})
    _append(tmp_path / "a/replies.jsonl", "{}")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_an_atomic_write_replaces_a_link_and_leaves_nothing_behind(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "out").mkdir()
    for target in (victim, tmp_path / "nowhere"):
        (tmp_path / "out/file").unlink(missing_ok=True)
        (tmp_path / "out/file").symlink_to(target)
        write_atomic(tmp_path / "out/file", b"new")
        assert not (tmp_path / "out/file").is_symlink()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "out/folder/inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "out/folder", "cannot replace a folder")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["file", "folder"]


def test_a_partial_file_that_is_a_link_is_replaced(tmp_path: Path, victim: Path) -> None:
    (tmp_path / ".pairs.jsonl.partial").symlink_to(victim)
    file = LinesFile(tmp_path / "pairs.jsonl")
    file.write({"id": 1})
    file.finish()
    assert (tmp_path / "pairs.jsonl").read_text() == '{"id": 1}\n'
    assert not (tmp_path / "pairs.jsonl").is_symlink()


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_records_behind_a_link_are_refused(tmp_path: Path, victim: Path, overwrite: bool, dangling: bool) -> None:
    """Both for a new stage and for one that would continue, beside a manifest that fits."""
    out, target = tmp_path / "out", tmp_path / "nowhere" if dangling else victim
    with open_stage(out, "one", {"a": 1}, [1, 1]) as stage:
        stage.append([{"id": "x"}])
    (out / "one.jsonl").unlink()
    (out / "one.jsonl").symlink_to(target)
    with pytest.raises(UnsafeFileError, match=r"one.jsonl: expected a regular file .* got a symbolic link\nRemedy"):
        open_stage(out, "one", {"a": 1}, [1, 1], overwrite=overwrite)
    assert not (tmp_path / "nowhere").exists()


def test_a_download_does_not_continue_in_a_file_behind_a_link(tmp_path: Path, victim: Path) -> None:
    """Of a pinned file what is there already would be taken for its beginning, and the rest appended."""
    content = b"precious\nand the rest"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.content = content  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "file.part").symlink_to(victim)
    (tmp_path / "file.part.version").symlink_to(victim)
    try:
        url = f"http://127.0.0.1:{server.server_port}/file"
        download(url, tmp_path / "file", hashlib.sha256(content).hexdigest())
    finally:
        server.shutdown()
        server.server_close()
    assert (tmp_path / "file").read_bytes() == content and not (tmp_path / "file").is_symlink()


class Pages(BaseHTTPRequestHandler):
    """Gives the server's content, or what a range asks for of it."""

    def do_GET(self) -> None:
        content: bytes = self.server.content  # type: ignore[attr-defined]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:])

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on standard error."""


def test_replies_behind_a_link_are_refused(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "replies.jsonl").symlink_to(victim)
    with pytest.raises(UnsafeFileError, match="a symbolic link"):
        _append(tmp_path / "replies.jsonl", "{}")
    victim_of_splits = tmp_path / "torn"
    victim_of_splits.write_text("no line end: a torn last line would be cut off")
    (tmp_path / "splits.jsonl").symlink_to(victim_of_splits)
    with pytest.raises(UnsafeFileError, match="a symbolic link"):
        _Batches(tmp_path / "splits.jsonl")
    assert victim_of_splits.stat().st_size


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_is_no_file_to_append_to(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Opening a pipe for writing would wait for a reader without end."""
    make(tmp_path / "records")
    with pytest.raises((UnsafeFileError, IsADirectoryError)):
        open(tmp_path / "records", "ab", opener=regular_file)  # noqa: SIM115 (it never opens)


def test_links_among_the_parents_are_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with open_stage(tmp_path / "out", "one", {}, [1]) as stage:
        stage.append([{"id": "x"}])
    assert (tmp_path / "disk/one.jsonl").read_text() == '{"id": "x"}\n'
