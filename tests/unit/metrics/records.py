"""A step with plausible numbers, to change one at a time."""

from dataclasses import replace

from megatron_rb.metrics.record import StepRecord

RATES = {"vision": 1e-6, "merger": 2e-6, "language": 4e-6}


def step_record(step: int, **changes) -> StepRecord:
    record = StepRecord(
        step=step,
        epoch=0,
        loss=2.5,
        grad_norm=1.5,
        learning_rates=RATES,
        loss_scale=1.0,
        num_tokens=4000,
        num_labels=100,
        num_patches=12000,
        num_samples=8,
        seconds=2.0,
        data_wait_seconds=0.1,
        memory_bytes=3 * 2**30,
    )
    return replace(record, **changes)
