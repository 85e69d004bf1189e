"""The pack's version, as pyproject.toml has it."""

from __future__ import annotations

__all__ = ["VERSION"]

VERSION = "0.1.0"
