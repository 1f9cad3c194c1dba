"""AdamW that counts its steps per parameter group, for machines without a vendor's fused Adam.

megatron-core's distributed optimizer keeps `step` in the parameter group, as the fused Adam of Transformer Engine
and Apex do. torch.optim.AdamW keeps one `step` tensor per parameter, which cannot be restored from such a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay; per-parameter state is `exp_avg` and `exp_avg_sq` only.

    `adam_w_mode` and, from 0.17 on, `capturable` exist for the signature that megatron-core calls; plain Adam and steps
    in a CUDA graph are not offered.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("GroupStepAdamW decouples weight decay from the gradient; plain Adam needs a fused Adam")
        if capturable:
            raise ValueError("GroupStepAdamW counts its steps on the host; a step in a CUDA graph needs a fused Adam")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient. The step of a group without any counts as well."""
        if closure is not None:
            raise ValueError("GroupStepAdamW takes no closure")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        pairs: dict[tuple[torch.device, torch.dtype], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for param in group["params"]:
            if param.grad is not None and param.numel() > 0:
                pairs.setdefault((param.device, param.dtype), []).append((param, param.grad))
        beta1, beta2 = group["betas"]
        for (device, _), pairs_of_kind in pairs.items():
            params = [param for param, _ in pairs_of_kind]
            states = [self._param_state(param) for param in params]
            step = torch.full((), float(group["step"]), dtype=torch.float32, device=device)  # no copy, which would wait
            # The kernel reads the step and does not advance it, so one tensor serves all parameters.
            torch._fused_adamw_(
                params,
                [grad for _, grad in pairs_of_kind],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _param_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state
