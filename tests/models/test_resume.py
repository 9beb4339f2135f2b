"""A run goes on with as many rows a step as it was begun with, whatever number of processes takes them."""

import dataclasses
from types import SimpleNamespace

import pytest

from dualoptim import InputError, UnlearnArgs
from dualoptim.config.saved import to_dict, write_config
from dualoptim.models import resume

ARGS = UnlearnArgs(model="org/name", output_dir="out", batch_size=4, gradient_accumulation_steps=2, resume="newest")


@pytest.fixture
def with_its_batch(tmp_path, monkeypatch):
    """Arguments as `processes` go on with them, in a folder where a task was begun by three."""
    monkeypatch.setattr(resume, "decided", lambda _, decide: decide())
    task = tmp_path / "ME+GD_lr1e-05" / "task1"
    task.mkdir(parents=True)
    write_config(task / "config.yaml", to_dict(ARGS) | {"processes": 3})

    def of(processes, **changes):
        accelerator = SimpleNamespace(num_processes=processes, is_main_process=True)
        args = resume.with_its_batch(dataclasses.replace(ARGS, **changes), accelerator, tmp_path)
        return args.batch_size, args.gradient_accumulation_steps

    return of


@pytest.mark.parametrize(
    ("processes", "batch_size", "accumulation"), [(1, 4, 6), (2, 4, 3), (4, 3, 2), (6, 4, 1), (8, 3, 1), (24, 1, 1)]
)
def test_a_step_has_as_many_rows_as_before(with_its_batch, capsys, processes, batch_size, accumulation):
    assert with_its_batch(processes) == (batch_size, accumulation)
    assert capsys.readouterr().out == (
        f"--resume: 3 processes began this run, and {processes} go on with --batch-size {batch_size} "
        f"--gradient-accumulation-steps {accumulation}: 24 rows a step as before\n"
    )


def test_nothing_is_said_where_nothing_has_to_change(with_its_batch, capsys):
    assert with_its_batch(3) == (4, 2)
    assert with_its_batch(1, gradient_accumulation_steps=6) == (4, 6)  # given as it has to be
    assert with_its_batch(1, gradient_accumulation_steps=5) == (4, 5)  # which is refused with the other flags
    assert with_its_batch(1, resume=None) == (4, 2)
    assert capsys.readouterr().out == ""


def test_processes_that_cannot_share_the_rows_alike_are_refused(with_its_batch):
    message = r"a step of this run takes 24 rows, which 5 processes cannot share alike; start 1, 2, 3, .*, 12 or 24 processes"
    with pytest.raises(InputError, match=message):
        with_its_batch(5)
