"""The ways a tiny model is cut in the tests: degrees, layouts, virtual stages."""

from __future__ import annotations


def layouts(vision: int, decoder: int) -> list[dict]:
    """Cases for a model of `vision` >= 3 and `decoder` >= 3 layers; ranks left over are data parallel."""
    whole = f"P v*{vision} M E t*{decoder} L"
    mid_vision = f"P v*2 | v*{vision - 2} M E t*{decoder} L"
    four = f"P v*2 | v*{vision - 2} M E t*1 | t*{decoder - 2} | t*1 L"
    merger_alone = f"P v*{vision} | M | E t*1 | t*{decoder - 1} L"
    # DeepStack text layers 0, 1, 2 on two stages, tied embedding away from stage 0 and from the head.
    virtual = f"P v*1 | v*{vision - 1} M | E t*2 | t*{decoder - 2} L"
    return [
        {"tp": 1, "pp": 1, "layout": whole},
        {"tp": 1, "pp": 1, "layout": whole, "packed": True},
        {"tp": 2, "pp": 1, "layout": whole},
        {"tp": 2, "pp": 1, "layout": whole, "sp": True},
        {"tp": 1, "pp": 2, "layout": mid_vision},
        {"tp": 2, "pp": 2, "layout": mid_vision},
        {"tp": 2, "pp": 2, "layout": mid_vision, "sp": True, "packed": True},
        {"tp": 1, "pp": 4, "layout": four},
        {"tp": 1, "pp": 2, "layout": virtual},
        {"tp": 1, "pp": 4, "layout": merger_alone},
        {"tp": 2, "pp": 2, "layout": virtual, "sp": True},
    ]


def context_layouts(vision: int, decoder: int) -> list[dict]:
    """The same with context parallelism."""
    whole = f"P v*{vision} M E t*{decoder} L"
    mid_vision = f"P v*2 | v*{vision - 2} M E t*{decoder} L"
    virtual = f"P v*1 | v*{vision - 1} M | E t*2 | t*{decoder - 2} L"
    return [
        {"tp": 1, "pp": 1, "layout": whole, "cp": 2},
        {"tp": 2, "pp": 1, "layout": whole, "cp": 2, "sp": True, "packed": True},
        {"tp": 1, "pp": 2, "layout": mid_vision, "cp": 2, "packed": True},
        {"tp": 1, "pp": 1, "layout": whole, "cp": 4, "packed": True},
        {"tp": 1, "pp": 2, "layout": virtual, "cp": 2},
        {"tp": 2, "pp": 1, "layout": whole, "cp": 2},
    ]
