"""Start a training run here, over ssh or under Slurm, and look after it, e.g. `rb launch experiment=demo`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from megatron_rb.app.fitting import check_fits, over_memory
from megatron_rb.app.planning import check_left_to_plan, maybe_plan, memory_forecast
from megatron_rb.config.compose import load_config
from megatron_rb.config.derive import derive
from megatron_rb.config.schema import Config
from megatron_rb.launch.actions import dry_run, run
from megatron_rb.launch.main import OF_A_RUN, act_on_run, split_words, sweep_of
from megatron_rb.launch.prepare import build_job, check_paths, missing_data
from megatron_rb.launch.surroundings import check_surroundings
from megatron_rb.launch.sweep import launch_sweep
from megatron_rb.shapes.foreign import check_init
from megatron_rb.shapes.published import missing_weights, shape_of


def main(argv: list[str]) -> int:
    """Check the settings, then run, dryrun, status, logs, stop or requeue."""
    given = _parser().parse_intermixed_args(argv)
    options, settings = split_words(given.settings)
    options = replace(options, as_json=given.json, now=given.now, rank=given.rank)
    options = replace(options, follow=True if given.follow else options.follow)
    if given.dry_run:
        options = replace(options, action="dryrun")
    if options.rehearse and options.action != "dryrun":
        raise ValueError(f"rehearse=true goes with action=dryrun, not with action={options.action}; or use rb rehearse")
    if options.action in OF_A_RUN:
        return act_on_run(options, settings)
    prepared = []
    for run_settings in sweep_of(settings):
        asked = load_config(run_settings)
        check_left_to_plan(asked, run_settings)
        config = maybe_plan(asked)
        dry = options.action == "dryrun"
        missing = missing_weights(config.model.hf_path, config.model.published)
        shape = shape_of(config.model.hf_path, config.model.published)
        derived = derive(config, shape)
        if missing and not dry:
            raise ValueError(missing)
        check_paths(config, derived, needs_data=bool(config.data.train) and not missing or not dry)
        check_init(derived.init)
        check_surroundings(config, derived)
        if not dry and not asked.parallel.auto:  # a plan fits by the samples that it is made for
            check_fits(config, derived, shape)
        prepared.append((config, build_job(config, derived)))
    if len(prepared) > 1:
        return launch_sweep(prepared, options)
    config, job = prepared[0]
    if options.action == "dryrun":
        dry_run(config, job)
        print("\n" + "\n".join(memory_forecast(config, derived, shape)))
        print("\n".join([*_still_missing(config), *over_memory(config, derived, shape)]))
        return _rehearse(settings) if options.rehearse else 0
    return run(config, job, options)


def _rehearse(settings: list[str]) -> int:
    from megatron_rb.tools.rehearse import main as rehearse  # imports torch, which a launch does without

    return rehearse(settings)


def _still_missing(config: Config) -> list[str]:
    """What has to be there before a dry run can be a run, in lines."""
    weights = missing_weights(config.model.hf_path, config.model.published)
    return [f"still missing: {text}" for text in [weights, *missing_data(config)] if text]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb launch", description=__doc__)
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="settings of the run, and action=run|dryrun|status|logs|stop|requeue, follow=true|false; rehearse=true "
        "with a dry run",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="stay until the run has ended")
    parser.add_argument("--json", action="store_true", help="status for a script to read")
    parser.add_argument("--now", action="store_true", help="stop without saving")
    parser.add_argument("--rank", type=int, metavar="N", help="whose log to show")
    parser.add_argument("--dry-run", action="store_true", help="the same as action=dryrun")
    return parser
