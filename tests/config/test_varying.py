"""What a sweep varies by name: how values are read, which runs follow, and what is refused."""

import dataclasses

import pytest

from dualoptim import InputError, SweepArgs, UnlearnArgs
from dualoptim.config.cli import parse
from dualoptim.config.flags import default_of, flags
from dualoptim.config.varying import combinations, in_a_name, varied


def runs(line, **changes):
    args = parse(SweepArgs, ["--output-dir", "x", *line.split()])
    own = {field.name: getattr(args, field.name) for field in dataclasses.fields(UnlearnArgs)}
    return list(combinations(args, UnlearnArgs(**own | changes)))


def test_values_are_read_as_they_are_typed():
    line = "--vary forget-coeff 0.1 1 --vary base_betas .9,.95 none --vary task_list 1 2,1 --vary mask true no --vary layer 3"
    args = parse(SweepArgs, ["--output-dir", "x", *line.split(), "--vary", "trainable", "layers.(5,6)", "last:2"])
    assert varied(args) == {
        "forget_coeff": [0.1, 1.0], "base_betas": [(0.9, 0.95), None], "task_list": [(1,), (2, 1)], "mask": [True, False],
        "layer": [3], "trainable": ["layers.(5,6)", "last:2"],
    }  # fmt: skip


def test_every_combination_is_a_run_with_a_name_of_its_own():
    found = runs("--split forget01 forget05 --vary retain_freq 1 3")
    assert [(one.split, one.retain_freq) for _, one in found] == [
        (("forget01",), 1), (("forget01",), 3), (("forget05",), 1), (("forget05",), 3),
    ]  # fmt: skip
    assert [in_a_name(words) for words, _ in found][1] == "_split=forget01_retain_freq=3"
    names = {in_a_name(words) for words, _ in runs("--vary trainable layers.(5|6) layers.(5/6) layers.5 last:2 last:1")}
    assert len(names) == 5
    assert not any("/" in name for name in names)
    assert runs("") == [({}, dataclasses.replace(UnlearnArgs(), output_dir="x"))]


def test_an_optimizer_among_others_gets_the_flags_alone_that_it_reads():
    plus = "--optim dual-adamw-plus --base-betas .9 .95 --forget-lr 1e-6 --vary optim adamw dual-adamw dual-adamw-plus"
    assert [(one.optim, one.forget_lr, one.base_betas) for _, one in runs(plus)] == [
        ("adamw", None, None), ("dual-adamw", 1e-6, None), ("dual-adamw-plus", 1e-6, (0.9, 0.95)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--vary", "--vary '' is no flag that changes what a run computes; give one such as forget_coeff"),
        ("--vary forget_coef 1", "--vary 'forget_coef' is no flag that changes"),
        ("--vary model a b", "--vary 'model' is no flag that changes"),
        ("--vary threads 1 2", "--vary 'threads' is no flag that changes"),
        ("--vary seeds 1 2", "--vary 'seeds' is no flag that changes"),
        ("--vary seed 1 2", "--vary seed has a list of its own; give --seeds 1 2"),
        ("--vary forget_coeff", "--vary forget_coeff has no values; give some, such as --vary forget_coeff 0.1 1"),
        ("--vary forget_coeff 1 1.0", "--vary forget_coeff names 1 twice; give each value once"),
        ("--vary forget_coeff 1 --vary forget-coeff 2", "--vary forget-coeff is given twice; give all of its values once"),
        ("--vary retain_freq 1 2.5", "--vary retain_freq: '2.5' is no value of that flag; give one as it is typed behind"),
        ("--vary base_betas .9 .8", "--vary base_betas: '.9' is no value of that flag; .* commas between several parts"),
        ("--vary mask [", "--vary mask: '.' is no value of that flag"),
        ("--vary forget_coeff 1 0", "--vary forget_coeff 0: --forget-coeff 0 is out of range; give a number above 0"),
        ("--vary optim adam", "--vary optim adam: --optim 'adam' is unknown; choose from dual-adamw"),
        ("--vary base_betas .9,.95", "--vary base_betas 0.9,0.95: --base-betas 0.9 0.95 has no effect here; it needs"),
    ],
)
def test_what_cannot_vary_is_one_line(line, message):
    with pytest.raises(InputError, match=message) as error:
        runs(line)
    assert "\n" not in str(error.value)


def test_what_does_not_vary_is_every_flag_of_places_and_of_speed():
    """A default behind every flag: it is read, or refused as no flag that changes what a run computes."""
    for name, flag in flags(SweepArgs).items():
        if flag.path or flag.changes in ("speed", "nothing"):
            with pytest.raises(InputError, match=r"is no flag that changes|has a list of its own"):
                SweepArgs(output_dir="x", vary=((name, str(default_of(SweepArgs, name))),))
