"""Compare two results of `rb bench train`; exit code 1 when B is slower than A beyond limit and noise."""

from __future__ import annotations

import argparse

from megatron_rb.bench.train.compare import compare
from megatron_rb.bench.train.result import load_result


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="rb bench compare", description=__doc__)
    parser.add_argument("a", metavar="A", help="result.json, or the folder that holds it")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--limit", type=float, default=3.0, metavar="PERCENT", help="loss of speed that passes")
    options = parser.parse_args(argv)
    found = compare(load_result(options.a), load_result(options.b), options.limit / 100)
    print(f"{'':<22}{'A':>14}{'B':>14}{'B / A':>9}")
    for name, ours, theirs in found.rows:
        ratio = f"{theirs / ours:>9.3f}" if ours else f"{'':>9}"
        print(f"{name.replace('_', ' '):<22}{ours:>14,.4g}{theirs:>14,.4g}{ratio}")
    for note in found.notes:
        print(f"differs: {note}")
    verdict = "not slower" if found.passed else "SLOWER"
    print(
        f"{verdict}: B makes {found.change:+.1%} tokens per second and device; allowed are -{found.limit:.1%} and the "
        f"noise of both, {found.noise:.1%}"
    )
    return 0 if found.passed else 1
