"""Downloads of videos from URLs, if the server allows them."""

from __future__ import annotations

import anyio
import httpx

from vlmds.serve.loaded import RequestError

SECONDS = 120.0


async def fetch(url: str, file, most: int) -> None:
    """Download an http(s) URL into the file.

    Args:
        most: limit in bytes.

    Raises:
        RequestError: not such a URL, larger than the limit, or it cannot be downloaded.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise RequestError("video_url: neither a data: nor an http(s) URL")
    try:
        # Redirects are not followed: they could lead anywhere.
        with anyio.fail_after(SECONDS):
            async with httpx.AsyncClient(timeout=20.0, trust_env=False) as client:
                async with client.stream("GET", url) as reply:
                    if reply.status_code != 200:
                        raise RequestError(f"video_url: answered with {reply.status_code}", 422)
                    async for block in reply.aiter_bytes():
                        most -= len(block)
                        if most < 0:
                            raise RequestError("video_url: the file is too large", 413)
                        file.write(block)
    except (httpx.HTTPError, httpx.InvalidURL):
        raise RequestError("video_url: cannot be fetched", 422) from None
    except TimeoutError:
        raise RequestError("video_url: did not arrive in time", 422) from None
