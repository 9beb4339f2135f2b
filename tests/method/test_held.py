"""What an optimizer's state takes, and what a run's first log line says of it."""

import pytest
import torch
from accelerate import Accelerator
from support import use_phase

from dualoptim import UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.data import demo
from dualoptim.method.engine import prepare
from dualoptim.method.groups import decay_groups
from dualoptim.method.held import held, state_size


@pytest.mark.parametrize(("quantize_embeddings", "share"), [(False, 0.78), (True, 0.99)])
@pytest.mark.parametrize(
    ("kind", "bytes_32", "bytes_8"), [("dual-adamw", 16, 4.2), ("dual-adamw-plus", 24, 6.2), ("adamw", 8, 2.1)]
)
def test_bytes_per_parameter(kind, bytes_32, bytes_8, quantize_embeddings, share):
    model, _ = demo.tiny_model(0)
    args = UnlearnArgs(optim=kind, optim_bits=8)
    optimizer = kind_of(args).build(args)(decay_groups(model, 0.01, 8, quantize_embeddings))
    for phase in ("forget", "retain"):
        use_phase(optimizer, phase, 1e-3)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    (wide, wide_parameters), (narrow, narrow_parameters) = (state_size(optimizer, quantized) for quantized in (False, True))
    assert wide / wide_parameters == pytest.approx(bytes_32, abs=0.1)
    assert bytes_8 - 0.2 < narrow / narrow_parameters < bytes_8
    assert narrow_parameters / (narrow_parameters + wide_parameters) == pytest.approx(share, abs=0.02)
    embedding = model.get_input_embeddings().weight
    assert any(value.dtype == torch.uint8 for value in optimizer.state[embedding].values() if torch.is_tensor(value)) == (
        quantize_embeddings
    )


def test_a_tensor_that_several_entries_share_counts_once():
    weight = torch.nn.Parameter(torch.zeros(100))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    shared = torch.zeros(100)
    optimizer.state[weight] = {"first": shared, "second": shared.view(10, 10), "counter": 3}
    assert state_size(optimizer, quantized=False) == (400, 100)
    assert state_size(optimizer, quantized=True) == (0, 0)


def test_the_log_says_types_and_bytes_of_what_trains():
    model = torch.nn.Linear(64, 64)
    model.bias.requires_grad_(False)
    engine = prepare(Accelerator(), model, torch.optim.AdamW([model.weight]))
    assert held(engine) == {"weights": "float32", "masters": ""}
    model.weight.grad = torch.ones_like(model.weight)
    engine.step(0, torch.zeros(0))
    assert held(engine) == {"weights": "float32", "masters": "float32", "state_bytes_per_parameter": round(8 + 4 / 4096, 4)}
