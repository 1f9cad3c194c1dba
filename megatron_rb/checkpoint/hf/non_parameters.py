"""What folders and checkpoints hold beside the parameters of a model and may be left out without being asked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

_REASONS = {
    r"(^|\.)(original_)?inv_freq$": "a buffer that is computed from the configuration",
    r"(^|\.)(cos|sin)_cached$": "a buffer that is computed from the configuration",
    r"(^|\.)_extra_state(/.*)?$": "state of a layer implementation (fp8 scales); the target's layers make their own",
    r"\.(activation|input)_scale$": "a factor of quantised activations, which training has none of",
}
_KNOWN = [(re.compile(pattern), reason) for pattern, reason in _REASONS.items()]
ASKED_FOR = "dropped as asked for with --allow-drop"


def non_parameter(name: str) -> str | None:
    """Why a tensor is left out by rule; None for one that is not known to be needless."""
    return next((reason for pattern, reason in _KNOWN if pattern.search(name)), None)


def is_allowed(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name, or one of the patterns of the shell (`*.inv_freq`), is that of a tensor."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(patterns: Iterable[str], unknown: Collection[str], known: Collection[str], origin: object) -> None:
    """Every pattern of --allow-drop must have left something out.

    Args:
        unknown: names that are no parameters of the model.
        known: names that are.

    Raises:
        ValueError: a pattern fits nothing, or only parameters of the model.
    """
    for pattern in patterns:
        if any(is_allowed(name, [pattern]) for name in unknown):
            continue
        needed = next((name for name in known if is_allowed(name, [pattern])), "")
        if needed:
            raise ValueError(f"--allow-drop {pattern}: {needed} is part of the model and cannot be left out")
        raise ValueError(f"--allow-drop {pattern}: {origin} has no such tensor")
