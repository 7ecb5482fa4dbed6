"""An HTTP client for servers that are not trusted: every reply is bounded in bytes and in total time.

Redirects are followed on the same host only, since they would carry prompts and images elsewhere.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

import httpx

LARGEST_REPLY = 1 << 24  # bytes, as sent and as decompressed
_REDIRECTS = 3
_REDIRECTED = (301, 302, 307, 308)
_COMPRESSED = ("gzip", "x-gzip", "deflate")


class TooLargeError(httpx.RequestError):
    """A reply of more bytes than are read."""


class RedirectError(httpx.RequestError):
    """A redirect to another host, or one of too many."""


class BoundedClient(httpx.AsyncClient):
    """Reads whole replies of at most LARGEST_REPLY bytes, compressed or not.

    Args:
        seconds: that a server may be silent; an attempt in all, from connecting to the last byte, may take twice that.
    """

    def __init__(self, seconds: float, **options: Any) -> None:
        super().__init__(
            timeout=seconds,
            limits=httpx.Limits(max_connections=None),
            headers={"Accept-Encoding": "gzip, deflate"},
            follow_redirects=False,
            **options,
        )
        self._seconds = 2 * seconds

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """As httpx's, with the reply read. Raises TooLargeError, RedirectError, ReadTimeout."""
        options |= {"stream": True, "follow_redirects": False}
        try:
            async with asyncio.timeout(self._seconds):
                for _ in range(_REDIRECTS + 1):
                    response = await self._read(await super().send(request, **options))
                    if response.status_code not in _REDIRECTED:
                        return response
                    request = _redirected(request, response)
        except TimeoutError as error:
            message = f"no complete reply within {self._seconds:g} seconds"
            raise httpx.ReadTimeout(message, request=request) from error
        raise RedirectError(f"more than {_REDIRECTS} redirects, the last to {request.url}", request=request)

    async def _read(self, response: httpx.Response) -> httpx.Response:
        """The same response with its content, decoded."""
        try:
            content = await _content(response)
        finally:
            await response.aclose()
        left_out = ("content-encoding", "content-length", "transfer-encoding")
        headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in left_out]
        return httpx.Response(response.status_code, headers=headers, content=content, request=response.request)


async def _content(response: httpx.Response) -> bytes:
    request, encoding = response.request, response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in (*_COMPRESSED, "identity", ""):
        raise httpx.DecodingError(f"expected a reply in gzip or plain, got the encoding {encoding!r}", request=request)
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding in _COMPRESSED else None
    sent, content = 0, bytearray()
    async for block in response.aiter_raw():
        sent += len(block)
        try:
            content += inflate.decompress(block, LARGEST_REPLY + 1 - len(content)) if inflate else block
        except zlib.error as error:
            raise httpx.DecodingError(f"damaged {encoding} reply: {error}", request=request) from error
        if max(sent, len(content)) > LARGEST_REPLY:
            raise TooLargeError(f"the reply has more than {LARGEST_REPLY} bytes", request=request)
    return bytes(content)


def _redirected(request: httpx.Request, response: httpx.Response) -> httpx.Request:
    """The same request, of the same method, to another address on the same host."""
    try:
        target = request.url.join(response.headers.get("location", ""))
    except httpx.InvalidURL as error:
        raise RedirectError(f"a redirect to no address: {error}", request=request) from error
    if not _same_host(request.url, target):
        raise RedirectError(f"redirected to another host, {target.scheme}://{target.netloc.decode()}", request=request)
    # A body without its length would be sent in chunks; the host is that of the new address.
    headers = [(name, value) for name, value in request.headers.multi_items() if name.lower() != "host"]
    return httpx.Request(
        request.method, target, headers=headers, content=request.content, extensions=request.extensions
    )


def _same_host(first: httpx.URL, second: httpx.URL) -> bool:
    """Whether scheme, host and port are equal, or only become https on the standard ports."""
    ports = {"http": 80, "https": 443}
    origins = [(url.scheme, url.host, url.port or ports.get(url.scheme)) for url in (first, second)]
    upgraded = [("http", first.host, 80), ("https", first.host, 443)]
    return origins[0] == origins[1] or origins == upgraded
