"""One optimizer object with two decoupled states over one set of weights (DualOptim, arXiv 2504.15827).

A forget step moves the weights with the forget objective's own moments, a retain step with the retain objective's own. With
phase o in {forget, retain}, gradient g and the phase's own counter k, decoupled AdamW is

    m_o <- b1 m_o + (1 - b1) g        v_o <- b2 v_o + (1 - b2) g^2
    w   <- (1 - lr_o wd) w - lr_o (m_o / (1 - b1^k)) / (sqrt(v_o / (1 - b2^k)) + eps)

Two optimizer objects over one model would be simpler to write, and break under Accelerate: DeepSpeed keeps only the
last one, FSDP fails to save them, and fp16 unscales the gradients once for each.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from dualoptim.method.banks import Bank, Entries

Groups = list[dict[str, Any]]
MakeOptimizer = Callable[[Groups], Optimizer]

PHASES = ("forget", "retain")
_NOT_FROM_ZERO = ("ASGD", "NAdam", "Rprop")  # a step at rate zero does not leave these as they start
_OWN_KEYS = ("params", "group_id", "phase")


class DualOptimizer(Optimizer):
    """Any two torch optimizers whose state starts at zero over the same parameter groups, one of them active at a time.

    That is AdamW, Adam, SGD, RMSprop, Adagrad, ... and not NAdam, ASGD, Rprop or SGD with dampening.

    `forget` and `retain` each build an optimizer from parameter groups, for example
    `lambda groups: torch.optim.AdamW(groups, lr=1e-5)`. Those inner optimizers own no memory: all state lives in this object's
    `state[p]` under the flat names `forget/exp_avg`, `retain/exp_avg`, ..., of which each inner optimizer sees its own bank as
    its state, and for a step the one of the active phase is lent `param_groups` as they are at that moment. So everything that
    looks at an optimizer from outside (DeepSpeed, which exchanges the parameters in the groups; Accelerate, which saves
    `state_dict()`) sees both banks, nothing is kept twice, and a step is no more than the inner optimizer's.

    The groups carry the active phase and that phase's hyperparameters; call `use(phase, lr)` before each step.

    Raises:
        ValueError: if one of the two factories drops, merges or reorders the groups it is given, or builds an optimizer whose
            state does not start at zero.
    """

    def __init__(self, params: Iterable[Any], *, forget: MakeOptimizer, retain: MakeOptimizer, phase: str = "forget") -> None:
        super().__init__(params, {})
        # Accelerate and DeepSpeed rebuild the group dictionaries and the list around them; the id finds a group again.
        for group_id, group in enumerate(self.param_groups):
            group["group_id"] = group_id
        self._inner: dict[str, Optimizer] = {}
        self._make = {"forget": forget, "retain": retain}
        self._built_with_state: set[str] = set()  # phases whose optimizer makes its state in the constructor (Adagrad)
        self._ready: set[tuple[str, int]] = set()  # phases and parameters that `materialize` has seen
        self._settings: dict[str, Groups] = {}
        for name, make in self._make.items():
            inner = make([{**group, "params": list(group["params"])} for group in self.param_groups])
            if [group.get("group_id") for group in inner.param_groups] != list(range(len(self.param_groups))):
                raise ValueError(f"the {name} optimizer must keep the parameter groups that it is given")
            if type(inner).__name__ in _NOT_FROM_ZERO or any(group.get("dampening") for group in inner.param_groups):
                raise ValueError(f"the {name} optimizer's state does not start at zero; take AdamW or SGD without dampening")
            self._settings[name] = [
                {key: value for key, value in group.items() if key not in _OWN_KEYS} for group in inner.param_groups
            ]
            if inner.state:  # dropped and made when it is needed, because ZeRO exchanges the parameters that it belongs to
                self._built_with_state.add(name)
            inner.state, inner.param_groups = Bank(self, name), []  # type: ignore[assignment]
            self._inner[name] = inner
        self.use(phase)

    @property
    def phase(self) -> str:
        """Name the active phase. It is read from the groups, which survive `prepare` and checkpoints."""
        return self.param_groups[0]["phase"]

    def use(self, phase: str, lr: float | None = None) -> None:
        """Make `phase` active: its hyperparameters are written into the groups, with rate `lr` if one is given.

        Raises:
            ValueError: if `phase` is not "forget" or "retain".
        """
        if phase not in self._inner:
            raise ValueError(f"unknown phase {phase!r}; choose from {', '.join(PHASES)}")
        for group in self.param_groups:
            settings = self._settings[phase][group["group_id"]]
            if lr is not None:
                settings["lr"] = lr
            group.update(settings, phase=phase)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient with the active phase's optimizer and bank."""
        self.materialize(only_with_grad=True)
        with self._lend(self.phase, self.param_groups) as inner:
            return inner.step(closure)

    @torch.no_grad()
    def materialize(self, only_with_grad: bool = False) -> None:
        """Create the zero state of both banks for every parameter that has none yet; weights do not change.

        A bank that appears only once its phase has had a step is lost by loaders that fill just what exists (FSDP2), so
        `step` does this for both phases the first time a parameter is touched. The state is made by the inner optimizer
        itself, in its constructor or by a step with a zero gradient at rate zero, one parameter at a time to keep memory flat.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                missing = [phase for phase in PHASES if (phase, id(parameter)) not in self._ready]
                if not missing or (only_with_grad and parameter.grad is None):
                    continue
                gradient = parameter.grad
                parameter.grad = torch.zeros_like(parameter)
                for phase in missing:
                    self._ready.add((phase, id(parameter)))
                    bank = self._inner[phase].state
                    if parameter in bank:
                        continue  # loaded
                    settings = {**self._settings[phase][group["group_id"]], "lr": 0.0, "weight_decay": 0.0}
                    if phase in self._built_with_state:
                        bank.update(self._make[phase]([{**group, "params": [parameter]}]).state)
                    with self._lend(phase, [{**group, **settings, "params": [parameter], "phase": phase}]) as inner:
                        inner.step()
                    counter = bank[parameter].get("step") if parameter in bank else None
                    if isinstance(counter, torch.Tensor):
                        counter.zero_()
                    elif counter is not None:
                        bank[parameter]["step"] = 0
                parameter.grad = gradient

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load both banks. Each inner optimizer loads its own part, by its own rules for types and counters."""
        saved_groups = state_dict["param_groups"]
        self.state.clear()
        self._ready.clear()
        for phase in PHASES:
            parts = {index: dict(Entries(entries, f"{phase}/")) for index, entries in state_dict["state"].items()}
            with self._lend(phase, self.param_groups) as inner:
                bank = inner.state
                saved = zip(inner.param_groups, saved_groups, strict=True)
                inner.load_state_dict(
                    {
                        "state": {index: part for index, part in parts.items() if part},
                        "param_groups": [{**group, "params": own["params"]} for group, own in saved],
                    }
                )
                bank.update(inner.state)
                inner.state = bank
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    @contextlib.contextmanager
    def _lend(self, phase: str, groups: Groups) -> Iterator[Optimizer]:
        """Give the inner optimizer of `phase` the groups for a while; its bank of the state it always sees.

        The active phase reads its hyperparameters from the groups, because loaders set the rate there to zero for a step that
        must move nothing; the other phase reads its own.
        """
        inner = self._inner[phase]
        for group in groups:
            own = self._settings[phase][group["group_id"]]
            settings = {key: group[key] for key in own} if group["phase"] == phase else own
            inner.param_groups.append({**settings, "group_id": group["group_id"], "params": group["params"]})
        try:
            yield inner
        finally:
            inner.param_groups = []
