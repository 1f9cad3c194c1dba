"""The optimizers: their names, the settings that only some of them read, what they keep of every parameter.

Their constructors stand under the same names in `megatron_rb.train.optimizers`; a test holds the two equal.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_rb.config.schema import Config, OptimizerConfig

FP32_BYTES = 4


@dataclass(frozen=True)
class OptimizerTraits:
    """What is known of an optimizer without torch."""

    title: str
    settings: tuple[str, ...]
    """Fields of `OptimizerConfig` that it reads and not every optimizer does."""
    state: tuple[str, ...]
    """What it keeps of every trained value, in fp32; names as in a checkpoint."""
    distributed: bool
    """megatron-core can share its state out among the data-parallel ranks."""

    @property
    def state_bytes(self) -> int:
        """Bytes of state per trained parameter, the fp32 copy of bf16 weights not among them."""
        return FP32_BYTES * len(self.state)


OPTIMIZERS = {
    "adamw": OptimizerTraits("AdamW", ("beta1", "beta2", "eps"), state=("exp_avg", "exp_avg_sq"), distributed=True),
    "sgd": OptimizerTraits("SGD with momentum", ("momentum",), state=("momentum_buffer",), distributed=False),
}


def check_optimizer(config: Config) -> None:
    """Check what the optimizer asks of other settings.

    Raises:
        ValueError: rates that would rise, a setting that it does not read, or state that cannot be shared out.
    """
    settings, traits = config.optimizer, OPTIMIZERS[config.optimizer.name]
    if settings.min_lr > settings.lr:
        raise ValueError(f"optimizer.min_lr {settings.min_lr} is larger than optimizer.lr {settings.lr}")
    for other, foreign in OPTIMIZERS.items():
        for field in set(foreign.settings) - set(traits.settings):
            value = getattr(settings, field)
            if value != _default(field):
                raise ValueError(
                    f"optimizer.{field} is {value} and optimizer.name {settings.name}, which does not read it; leave "
                    f"it at {_default(field)}, or take optimizer.name={other}"
                )
    if config.parallel.distributed_optimizer and not traits.distributed:
        raise ValueError(
            f"megatron-core cannot share the state of optimizer.name {settings.name} out among data-parallel ranks; "
            f"set parallel.distributed_optimizer=false"
        )


def _default(field: str) -> float:
    defaults = {entry.name: entry.default for entry in dataclasses.fields(OptimizerConfig)}
    return defaults[field]  # type: ignore[return-value]
