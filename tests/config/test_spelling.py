"""The published scripts' way of speaking, word for word."""

import shlex

import pytest

from dualoptim import EvalArgs, FinetuneArgs, InputError, SweepArgs, UnlearnArgs
from dualoptim.config.cli import parse
from dualoptim.config.flags import default_of, flag_name, flags
from dualoptim.config.spelling import elsewhere, fields_of, names_of, spelled, typed
from dualoptim.report import ReportArgs

KINDS = [UnlearnArgs, SweepArgs, FinetuneArgs, EvalArgs]


@pytest.mark.parametrize(
    ("words", "mask"),
    [
        *((words, True) for words in ("--mask", "--mask true", "--mask=true", "--mask True", "--mask=TRUE", "--mask 1")),
        *((words, True) for words in ("--mask yes", "--mask on", "--no-mask false", "--no_mask=0")),
        *((words, False) for words in ("--no-mask", "--no_mask", "--mask false", "--mask=False", "--mask 0", "--no-mask true")),
        *((words, False) for words in ("--mask=off", "--mask no", "--mask true --mask false")),
    ],
)
def test_a_switch_takes_a_word(words, mask):
    given = parse(UnlearnArgs, [*words.split(), "--num-epochs", "2"])
    assert given == UnlearnArgs(mask=mask, num_epochs=2)


@pytest.mark.parametrize(
    "words", ["--use_LoRA", "--use_LoRA true", "--use-LoRA=true", "--use-lora=TRUE", "--use_lora 1", "--no-use-LoRA false"]
)
def test_an_adapter_is_asked_for_as_in_the_scripts(words):
    assert parse(UnlearnArgs, words.split()).use_lora
    assert parse(FinetuneArgs, words.split()).use_lora


TABLE = "forget_losses=IDK+AP task_list=2 learning_rates=3e-5 forget_coeff=0.1 regularization_coeff=2.0 num_epochs=3".split()
TABLE += ["split=forget01", "mask=false", "use_LoRA=true"]
THEIRS = UnlearnArgs(
    forget_losses="IDK+AP", task_list=2, learning_rates=3e-5, forget_coeff=0.1, regularization_coeff=2.0, num_epochs=3,
    split="forget01", mask=False, use_lora=True,
)  # fmt: skip


@pytest.mark.parametrize("change", [lambda name: name, lambda name: name.replace("_", "-")])
@pytest.mark.parametrize("between", ["=", " "])
def test_every_name_of_the_published_table_is_taken(change, between):
    pairs = [one.split("=") for one in TABLE]
    words = " ".join(f"--{change(name)}{between}{value}" for name, value in pairs)
    assert parse(UnlearnArgs, words.split()) == THEIRS


def test_settings_without_dashes_are_told_what_to_type():
    with pytest.raises(InputError, match="a setting is a flag here, with dashes before its name") as error:
        parse(UnlearnArgs, ["--model", "m", *TABLE, "alternate=true", "save_checkpoint=false"])
    line, _, unknown = str(error.value).partition("; type ")[2].partition("; ")
    assert parse(UnlearnArgs, shlex.split(line)) == THEIRS
    assert unknown == "alternate: see --optim in --help; save_checkpoint: no flag here"
    assert "(--preset gives the other settings of a published run; alone it lists them)" in str(error.value)
    with pytest.raises(InputError, match=r"type --task-list 1 2 3$"):
        parse(UnlearnArgs, ["task_list=(1 2 3)"])
    with pytest.raises(InputError, match=r"its name; type --no-mask$"):
        parse(UnlearnArgs, ["--preset", "me-gd", "mask=false"])
    assert parse(UnlearnArgs, ["--question-start-tag", "split=1"]).question_start_tag == "split=1"  # the value of a flag


THEIRS_TOO = {"data": "d", "output_dir": "r", "eval_rows": 300, "model": "m"}

FILES = "--model m --forget-file a.jsonl split=1.jsonl --retain_file lr=1.csv mask=2.csv --holdout-file b.csv split=3.csv"


def test_a_value_of_a_list_may_look_like_a_setting(tmp_path):
    args = parse(UnlearnArgs, FILES.split())
    assert (args.forget_file, args.retain_file) == (("a.jsonl", "split=1.jsonl"), ("lr=1.csv", "mask=2.csv"))
    assert args.holdout_file == ("b.csv", "split=3.csv")
    people = parse(UnlearnArgs, ["--model", "m", "--benchmark", "rwku", "--targets", "Ann", "split=1"])
    assert people.targets == ("Ann", "split=1")
    vary = ["--vary", "trainable", "last:1", "mask=1", "--vary", "forget_coeff", "1", "2"]
    assert parse(SweepArgs, vary).vary == (("trainable", "last:1", "mask=1"), ("forget_coeff", "1", "2"))
    (tmp_path / "lr=1.yaml").write_text("num_epochs: 2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert parse(UnlearnArgs, ["--config", "lr=1.yaml"]).num_epochs == 2
    for words in ("--forget-file a b --mask lr=1", "--forget-file=a lr=1", "--model m lr=1", "--config a lr=1", "--mask lr=1"):
        with pytest.raises(InputError, match=r"^lr=1: a setting is a flag here, .*; type --learning-rates 1$"):
            spelled(UnlearnArgs, words.split())


@pytest.mark.parametrize(
    ("kind", "words", "given"),
    [
        (UnlearnArgs, "--learning-rate 2e-5 --task 2 3", {"learning_rates": (2e-5,), "task_list": (2, 3)}),
        (
            UnlearnArgs,
            "--lr 2e-5 --tasks 2 --forget_loss GA+GD",
            {"learning_rates": (2e-5,), "task_list": (2,), "forget_losses": "GA+GD"},
        ),
        (SweepArgs, "--learning-rate 2e-5 1e-5 --task_id 2", {"learning_rates": (2e-5, 1e-5), "task_list": (2,)}),
        (FinetuneArgs, "--learning-rates 2e-5 --task-list 1 2", {"learning_rate": 2e-5, "tasks": (1, 2)}),
        (FinetuneArgs, "--lr 2e-5 --task 1", {"learning_rate": 2e-5, "tasks": (1,)}),
        (EvalArgs, "--task-list 3 --model_path m", {"task": 3, "model": "m"}),
        (EvalArgs, "--tasks 3", {"task": 3}),
        *((kind, "--data_path d --save_root r --ds_size 300 --model_path m", THEIRS_TOO) for kind in (UnlearnArgs, EvalArgs)),
    ],
)
def test_a_thing_goes_by_one_name_in_every_command(kind, words, given):
    assert parse(kind, words.split()) == kind(**given)


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--task_list", "1,2"], {"task_list": (1, 2)}),
        (["--task-list=1,2,3"], {"task_list": (1, 2, 3)}),
        (["--task_list", "1 2", "3"], {"task_list": (1, 2, 3)}),
        (["--lr=1e-5,2.5e-5", "--mask", "false"], {"learning_rates": (1e-5, 2.5e-5), "mask": False}),
        (["--adam_betas", "0.9,0.95"], {"adam_betas": (0.9, 0.95)}),
        (["--model", "1,2", "--task", "3"], {"model": "1,2", "task_list": (3,)}),  # a text
    ],
)
def test_numbers_may_stand_with_commas_as_the_scripts_export_them(words, given):
    assert parse(UnlearnArgs, words) == UnlearnArgs(**given)


@pytest.mark.parametrize("words", [["--mask", "maybe"], ["--mask=maybe"]])
def test_a_switch_is_true_or_false(words):
    with pytest.raises(InputError, match=f"^{' '.join(words)} is neither true nor false; give --mask or --no-mask$"):
        parse(UnlearnArgs, words)


@pytest.mark.parametrize("word", ["--optim_cfg", "--optim-cfg", "--optim_cfg=dual_adam"])
def test_a_published_name_whose_values_differ_here_is_told_the_flag(word):
    with pytest.raises(InputError, match=r"the flag here is --optim, whose values --help lists$"):
        parse(UnlearnArgs, ["--model", "m", word, "dual_adam"])
    assert elsewhere(UnlearnArgs, "save_steps") == "--save-model-every"
    assert elsewhere(EvalArgs, "save_steps") == elsewhere(UnlearnArgs, "split") == ""


def test_a_file_may_have_the_same_names(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 2e-5\nforget_loss: IDK+AP\nuse_LoRA: true\ntask_id: 2\n")
    expected = UnlearnArgs(learning_rates=2e-5, forget_losses="IDK+AP", use_lora=True, task_list=2)
    assert parse(UnlearnArgs, ["--config", str(path)]) == expected
    path.write_text("lr: 2e-5\nlearning_rates: 1e-5\n")
    with pytest.raises(InputError, match="'learning_rates' and another name of --learning-rates both stand there; keep one"):
        parse(UnlearnArgs, ["--config", str(path)])
    assert fields_of(UnlearnArgs, {"lr": 1, 3: 4}, "x") == {"learning_rates": 1, 3: 4}


@pytest.mark.parametrize("kind", KINDS)
def test_no_name_is_that_of_two_flags(kind):
    names = [name for field, flag in flags(kind).items() for name in (field, *flag.aliases)]
    assert len(names) == len(set(names)) == len(names_of(kind))
    switches = [name for name, field in names_of(kind).items() if isinstance(default_of(kind, field), bool)]
    assert not {f"no_{name}" for name in switches} & set(names)
    assert typed(kind, ["--no-packing", "--model=x", "--", "y"]) == {"packing", "model"}
    assert spelled(kind, ["--no_packing", "false"]) == [flag_name("packing")]


def test_a_word_after_a_switch_may_be_a_run():
    assert spelled(ReportArgs, ["--texts", "runs/a"]) == ["--texts", "runs/a"]
    assert spelled(ReportArgs, ["--no-texts", "1", "2"]) == ["--no-texts", "1", "2"]
    assert spelled(ReportArgs, ["--texts", "false", "runs/a"]) == ["--no-texts", "runs/a"]
    assert spelled(ReportArgs, ["--texts=0", "runs/a"]) == ["--no-texts", "runs/a"]


@pytest.mark.parametrize(
    ("word", "typed"),
    [("-forget_losses", "--forget-losses"), ("-lr=1e-5", "--learning-rates=1e-5"), ("-output-dir", "--output-dir")],
)
def test_a_flag_of_one_dash_is_told_what_to_type(word, typed):
    with pytest.raises(InputError, match=f"{word.partition('=')[0]}: a flag begins with two dashes; type {typed}$"):
        parse(UnlearnArgs, ["--model", "m", word, "ME+GD"])
    assert spelled(UnlearnArgs, ["--max-steps", "-1", "-h"]) == ["--max-steps", "-1", "-h"]
