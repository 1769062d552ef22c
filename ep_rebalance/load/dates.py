"""Dates of what was recorded and saved."""

from __future__ import annotations

_YEAR_10000 = 253_402_300_800.0


def has_date(unix_time: float) -> bool:
    """Whether a time can be shown as a date from 1970 on; NaN cannot."""
    return 0.0 <= unix_time < _YEAR_10000
