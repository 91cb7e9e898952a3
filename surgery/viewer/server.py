"""The server: one port for the list of models, Netron's pages, graphs and weights; it gives out nothing else."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from surgery.errors import RecipeError, SurgeryError
from surgery.storage import ByteReader
from surgery.viewer.exhibit import Exhibit, exhibit
from surgery.viewer.listing import Listed, Section, list_models
from surgery.viewer.pages import Netron, index_page, message_page, netron_address

# What a slow line carries well within the timeout of a connection.
_CHUNK_BYTES = 1 << 20
_HTML = "text/html; charset=utf-8"
_BINARY = "application/octet-stream"
_HEADERS = {
    # Whatever is in a page, it talks to nobody but this server.
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; frame-src 'none'; object-src 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
# Netron asks for consent to its reports, which it cannot send from here; the answer holds for these pages only.
_CONSENT = "consent=none; Path=/netron/; SameSite=Strict"

_Stamp = tuple[int, int, int]


class Gallery:
    """The models under a path: listed anew for each page, opened when first looked at, again when they changed.

    Args:
        path: A model, a folder, or what a run wrote.
        say: Called with what the user should know of a model.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path = path
        self.say = say
        self._exhibits: dict[str, tuple[_Stamp, Exhibit]] = {}
        self._lock = threading.Lock()

    @property
    def title(self) -> str:
        """The name of the file or folder."""
        return self.path.resolve().name

    def sections(self) -> tuple[Section, ...]:
        """List the models.

        Raises:
            RecipeError: There is none.
        """
        return list_models(self.path)

    def find(self, address: str) -> Listed | None:
        """Return the model of this address; `None` for what is not in the list."""
        models = (model for section in self.sections() for model in section.models)
        return next((model for model in models if model.address == address), None)

    def open(self, model: Listed) -> Exhibit:
        """Return a model as Netron gets it.

        Raises:
            ModelFileError: It cannot be shown.
        """
        with self._lock:
            stamp = _stamp(model.path)
            known = self._exhibits.get(model.address)
            if known is None or known[0] != stamp:
                known = self._exhibits[model.address] = (stamp, exhibit(model.path))
                if known[1].note:
                    self.say(f"{model.address}: {known[1].note}")
            return known[1]


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return status.st_mtime_ns, status.st_size, status.st_ino


class Server(ThreadingHTTPServer):
    """Serves a gallery.

    Args:
        gallery: The models.
        host: The name or address to listen at; a loopback one lets nobody in from outside.
        port: The port; 0 takes any free one.

    Raises:
        RecipeError: The port is taken or not allowed, or the host is not this machine.
        SurgeryError: Netron is not installed.
    """

    daemon_threads = True

    def __init__(self, gallery: Gallery, host: str, port: int) -> None:
        self.gallery = gallery
        self.netron = Netron()
        self.host = host
        self.address_family, address = _resolve(host, port)
        self.is_local = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
        try:
            super().__init__(address, _Handler)
        except OSError as error:
            raise _not_bound(host, port, error) from error

    @property
    def port(self) -> int:
        """The port that was taken."""
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        """The address to open on this machine."""
        host = {"0.0.0.0": "localhost", "::": "localhost"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    def server_bind(self) -> None:
        """Bind without looking up this machine's full name, which can take long and is not used."""
        # The standard library's own does that look-up.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.host, self.port

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in a line what went wrong in a request; a browser that hung up is no error."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            self.gallery.say(f"error: {type(error).__name__}: {error}")


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"--host {host}: {error}", hint="--host localhost, or --host 0.0.0.0 for all") from error
    # IPv4 first: that is what `ssh -L PORT:localhost:PORT` and most others try.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, (str(address[0]), int(address[1]))


def _not_bound(host: str, port: int, error: OSError) -> RecipeError:
    if error.errno == errno.EADDRINUSE:
        return RecipeError(
            f"port {port} of {host} is in use", hint="another --port, or --port 0, which takes any free one"
        )
    if error.errno == errno.EACCES:
        return RecipeError(f"port {port} is not for ordinary users", hint="a --port above 1023")
    return RecipeError(f"cannot listen at {host}, port {port}: {error.strerror}", hint="--host localhost")


@dataclass(frozen=True)
class _Answer:
    content: ByteReader | bytes
    type: str = _HTML
    status: HTTPStatus = HTTPStatus.OK

    @property
    def length(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.length

    def read(self, start: int, size: int) -> bytes | memoryview:
        if isinstance(self.content, bytes):
            return self.content[start : start + size]
        return self.content.read(start, size)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    # Connections stay open: Netron is some fifteen files.
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """Answer a request."""
        try:
            answer = self._answer()
        except SurgeryError as error:
            answer = _message("This cannot be shown", str(error), HTTPStatus.UNPROCESSABLE_ENTITY)
        if isinstance(answer, str):
            self._redirect(answer)
        else:
            self._send(answer or _message("Not found", "There is nothing here.", HTTPStatus.NOT_FOUND))

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: the console is for what the user should know."""

    def _answer(self) -> _Answer | str | None:
        """Return what to send, or where to go instead, or `None`."""
        if not self._is_for_us():
            return _message("Refused", f"Open {self.server.url} instead.", HTTPStatus.FORBIDDEN)
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]
        match parts:
            case [""]:
                return self._index()
            case ["netron", name]:
                return self._netron(name or "index.html")
            case ["open", address]:
                return self._open(address)
            case ["models", address, name]:
                return self._content(address, name)
        return None

    def _is_for_us(self) -> bool:
        """Refuse other names for this machine: a web site could give itself one to read what is served here."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        return not self.server.is_local or host in ("localhost", "127.0.0.1", "::1", self.server.host.lower())

    def _index(self) -> _Answer | str | None:
        sections = self.server.gallery.sections()
        models = [model for section in sections for model in section.models]
        if len(models) == 1:
            return self._open(models[0].address)
        return _Answer(index_page(self.server.gallery.title, sections))

    def _netron(self, name: str) -> _Answer | None:
        found = self.server.netron.read(name)
        return None if found is None else _Answer(*found)

    def _open(self, address: str) -> str | None:
        model = self.server.gallery.find(address)
        if model is None:
            return None
        self.server.gallery.open(model)
        return netron_address(model)

    def _content(self, address: str, name: str) -> _Answer | None:
        model = self.server.gallery.find(address)
        if model is None:
            return None
        shown = self.server.gallery.open(model)
        if name == "graph":
            return _Answer(shown.graph, _BINARY)
        return _Answer(shown.weights[name], _BINARY) if name in shown.weights else None

    def _redirect(self, address: str) -> None:
        self.send_response(HTTPStatus.FOUND)
        self.send_header("Location", address)
        self.send_header("Content-Length", "0")
        self._end_headers()

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.type)
        self.send_header("Content-Length", str(answer.length))
        self._end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, answer.length, _CHUNK_BYTES):
            self.wfile.write(answer.read(start, _CHUNK_BYTES))

    def _end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if self.path.startswith("/netron/"):
            self.send_header("Set-Cookie", _CONSENT)
        self.end_headers()


def _message(title: str, text: str, status: HTTPStatus) -> _Answer:
    return _Answer(message_page(title, text), status=status)
