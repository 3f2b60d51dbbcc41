"""Checks of a caller's values; each error names the value and the remedy."""

from __future__ import annotations

import math
from typing import Any


def one_of(name: str, value: Any, allowed: tuple) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, allowed))}")


def at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError unless `value` is a finite number of at least `least`; a bool is not a number here."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
        raise ValueError(f"{name}={value!r} must be a number of at least {least}")


def whole(name: str, value: int, least: int) -> None:
    """Raise ValueError unless `value` is an int of at least `least`; a bool is not an int here."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        same = hasattr(value, "__index__") or (isinstance(value, float) and value.is_integer())  # a NumPy integer, or 5.0
        hint = f"; write {int(value)}" if same and not isinstance(value, int) and value >= least else ""
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{hint}")


def between(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless `value` is a Python number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be a Python number from {low} to {high}")
