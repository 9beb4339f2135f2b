"""Pieces of weights and states are put together however they were cut, and what is missing of them is found."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from dualoptim.config.args import UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.method.engine import prepare
from dualoptim.method.groups import decay_groups
from dualoptim.models import portable
from dualoptim.models.portable import Held, Part, _Stored, read_parts, write_parts


def engine_of(optim="dual-adamw", seed=0, width=4, bits=32):
    args = UnlearnArgs(optim=optim, optim_bits=bits)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, width), torch.nn.Linear(width, 3))
    return prepare(Accelerator(cpu=True), model, kind_of(args).build(args)(decay_groups(model, 0.01, bits)))


def take_steps(engine, phases=("forget", "retain", "retain"), only=""):
    for phase in phases:
        engine.use_phase(phase, 1e-2)
        for name, parameter in engine.model.named_parameters():
            parameter.grad = torch.randn_like(parameter) if name.startswith(only) else None
        engine.step(0.0, torch.zeros(0))


def all_of(engine):
    """Weights and states by the weight's name."""
    found = {}
    for name, parameter in engine.model.named_parameters():
        found[name] = parameter.detach().clone()
        found |= {
            f"{name}/{key}": torch.as_tensor(value).clone() for key, value in engine.raw_optimizer.state[parameter].items()
        }
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optim", ["dual-adamw", "dual-adamw-plus", "adamw-alternate", "adamw"])
def test_what_was_written_comes_back_bit_for_bit(tmp_path, optim):
    engine = engine_of(optim)
    take_steps(engine)
    write_parts(engine, tmp_path)
    again = engine_of(optim, seed=1)
    read_parts(again, tmp_path)
    assert same(all_of(engine), all_of(again))
    take_steps(engine)
    torch.set_rng_state(load_file(tmp_path / "random-0.safetensors")["cpu"])
    take_steps(again)
    assert same(all_of(engine), all_of(again)), "they go on alike"


def test_pieces_that_are_cut_otherwise_are_put_together(tmp_path):
    engine = engine_of()
    take_steps(engine)
    write_parts(engine, tmp_path)
    (path,) = tmp_path.glob("part-*")
    files = {0: {}, 1: {}}
    for key, value in load_file(path).items():
        entry, _, name = key.partition("@0:")
        if value.dim():
            cut = len(value) // 3
            files[0][key], files[1][f"{entry}@{cut}:{name}"] = value[:cut].clone(), value[cut:].clone()
        else:
            files[0][key] = value
    path.unlink()
    for number, tensors in files.items():
        save_file(tensors, tmp_path / f"part-{number}-1.safetensors")
    again = engine_of(seed=1)
    read_parts(again, tmp_path)
    assert same(all_of(engine), all_of(again))
    (tmp_path / "part-1-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"14 of 20 values are missing of weight of 0\.weight"):
        read_parts(again, tmp_path)


def flat_of(names, sizes):
    """A tensor in which weights lie end to end, as ZeRO lays them, with the last one's second half elsewhere."""
    parts, place = [], 0
    for name, size in zip(names, sizes, strict=True):
        own = size if name != names[-1] else size // 2
        parts.append(Part(name, 0, place, own))
        place += own
    return Held(torch.zeros(place + 3), parts, "0 of 0")


def test_weights_that_lie_end_to_end_take_their_parts(tmp_path):
    engine = engine_of()
    take_steps(engine)
    write_parts(engine, tmp_path)
    wanted = all_of(engine)
    names = ["1.weight", "0.bias", "0.weight"]
    held = flat_of(names, [wanted[name].numel() for name in names])
    stored = _Stored(tmp_path, fused=False)
    expected = torch.cat([wanted[f"{name}/retain/exp_avg"].flatten() for name in names])[: len(held.tensor) - 3]
    moments = stored.value(held, "retain/exp_avg", None)
    assert torch.equal(moments, torch.cat([expected, torch.zeros(3)]))
    assert stored.value(held, "retain/step", None) == 2


def test_a_weight_that_had_no_step_takes_the_counter_of_those_it_lies_with_and_others_are_refused(tmp_path):
    engine = engine_of()
    take_steps(engine, ("forget", "forget"), only="1.")
    write_parts(engine, tmp_path)
    held = flat_of(["1.weight", "0.weight"], [12, 20])
    assert _Stored(tmp_path, fused=False).value(held, "forget/step", None) == 2
    take_steps(engine, ("forget",))
    write_parts(engine, tmp_path)
    with pytest.raises(ValueError, match=r"forget/step of 1.weight is not that of the weights that it now lies with"):
        _Stored(tmp_path, fused=False).value(held, "forget/step", None)


def test_files_end_at_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(portable, "_FILE_BYTES", 200)
    engine = engine_of()
    take_steps(engine)
    names, portable_ = write_parts(engine, tmp_path)
    assert portable_
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert len(names) > 2
    again = engine_of(seed=1)
    read_parts(again, tmp_path)
    assert same(all_of(engine), all_of(again))


def test_states_in_bytes_come_back(tmp_path):
    pytest.importorskip("bitsandbytes")
    engine, again = engine_of(width=2000, bits=8), engine_of(width=2000, bits=8, seed=1)
    take_steps(engine)
    assert not write_parts(engine, tmp_path)[1]
    read_parts(again, tmp_path)
    assert same(all_of(engine), all_of(again))
    assert any(value.dtype == torch.uint8 for value in all_of(again).values())


@pytest.mark.parametrize(
    ("device", "read"),
    [
        ("mps", lambda: torch.tensor([7], dtype=torch.uint8)),  # as Apple's, whose functions take no device
        ("cuda:7", lambda device: torch.tensor([device.index], dtype=torch.uint8)),
    ],
)
def test_a_random_state_is_asked_for_as_its_device_takes_it(device, read, monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda asked: SimpleNamespace(get_rng_state=read))
    states = portable._random_states(SimpleNamespace(device=torch.device(device)))
    assert states["device"].tolist() == [7]
