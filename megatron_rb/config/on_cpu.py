"""What a run on platform=cpu cannot have, known before any process starts; other platforms are asked where they are.

The table of kernels itself stands in `megatron_rb.kernels.dispatch`; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

from megatron_rb.config.schema import Config

ACCELERATORS_ONLY: dict[str, tuple[str, ...]] = {
    "model.layers": ("transformer_engine",),
    "kernels.varlen_attention": ("flash_attn_3", "flash_attn", "flash_attn_4", "torch_varlen"),
}
"""Values that no CPU computes."""
INTERPRETED: dict[str, str] = {
    "kernels.mrope": "triton",
    "kernels.window_attention": "triton",
    "kernels.dynamic_padding": "triton",
    "kernels.linear_cross_entropy": "liger",
    "kernels.rms_norm": "liger",
    "kernels.swiglu": "liger",
}
"""Values that a CPU computes in Triton's interpreter."""
SWITCH = "TRITON_INTERPRET"
OFF = ("", "0", "false", "n", "no", "off")


def check_on_cpu(config: Config, environment: Mapping[str, str]) -> None:
    """Check what platform=cpu asks of other settings.

    Args:
        environment: of the processes of the run.

    Raises:
        ValueError: a value that no CPU computes, or not in this environment.
    """
    if config.platform.name != "cpu":
        return
    for key, names in ACCELERATORS_ONLY.items():
        value = attrgetter(key)(config)
        if value in names:
            raise ValueError(f"{key} {value} does not run on platform=cpu; use auto")
    interpreting = environment.get(SWITCH, "").lower() not in OFF
    for key, name in INTERPRETED.items():
        if attrgetter(key)(config) == name and not interpreting:
            raise ValueError(
                f"{key} {name} runs on platform=cpu in Triton's interpreter only; use auto, or cluster.env.{SWITCH}=1"
            )
    if config.metrics.profile.memory:
        raise ValueError(
            "metrics.profile.memory is true and platform=cpu keeps no history of its memory; set it to false"
        )
