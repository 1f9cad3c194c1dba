"""Case for test_devices: what a process does that sees one device of a machine on which several processes run."""

from __future__ import annotations

import contextlib
import io
import json
import os

from megatron_rb.platform import get_platform


def own_device(variables: list[dict[str, str]]) -> list[str]:
    """Per case the device that this rank takes, or why it refuses to start.

    Args:
        variables: of the environment, one of them per rank.
    """
    from tests.platform.simulated_musa import install_named

    install_named("musa", devices=1)
    os.environ.update(variables[int(os.environ["RANK"])])
    platform = get_platform("musa")

    from megatron_rb.parallel.collectives import gather_from_all
    from megatron_rb.parallel.world import start_process_group

    try:
        start_process_group(platform, timeout_minutes=1)
        said = str(platform.current_device())
    except ValueError as error:
        said = str(error)
    return gather_from_all(said) if "no musa device" not in said else [said]


def doctor(variables: list[dict[str, str]]) -> list[int]:
    """Devices and ranks of this machine, as rank 0 of `rb doctor` reports them."""
    from tests.platform.simulated_musa import install_named

    install_named("musa", devices=1)
    os.environ.update(variables[int(os.environ["RANK"])])
    from megatron_rb.parallel import doctor

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        doctor.main(["musa", ".", "0"])
    if os.environ["RANK"] != "0":
        return []
    (report,) = json.loads(printed.getvalue().partition(doctor.REPORT)[2])
    return [report["devices"], int(os.environ["LOCAL_WORLD_SIZE"])]
