"""Ends of a training process that its launcher must tell apart, as exit codes (`EX_` as in sysexits.h)."""

from __future__ import annotations

WRONG_INPUT = 2
"""Settings, data or checkpoint do not fit, as `rb` says it."""
EX_DATAERR, EX_TEMPFAIL, EX_CONFIG = 65, 75, 78


class NotFinite(Exception):
    """Losses, gradients or weights that are not finite; another attempt from the same weights would fail as well."""

    exit_code = EX_DATAERR
