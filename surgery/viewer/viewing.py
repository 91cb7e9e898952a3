"""`surgery view`: serve until interrupted, and open a browser where there is one."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from surgery.viewer.server import Gallery, Server


def view(path: Path, *, host: str, port: int, is_browser_wanted: bool, say: Callable[[str], None]) -> None:
    """Show models in Netron until Ctrl-C.

    Args:
        path: A model, a folder with models, or what a run wrote.
        host: Where to listen.
        port: The port; 0 takes any free one.
        is_browser_wanted: Open a browser, where there is a display.
        say: Called with each line for the user.

    Raises:
        RecipeError: There is no model, or the port or host cannot be had.
        ModelFileError: The only model cannot be shown.
        SurgeryError: Netron is not installed.
    """
    gallery = Gallery(path, say)
    models = [model for section in gallery.sections() for model in section.models]
    with Server(gallery, host, port) as server:
        if len(models) == 1:
            gallery.open(models[0])
        what = models[0].path.name if len(models) == 1 else f"{len(models)} models of {gallery.title}"
        say(f"{what}: {server.url}")
        is_open = is_browser_wanted and _has_display() and _open(server.url)
        for line in _hints(server, is_open=is_open):
            say(line)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped")


def _hints(server: Server, *, is_open: bool) -> list[str]:
    here, lines = socket.gethostname(), []
    if not server.is_local:
        lines.append(f"warning: whoever reaches port {server.port} of {here} can read these models; see --host")
    elif not is_open:
        forward = f"ssh -L {server.port}:{urlsplit(server.url).netloc} {here}"
        lines.append(f"open this address in a browser; from another machine after: {forward}")
    return [*lines, "Ctrl-C ends it"]


def _has_display() -> bool:
    """Say whether a browser has where to appear; without this question a text browser might take the terminal."""
    return sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )


def _open(url: str) -> bool:
    try:
        return webbrowser.open(url)
    except webbrowser.Error:
        return False
