"""Muon for the hidden matrices of a model and AdamW for the rest, as one optimizer that a bank can be made of."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from dualoptim.method.adamw import adamw
from dualoptim.method.dual import Groups


class Muon(Optimizer):
    """Muon (arXiv 2502.16982) in groups that are `hidden`, AdamW in the others, each as torch has it.

    A step of Muon moves a matrix by the mean of its gradients with all singular values made about 1, times 0.2 and the root of
    its longer side: on average by as much as one of AdamW does, so that one rate serves both. That mean decays by torch's own
    0.95; `betas` are AdamW's.
    """

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"hidden": False})

        def muon(own: Groups) -> Optimizer:
            return torch.optim.Muon(own, lr=lr, adjust_lr_fn="match_rms_adamw")

        # each writes its settings into the groups that it gets, and has them for a step alone
        self._parts = {
            hidden: make(own)
            for hidden, make in ((True, muon), (False, adamw(lr, betas)))
            if (own := [group for group in self.param_groups if group["hidden"] == hidden])
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = closure() if closure else None
        for hidden, part in self._parts.items():
            part.state, part.param_groups = self.state, [group for group in self.param_groups if group["hidden"] == hidden]
            part.step()
        return loss


def hidden_apart(groups: Groups, model: torch.nn.Module) -> Groups:
    """Put the matrices that Muon takes into groups of their own: all but those of embeddings and output head."""
    ends = {id(one) for module in model.modules() if isinstance(module, torch.nn.Embedding) for one in module.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    ends |= {id(one) for one in head.parameters()} if head is not None else set()

    def is_hidden(parameter: torch.nn.Parameter) -> bool:
        return parameter.ndim == 2 and id(parameter) not in ends

    return [
        {**group, "params": own, "hidden": hidden}
        for group in groups
        for hidden in (True, False)
        if (own := [parameter for parameter in group["params"] if is_hidden(parameter) == hidden])
    ]
