"""The web page's own files, from the package."""

from __future__ import annotations

import hashlib
import importlib.resources
import mimetypes
from collections.abc import Mapping
from importlib.resources.abc import Traversable

from starlette.datastructures import Headers
from starlette.responses import Response

# The page loads its own files and talks to its own server, and no other page may put it in a frame.
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_INDEX = "index.html"
_TYPES = {".js": "text/javascript", ".svg": "image/svg+xml", ".html": "text/html", ".css": "text/css"}


def is_page(path: str) -> bool:
    """Whether a path is that of the page or of one of its files."""
    return path == "/" or path.startswith("/page/")


def page_responses(folder: Traversable | None = None) -> Mapping[str, Response]:
    """The answer for every path of the page: "/" and "/page/NAME"; empty where the page is not installed.

    Args:
        folder: of the files; by default the package's.
    """
    folder = folder or importlib.resources.files("mesh_transformer.serve") / "page"
    if not folder.is_dir():
        return {}
    files = {item.name: item.read_bytes() for item in folder.iterdir() if _served(item)}
    found = {f"/page/{name}": _response(name, content) for name, content in files.items() if name != _INDEX}
    return found | ({"/": _response(_INDEX, files[_INDEX])} if _INDEX in files else {})


def _served(item: Traversable) -> bool:
    return item.is_file() and not item.name.startswith((".", "_")) and not item.name.endswith((".py", ".md"))


def _response(name: str, content: bytes) -> Response:
    suffix = name[name.rfind(".") :]
    media_type = _TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    # Asked for again at every visit, and sent again only after an upgrade.
    cache = {"Cache-Control": "no-cache", "ETag": f'"{hashlib.sha256(content).hexdigest()[:16]}"'}
    return Response(content, headers={**SECURITY, **cache}, media_type=media_type)


def unchanged(response: Response, asked: Headers) -> Response:
    """The answer, or 304 where the client has this very content."""
    if asked.get("if-none-match") != response.headers["etag"]:
        return response
    kept = {name: value for name, value in response.headers.items() if name not in ("content-length", "content-type")}
    return Response(status_code=304, headers=kept)
