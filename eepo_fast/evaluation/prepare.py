"""Prepared data (`eepo-fast data prepare`)."""

from __future__ import annotations

from pathlib import Path


def find_prepared(source: str) -> Path | None:
    return None
