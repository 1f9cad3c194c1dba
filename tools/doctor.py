"""Check every machine of a cluster: devices, memory, disk, libraries, speed and links; name the bad one."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from megatron_rb.config.compose import load_config
from megatron_rb.config.schema import Config
from megatron_rb.launch.doctor import examine, file_findings, files_line, findings, table
from megatron_rb.launch.open_files import files_of_rank, files_of_store
from megatron_rb.launch.prepare import job_for_machines


def main(argv: list[str]) -> int:
    """0 when nothing stands out, 1 when a machine does."""
    parser = argparse.ArgumentParser(prog="rb doctor", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. cluster=slurm cluster.nodes=4")
    parser.add_argument("--kernels", action="store_true", help="which implementation runs here for each part, and why")
    parser.add_argument("--json", action="store_true", help="all figures for a script to read")
    options = parser.parse_args(argv)
    config = load_config(options.settings)
    if options.kernels:
        return _kernels(config, options.json)
    job = job_for_machines(config)
    reports = examine(job, config.platform.name)
    parallel = config.parallel
    world = config.world_size or max(job.world_size, parallel.tp_size * parallel.pp_size * parallel.cp_size)
    degrees = parallel.tp_size, parallel.pp_size, parallel.cp_size
    rank = files_of_rank(world, *degrees, reports[0]["lazy_gloo"], devices=reports[0]["platform"] != "cpu")
    files = max(rank, files_of_store(world))
    bad = [*findings(reports), *file_findings(reports, files)]
    text = f"{table(reports)}\n{files_line(reports, world, files)}"
    print(
        json.dumps({"machines": reports, "bad": bad, "files_of_rank": rank, "files_of_store": files_of_store(world)})
        if options.json
        else text
    )
    for line in [] if options.json else bad or ["nothing stands out"]:
        print(line)
    return 1 if bad else 0


def _kernels(config: Config, as_json: bool) -> int:
    # These import torch.
    from megatron_rb.models.kernel_report import kernel_report, report_text
    from megatron_rb.platform import get_platform
    from megatron_rb.platform.dtypes import DTYPES

    platform = get_platform(config.platform.name)
    platform.set_device(0)
    dtype = DTYPES[config.model.dtype]
    rows = kernel_report(platform, dtype, config.model.layers, vars(config.kernels))
    print(json.dumps([asdict(row) for row in rows]) if as_json else report_text(platform, dtype, rows))
    return 0
