"""A file server on loopback that knows ranges, and that can be told to cut connections, refuse or change its files."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


@dataclass
class FileServer:
    """`with FileServer({"a/b.json": b"..."}) as url`. `seen` lists (path, Range header or None) of each request.

    cut: path -> after how many bytes of it the connection ends; each entry once. status: path -> an error to answer
    with. versions: whether files have ETags. ranges: whether a Range is heeded.
    """

    files: dict[str, bytes]
    cut: dict[str, list[int]] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    versions: bool = True
    ranges: bool = True
    seen: list[tuple[str, str | None]] = field(default_factory=list)

    def __enter__(self) -> str:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(self.path).lstrip("/")
            asked = self.headers.get("Range")
            server.seen.append((path, asked))
            content = server.files.get(path)
            status = server.status.get(path, 200 if content is not None else 404)
            if status != 200 or content is None:
                return self.send_error(status)
            version = f'"{hash(content)}"'
            start = 0
            same = self.headers.get("If-Range") in (None, version)
            if asked and server.ranges and same:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    return self.send_error(416)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            if server.versions:
                self.send_header("ETag", version)
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.end_headers()
            cuts = server.cut.get(path, [])
            self.wfile.write(content[start : cuts.pop(0) if cuts else None])

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    return Handler
