"""The pages that are served: Netron's, kept from calling home, and the list of models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from urllib.parse import quote, urlencode

from surgery.errors import SurgeryError
from surgery.units import in_bytes
from surgery.viewer.listing import Listed, Section

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".css": "text/css; charset=utf-8",
    ".png": "image/png",
    ".ico": "image/x-icon",
}

_STYLE = """
body { font: 15px system-ui, sans-serif; margin: 2rem auto; max-width: 56rem; color: #222; padding: 0 1rem }
h1 { font-size: 1.2rem } h2 { font-size: 1rem; margin: 1.5rem 0 0.2rem } p { margin: 0.2rem 0; color: #666 }
td { padding: 0.15rem 2rem 0.15rem 0 } td.size { text-align: right; color: #666; padding: 0.15rem 0 }
a { color: #0b5fa5; text-decoration: none } a:hover { text-decoration: underline }
pre { white-space: pre-wrap }
"""


class Netron:
    """The pages and scripts of the installed Netron.

    Raises:
        SurgeryError: Netron is not installed.
    """

    def __init__(self) -> None:
        spec = find_spec("netron")
        if spec is None or not spec.submodule_search_locations:
            raise SurgeryError("netron is not installed", hint="pip install 'graph-surgery[view]'")
        folder = Path(next(iter(spec.submodule_search_locations)))
        self._files = {file.name: file for file in folder.iterdir() if file.suffix in CONTENT_TYPES}
        if "index.html" not in self._files:
            raise SurgeryError(f"{folder}: this netron has no pages", hint="pip install --upgrade netron")

    def read(self, name: str) -> tuple[bytes, str] | None:
        """Return one of its files and the file's content type; `None` if there is no file of this name."""
        file = self._files.get(name)
        if file is None:
            return None
        content = file.read_bytes()
        return (_quiet(content) if name == "index.html" else content), CONTENT_TYPES[file.suffix]


def _quiet(page: bytes) -> bytes:
    """Make Netron take itself for a development copy of today.

    As packaged, it reports to Google Analytics, and half a year after its release it shows nothing but a request to
    update (netron 9.3.3, browser.js: `telemetry`, `age`).
    """
    page = re.sub(rb'(<meta name="version" content=)"[^"]*"', rb'\1"0.0.0"', page)
    return re.sub(rb'<meta name="date"[^>]*>', b"", page)


def netron_address(model: Listed) -> str:
    """Return the address of Netron's page for a model; `url` is relative to that page."""
    name = model.path.name if model.path.name.endswith(".onnx") else f"{model.path.name}.onnx"
    graph = f"../models/{quote(model.address, safe='')}/graph"
    return f"/netron/?{urlencode({'url': graph, 'identifier': name})}"


def open_address(model: Listed) -> str:
    """Return the address that opens a model and leads on to Netron's page for it."""
    return f"/open/{quote(model.address, safe='')}"


def index_page(title: str, sections: Sequence[Section]) -> bytes:
    """Return the list of models, by step."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for data_files, group in groupby(sections, key=_data_files):
        parts += map(_section, group)
        parts += [f"<p>{escape(file.name)}, {_size(file)}</p>" for file in data_files]
    return _page(title, "".join(parts))


def message_page(title: str, text: str) -> bytes:
    """Return a page with a message."""
    return _page(title, f'<h1>{escape(title)}</h1><pre>{escape(text)}</pre><p><a href="/">all models</a></p>')


def _section(section: Section) -> str:
    note = f"<p>{escape(section.note)}</p>" if section.note else ""
    heading = f"<h2>{escape(section.heading)}</h2>" if section.heading else ""
    return f"{heading}{note}<table>{''.join(map(_row, section.models))}</table>"


def _row(model: Listed) -> str:
    link = f'<a href="{escape(open_address(model))}">{escape(model.role)}</a>'
    return f'<tr><td>{link}</td><td>{escape(model.path.name)}</td><td class="size">{_size(model.path)}</td></tr>'


def _data_files(section: Section) -> list[Path]:
    """Return the files of weights beside the models; the steps of a run share theirs."""
    folders = sorted({model.path.parent for model in section.models})
    return [file for folder in folders for file in sorted(folder.glob("*data")) if file.is_file()]


def _size(file: Path) -> str:
    try:
        return in_bytes(file.stat().st_size)
    except OSError:
        return "gone"


def _page(title: str, body: str) -> bytes:
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><link rel="icon" href="/netron/favicon.ico">'
    return f"<!DOCTYPE html><html><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>".encode()
