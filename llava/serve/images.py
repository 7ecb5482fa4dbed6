"""Images from outside: uploads, files and URLs, bounded in bytes, pixels and seconds."""

from __future__ import annotations

import http.client
import io
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

from PIL import Image

from dama.images import FORMATS, MAX_PIXELS, UNREADABLE, ImageError, as_rgb, exceeded_limit, open_image
from dama.redact import redacted, secrets_of_url

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")
MAX_BYTES = 20 * 2**20  # of a download or an upload
MAX_SECONDS = 30.0  # of a download


class RejectedImageError(ValueError):
    """An image that can be read and is not taken, and why."""


def read_image(data: bytes, name: str) -> Image.Image:
    """The first frame as RGB, the way LLaVA's models saw images: EXIF rotation not applied, transparency dropped.

    CMYK is converted; of 16-bit gray the high byte is kept (Pillow's own conversion would clip nearly all to white).

    Raises:
        ValueError: not an image, damaged, 32 bits a pixel and channel, or too large in area, side or ratio of sides.
    """
    try:
        with open_image(io.BytesIO(data)) as image:
            if limit := exceeded_limit(image.size):
                size = f"{image.width} x {image.height}"
                raise RejectedImageError(f"{name}: {size} is {limit}; make the image smaller or crop it")
            if image.mode in ("I", "F"):
                raise RejectedImageError(f"{name}: 32 bits a pixel and channel (mode {image.mode}), expected 8 or 16")
            return as_rgb(image)
    except RejectedImageError:
        raise
    except ImageError as error:
        raise ValueError(f"{name}: not an image that can be read; expected {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: more than {MAX_PIXELS:,} pixels; make the image smaller") from error
    except UNREADABLE as error:
        raise ValueError(f"{name}: the image is damaged ({error})") from error


def load_image(image_file: str) -> Image.Image:
    """The image in a file or behind an http(s) URL, see `read_image`.

    Raises:
        ValueError: no such file, it cannot be downloaded within the limits, or `read_image` refuses it.
    """
    if image_file.startswith(("http://", "https://")):
        return read_image(download(image_file), redacted(image_file))
    try:
        return read_image(Path(image_file).read_bytes(), image_file)
    except OSError as error:
        raise ValueError(f"{image_file}: cannot be read ({error.strerror})") from error


def download(url: str, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS) -> bytes:
    """The image's bytes. Raises ValueError: unreachable, another content type, too large or too slow.

    The time is that of all: connections, redirects, headers and content, however many bytes the server sends meanwhile.
    """
    deadline, shown = time.monotonic() + max_seconds, redacted(url)
    sockets: list[socket.socket] = []
    timer = Timer(max_seconds, _shut, [sockets])
    timer.daemon = True
    timer.start()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "llava"})
        with _web_only(sockets, deadline).open(request, timeout=min(10.0, max_seconds)) as reply:
            if time.monotonic() > deadline:  # a connection that was shut here looks like the end of the headers
                raise TimeoutError
            kind = reply.headers.get_content_type()
            if not kind.startswith("image/") and kind != "application/octet-stream":
                raise ValueError(f"{shown}: expected an image, the server sends {kind}")
            return _read_within(reply, shown, max_bytes, deadline)
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
        if time.monotonic() > deadline:
            raise ValueError(f"{shown}: not downloaded in time; the server is too slow") from error
        problem = redacted(str(getattr(error, "reason", None) or error), secrets_of_url(url))
        raise ValueError(f"{shown}: cannot be downloaded ({problem})") from error
    finally:
        timer.cancel()


def _web_only(sockets: list[socket.socket], deadline: float) -> urllib.request.OpenerDirector:
    """Urllib's opener without ftp:, file: and data:, to which a server may redirect; `sockets` gets what it opens."""

    def watched(base: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
        class Connection(base):  # type: ignore[misc, valid-type]
            def connect(self) -> None:
                if time.monotonic() > deadline:  # the timer will not come again
                    raise TimeoutError("no time left")
                super().connect()
                sockets.append(self.sock)

        return Connection

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(watched(http.client.HTTPConnection), req)

    class Secure(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(watched(http.client.HTTPSConnection), req)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, Plain, Secure, urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler, urllib.request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


def _shut(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        with suppress(OSError):  # closed already
            each.shutdown(socket.SHUT_RDWR)


def _read_within(reply: Any, shown: str, max_bytes: int, deadline: float) -> bytes:
    content = bytearray()
    while block := reply.read1(1 << 16):
        content += block
        if len(content) > max_bytes:
            raise ValueError(f"{shown}: more than {max_bytes / 2**20:.0f} MiB")
    if time.monotonic() > deadline:  # where the connection was shut from here, what came may be a part
        raise ValueError(f"{shown}: not downloaded in time; the server is too slow")
    return bytes(content)
