"""Dense value estimation: hop samples learned like any conversation, and judged on their own."""

from __future__ import annotations

import json

from megatron_rb.tasks.sft import SupervisedFineTuning


class ValueEstimation(SupervisedFineTuning):
    """The `value` task: next-token loss as in RoboBrain 2.5 and Robo-Dopamine, on hop samples or a mix with them."""

    def evaluate(self) -> dict[str, float]:
        """`loss` over all held-out samples, `hop_loss` over those that carry a hop label."""
        values = super().evaluate()
        hops = self._hop_rows()
        return values | (self.mean_loss("hop_loss", hops) if hops else {})

    def _hop_rows(self) -> list[int]:
        row = getattr(self.evaluation, "row", None)
        if self.evaluation is None or row is None:  # samples that are drawn have no row, and no hops
            return []
        return [number for number in range(len(self.evaluation)) if "hop" in json.loads(row(number))]
