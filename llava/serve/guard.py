"""What stands between the chat page and the network: whose requests are answered, and how large they may be."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Gradio's page holds its settings in an inline script. Nothing is loaded from, or sent to, another host.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; media-src 'self' blob:; "
    "worker-src 'self' blob:; object-src 'none'; frame-src 'none'; frame-ancestors 'self'; base-uri 'self'; "
    "form-action 'self'"
)
HEADERS = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode("ascii")),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)
BODY_BYTES = 1 << 20  # of a request that is no upload
ENVELOPE_BYTES = 1 << 16  # of an upload, around its file


class Guard:
    """ASGI middleware around the whole page.

    A request is refused whose Host is none of the page's names (a name that an attacker's DNS lets lead here), or whose
    Origin is another page. Uploads are bounded in size, number, time and, all files together, in the disk they take.

    Args:
        app: the page. folder: where it keeps uploads, all of which are removed after `expiry_s`.
        max_bytes: of an uploaded file. quota: bytes of all files in `folder`.
        names: host names, in lower case, that lead to the page besides loopback ones; the caller may add to them.
        any_name: take every name, for a page that listens on more than loopback.
        at_once: uploads under way. upload_s: seconds until the body of a request, an upload or not, must be there.
    """

    def __init__(
        self,
        app: App,
        folder: str | Path,
        max_bytes: int,
        *,
        names: set[str],
        any_name: bool = False,
        quota: int = 256 << 20,
        expiry_s: float = 600.0,
        at_once: int = 4,
        upload_s: float = 120.0,
    ) -> None:
        self.app, self.folder, self.max_bytes = app, Path(folder), max_bytes
        self.names, self.any_name = names, any_name
        self.quota, self.expiry_s, self.at_once, self.upload_s = quota, expiry_s, at_once, upload_s
        self.uploading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request: refuse it, or pass it on to the page."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        is_upload = scope.get("method") == "POST" and scope["path"].rstrip("/").endswith("/upload")
        limit = self.max_bytes + ENVELOPE_BYTES if is_upload else BODY_BYTES
        refusal = self._stranger(scope) or _too_large(scope, limit) or (self._no_room() if is_upload else None)
        if refusal is not None:
            await _refuse(scope, send, *refusal)
            return
        self.uploading += is_upload
        try:
            deadline = time.monotonic() + self.upload_s if scope["type"] == "http" else None
            await self.app(scope, _bounded(receive, limit, deadline), _with_headers(send))
        finally:
            self.uploading -= is_upload

    def _stranger(self, scope: Scope) -> tuple[int, str] | None:
        """(status, reason) where the request comes under a wrong name or from another page."""
        hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
        if len(hosts) != 1 or len(origins) > 1:
            return 400, "expected one Host and at most one Origin"
        if not self._is_ours(_host_name(f"//{hosts[0]}")):
            return 421, "this name does not lead to the page; --allow-host takes names of a proxy"
        if origins and not self._is_same_page(origins[0], hosts[0]):
            return 403, "requests of other pages are refused"
        return None

    def _is_same_page(self, origin: str, host: str) -> bool:
        return origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower()) or (
            _host_name(origin) in self.names
        )

    def _is_ours(self, name: str) -> bool:
        return self.any_name or name in self.names or is_loopback(name)

    def _no_room(self) -> tuple[int, str] | None:
        """(status, reason) where no more uploads are taken just now; removes what has expired first."""
        if self.uploading >= self.at_once:
            return 503, "too many uploads at the same time; try again in a moment"
        reserved = (self.uploading + 1) * self.max_bytes
        if self._used() + reserved > self.quota:
            return 507, "the disk space for uploads is used up; try again in some minutes"
        return None

    def _used(self) -> int:
        """Bytes of all files in the folder, after those that have expired are removed."""
        oldest, used = time.time() - self.expiry_s, 0
        for path in self.folder.rglob("*"):
            try:
                facts = path.lstat()
                if not path.is_dir() and facts.st_mtime < oldest:
                    path.unlink()
                    continue
            except FileNotFoundError:
                continue  # Gradio moves and removes files meanwhile
            used += facts.st_size
        return used


def is_loopback(name: str) -> bool:
    """Whether a host name or address means this machine."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _host_name(url: str) -> str:
    """In lower case, without brackets and port; empty where the URL has none that can be read."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _too_large(scope: Scope, limit: int) -> tuple[int, str] | None:
    lengths = _values(scope, b"content-length")
    if any(not length.isascii() or not length.isdigit() or int(length[:20]) > limit for length in lengths):
        return 413, f"more than {limit / 2**20:.0f} MiB"
    return None


def _bounded(receive: Receive, limit: int, deadline: float | None) -> Receive:
    """`receive` that ends the request once its body has more than `limit` bytes or `deadline` has passed."""
    received = 0
    complete = False

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal received, complete
        if complete or deadline is None:
            message = await receive()
        else:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                return {"type": "http.disconnect"}
        received += len(message.get("body", b""))
        complete = message["type"] == "http.request" and not message.get("more_body", False)
        return message if received <= limit else {"type": "http.disconnect"}

    return bounded


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
        await send(message)

    return sending


async def _refuse(scope: Scope, send: Send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
