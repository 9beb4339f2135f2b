"""See what one phase keeps in a shared optimizer state as a state of its own, without touching the tensors in it."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Entries(MutableMapping[str, Any]):
    """What one phase keeps of one parameter: the entries whose names begin with the phase, by the rest of their names."""

    def __init__(self, state: dict[str, Any], prefix: str) -> None:
        self._state, self._prefix = state, prefix

    def __getitem__(self, key: str) -> Any:
        return self._state[self._prefix + key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._state[self._prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self._state[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in self._state if key.startswith(self._prefix))

    def __len__(self) -> int:
        return [key.startswith(self._prefix) for key in self._state].count(True)


class Bank(MutableMapping[Tensor, Mapping[str, Any]]):
    """What one phase keeps of all parameters of `owner`, whose state has it under flat names such as `forget/exp_avg`."""

    def __init__(self, owner: Optimizer, phase: str) -> None:
        self._owner, self._prefix = owner, f"{phase}/"

    def __getitem__(self, parameter: Tensor) -> Entries:
        return Entries(self._owner.state[parameter], self._prefix)

    def __setitem__(self, parameter: Tensor, entries: Mapping[str, Any]) -> None:
        self[parameter].clear()
        self[parameter].update(entries)

    def __delitem__(self, parameter: Tensor) -> None:
        self[parameter].clear()
        if not self._owner.state[parameter]:
            del self._owner.state[parameter]

    def __contains__(self, parameter: object) -> bool:
        return bool(Entries(self._owner.state.get(parameter, {}), self._prefix))  # type: ignore[call-overload]

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for parameter in self._owner.state if parameter in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
