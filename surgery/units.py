"""Sizes as people read them."""

from __future__ import annotations


def in_bytes(count: int) -> str:
    """Return a size in decimal units, as disks are sold: `71.3 MB`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
