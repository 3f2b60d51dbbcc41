"""Checks of a caller's values; each error names the value and the remedy."""

from __future__ import annotations

import math
import operator
from typing import Any


def one_of(name: str, value: Any, allowed: tuple) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, allowed))}")


def at_least(name: str, value: float, least: float) -> None:
    """Raise ValueError unless `value` is a finite number of at least `least`; a bool is not a number here."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
        raise ValueError(f"{name}={value!r} must be a number of at least {least}")


def positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number above 0; a bool is not a number here."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be a positive number")


def flag(name: str, value: bool) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")


def whole(name: str, value: int, least: int) -> None:
    """Raise ValueError unless `value` is an int of at least `least`; a bool is not an int here."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        try:
            same = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)  # 5.0, or NumPy's
        except TypeError:
            same = least - 1
        hint = f"; write {same}" if same >= least and not isinstance(value, bool) else ""
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{hint}")


def between(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless `value` is a Python number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be a Python number from {low} to {high}")
