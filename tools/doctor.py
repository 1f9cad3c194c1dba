"""Check every machine of a cluster: devices, memory, disk, libraries, speed and links; name the bad one."""

from __future__ import annotations

import argparse
import json

from megatron_rb.config.compose import load_config
from megatron_rb.launch.doctor import examine, findings, table
from megatron_rb.launch.prepare import job_for_machines


def main(argv: list[str]) -> int:
    """0 when nothing stands out, 1 when a machine does."""
    parser = argparse.ArgumentParser(prog="rb doctor", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. cluster=slurm cluster.nodes=4")
    parser.add_argument("--json", action="store_true", help="all figures for a script to read")
    options = parser.parse_args(argv)
    config = load_config(options.settings)
    reports = examine(job_for_machines(config), config.platform.name)
    bad = findings(reports)
    print(json.dumps({"machines": reports, "bad": bad}) if options.json else table(reports))
    for line in [] if options.json else bad or ["nothing stands out"]:
        print(line)
    return 1 if bad else 0
