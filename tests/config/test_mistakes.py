"""What a user can get wrong on the command line alone: one line, exit code 2, before anything is read or written."""

import pytest

from dualoptim import EvalArgs, FinetuneArgs, InputError, SweepArgs, UnlearnArgs
from dualoptim.config.cli import main
from dualoptim.report import ReportArgs

# flags, and a part of the line that a user must see; {d} is a folder with a bad.yaml
UNLEARN = [
    ("--log-with paper", "--log-with paper is unknown; choose from wandb, tensorboard"),
    ("--log-with aim", "--log-with aim needs its package; pip install aim"),
    ("--num-epochs 0", "--num-epochs 0 is out of range; give 1 or more"),
    ("--batch-size -2", "--batch-size -2 is out of range; give 1 or more"),
    ("--gradient-accumulation-steps 0", "--gradient-accumulation-steps 0 is out of range"),
    ("--learning-rates 0", "--learning-rates 0 is out of range; give a number above 0"),
    ("--learning-rates nan", "--learning-rates nan is out of range"),
    ("--learning-rates 1e-5 1e-5", "--learning-rates names 1e-05 twice"),
    ("--learning-rates 1e-4 1.0000001e-4", "--learning-rates names 0.0001 twice"),
    ("--keep-best 0.1", "--keep-best 0.1 chooses among models that are measured on the way; give --eval-every"),
    ("--eval-every 2 --no-eval", "--eval-every 2 has no effect with --no-eval"),
    ("--eval-every 2 --mia-gradnorm", "--mia-gradnorm takes backward passes of its own"),
    ("--trainable last:0", "--trainable last:0 is no number of layers; give last:2, for example"),
    ("--trainable last:two", "--trainable last:two is no number of layers"),
    ("--trainable layers.(5", "--trainable layers.(5 is no regular expression (missing ), unterminated subpattern"),
    ("--trainable last:1 --use-lora", "of which none trains with --use-lora; name the modules that get an adapter"),
    ("--lr-schedule step", "published"),
    ("--warmup-steps -1", "--warmup-steps -1 is out of range; give 0 or more"),
    (
        "--warmup-steps 3 --warmup-epochs 2",
        "--warmup-steps 3 takes the place of --warmup-epochs 2.0; drop it, or give --warmup-epochs 1",
    ),
    ("--forget-lr inf", "--forget-lr inf is out of range"),
    ("--forget-strength 0", "--forget-strength 0 is out of range; give a number above 0"),
    ("--forget-strength 2 --forget-lr 1e-5", "--forget-strength 2.0 and --forget-lr 1e-05 both set the rate of forget steps"),
    ("--optim adamw --forget-strength 2", "--forget-strength 2 has no effect with --optim adamw"),
    ("--mask=maybe", "--mask=maybe is neither true nor false; give --mask or --no-mask"),
    ("--use_LoRA=", "--use_LoRA= is neither true nor false; give --use-lora or --no-use-lora"),
    ("forget_losses=ME+GD lr=1e-5 mask=false", "type --forget-losses ME+GD --learning-rates 1e-5 --no-mask"),
    ("--optim adamw --forget-lr 1e-5", "--forget-lr 1e-05 has no effect with --optim adamw"),
    ("--optim adamw --forget-max-grad-norm 1", "give --forget-max-grad-norm None"),
    ("--seed 18446744073709551616", "--seed 18446744073709551616 is out of range"),
    ("--forget-losses", "--forget-losses is empty"),
    ("--forget-losses ME", "--forget-losses 'ME' is not FORGET+RETAIN"),
    ("--forget-losses ME+XY", "retain one of GD, AP"),
    ("--forget-losses me+gd", "forget is one of GA, ME, ME-floor, IDK"),
    ("--task-list 1 1", "--task-list names 1 twice"),
    ("--task-list -1", "--task-list -1 is out of range"),
    ("--split forget02", "--split 'forget02' is unknown; choose from forget01, forget05, forget10, forget"),
    ("--beta 0", "--beta 0 is out of range; give a number above 0"),
    ("--adam-betas 0.9 1.0", "--adam-betas 1 is out of range"),
    ("--max-length 1", "--max-length 1 is out of range"),
    ("--forget-freq 0", "--forget-freq 0 is out of range"),
    ("--template chat --answer-tag A:", "--template chat cannot take tags"),
    ("--preset llama", "--preset 'llama' is unknown; --preset without a name lists them all"),
    ("--preset tofu-phi-1.5 llama", "--preset 'llama' is unknown"),
    ("--preset me_gd", "--preset 'me_gd' is unknown (did you mean me-gd?); --preset without a name lists them all"),
    ("--optim adamw --forget-weight-decay 0", "--forget-weight-decay 0.0 has no effect here; it needs --optim dual-adamw"),
    ("--optim adamw-alternate --forget-optimizer sgd", "--forget-optimizer sgd has no effect here"),
    ("--decouple m --retain-optimizer sgd", "it needs --optim dual-adamw with --decouple both"),
    ("--optim adamw --decouple m", "--decouple m has no effect here; it needs --optim dual-adamw"),
    ("--max-update 3", "--max-update 3.0 has no effect here; it needs --optim dual-adamw-plus"),
    ("--base-betas 0.9 0.99", "--base-betas 0.9 0.99 has no effect here; it needs --optim dual-adamw-plus"),
    ("--quantize-delta", "--quantize-delta True has no effect here; it needs --optim dual-adamw-plus"),
    ("--decouple v --optim-bits 8", "--decouple v has no 8-bit form"),
    ("--optim-bits 8 --forget-optimizer sgd --retain-optimizer sgd", "--optim-bits 8 has no effect with --forget-optimizer"),
    ("--beta 0.1", "--beta 0.1 has no effect with ME+GD; drop it"),
    ("--forget-losses NPO+GD --gamma 1", "--gamma 1 has no effect with NPO+GD"),
    ("--model m --forget-file f.txt --alternative-column x", "--alternative-column x has no effect with ME+GD; drop it"),
    (
        "--retain-questions q.txt",
        "--retain-questions q.txt has no effect without --forget-file without --retain-file and a pair",
    ),
    (
        "--model m --forget-file f.csv --forget-losses NPO+none --retain-questions q.txt",
        "--retain-questions q.txt has no effect without --forget-file without --retain-file and a pair that keeps, such as ME",
    ),
    ("--layer 1", "--layer 1 has no effect with ME+GD"),
    ("--fix-ref-model", "--fix-ref-model has no effect with ME+GD"),
    ("--preset real-world-llama3-8b --optim adamw", "--forget-lr 1e-05 has no effect with --optim adamw"),
    ("--preset tofu-phi-1.5 --config {d}/bad.yaml", "give one of them"),
    ("--config {d}/bad.yaml", "unknown key 'lerning_rate'"),
    ("--config {d}/none.yaml", "No such file or directory"),
    ("--data {d}/good", "give --model"),
    ("--resume", "--resume needs the folder of the run to go on with; give --output-dir"),
    ("--resume --output-dir {d}/used --overwrite", "give one of them"),
    ("--save-every -1", "--save-every -1 is out of range"),
    ("--keep-checkpoints 0", "--keep-checkpoints 0 is out of range"),
    ("--push-to-hub me/forgot --dry-run", "--push-to-hub me/forgot: --dry-run makes no model to upload; give one of them"),
    ("--push-to-hub a/b/c", "--push-to-hub 'a/b/c' is no repository's name; give one such as me/model"),
    ("--push-to-hub me/for+got", "--push-to-hub 'me/for+got' is no repository's name"),
    ("--hub-public", "--hub-public makes the repository of --push-to-hub public; give that as well"),
    # parsed by tyro, which draws its own box
    ("--num-epochs many", "--num-epochs"),
    ("--optim sgd", "dual-adamw"),
    ("--lerning-rates 1", "--lerning-rates"),
]
EVAL = [
    ("--model org/name --data demo --seed 1", "--seed"),
    ("--model org/name --data demo --eval-batch-size 0", "--eval-batch-size 0 is out of range"),
    ("--model org/name --data demo --retain-logs a --retain-model b", "say the same; give one of them"),
    ("--model org/name --data demo --relearn -1", "--relearn -1 is out of range"),
    (
        "--model org/name --data demo --relearn 2 --relearn-share 0",
        "--relearn-share 0 is out of range; give a number above 0, up to 1",
    ),
    (
        "--model org/name --data demo --relearn 2 --relearn-rows retain --relearn-share 0.5",
        "--relearn-share 0.5 is of the forget set",
    ),
    ("--model org/name --data demo --relearn-lr 1e-4", "--relearn-lr 0.0001 has no effect without --relearn"),
    ("--model org/name --data demo --sample-temperature 2", "--sample-temperature 2.0 has no effect without --sample"),
    ("--model org/name --data demo --quantize 3", "invalid choice '3' for argument '--quantize'. Expected one of"),
    ("--model org/name --data demo --relearn 0 --relearn-lora 8", "--relearn-lora 8 has no effect without --relearn; give"),
    ("--model org/name --data demo --relearn 2 --relearn-lrs", "--relearn-lr is empty; give a value, or leave it out"),
    ("--model org/name --data demo --relearn 2 4 2", "--relearn names 2 twice"),
    ("--model org/name --data demo --relearn 2 --relearn-rows half half", "--relearn-rows names half twice"),
    ("--model org/name --data demo --relearn 2 --relearn-lora -1", "--relearn-lora -1 is out of range; give 0 or more, below"),
    ("--model org/name --data demo --few-shot -1", "--few-shot -1 is out of range; give 0 or more"),
    ("--model org/name --data demo --quantize 4 4", "--quantize names 4 twice"),
]
FINETUNE = [
    ("--model org/name --data demo --splits", "--splits is empty"),
    ("--model org/name --data demo --split forget05", "--split"),
    ("--model org/name --data demo --target-loss -1", "--target-loss -1 is out of range"),
]
REPORT = [
    ("", "no RUN is given; name the output folder of a run"),
    ("{d}/used --examples -1", "--examples -1 is out of range; give 0 or more"),
    ("{d}/used --config x.yaml", "--config"),
]
SWEEP = [
    (
        "--optim dual-adamw adamw --output-dir x",
        "--optim takes one value; to try several, type --vary optim dual-adamw adamw",
    ),
    ("--forget_lr 1e-5 2e-5 --output-dir x", "--forget_lr takes one value; to try several, type --forget-lrs 1e-5 2e-5"),
    ("--output-dir x y", "Unrecognized options: y"),
    ("--output-dir x --seeds 1 1", "--seeds names 1 twice"),
    ("--output-dir x --forget-lrs 1e-5 --forget-strength 2", "--forget-strength 2.0 and --forget-lrs both set the rate"),
    ("--output-dir x --resume", "--resume is for one run; a sweep skips what is finished by itself"),
    ("--output-dir x --push-to-hub me/forgot", "--push-to-hub me/forgot is for one run"),
    ("--output-dir x --forget-losses ME", "--forget-losses 'ME' is not FORGET+RETAIN"),  # the rules of a single run hold too
    ("--output-dir x --num-epochs 0", "--num-epochs 0 is out of range"),
]
CASES = [
    *((UnlearnArgs, *case) for case in UNLEARN),
    *((EvalArgs, *case) for case in EVAL),
    *((FinetuneArgs, *case) for case in FINETUNE),
    *((SweepArgs, *case) for case in SWEEP),
    *((ReportArgs, *case) for case in REPORT),
]


@pytest.mark.parametrize(("kind", "flags", "message"), CASES, ids=[f"{kind.__name__} {flags}" for kind, flags, _ in CASES])
def test_one_line_and_exit_code_two(kind, flags, message, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.yaml").write_text("lerning_rate: 1e-5\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(kind, lambda _: pytest.fail("the action was started"), flags.format(d=tmp_path).split())
    stderr = capsys.readouterr().err
    assert end.value.code == 2, stderr
    assert " ".join(message.split()) in " ".join(stderr.replace("│", " ").split()), stderr
    assert "Traceback" not in stderr
    if "For full helptext" not in stderr:  # tyro draws its own box, of several lines
        assert [line for line in stderr.splitlines() if line.startswith("error: ")] == [stderr.strip().splitlines()[-1]]
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"], "something was written"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": True}, "--load-in-4bit freezes the weights, so that only an adapter can learn; add --use-lora"),
        ({"quantize_embeddings": True}, "--quantize-embeddings has no effect with --optim-bits 32; give --optim-bits 8"),
        ({"lora_rank": 0}, "--lora-rank 0 is out of range; give 1 or more"),
        ({"lora_rank": 64}, "--lora-rank 64 has no effect without an adapter; add --use-lora, or drop it"),
        ({"lora_alpha": 8}, "--lora-alpha 8 has no effect without an adapter"),
        ({"lora_dropout": 0.1}, "--lora-dropout 0.1 has no effect without an adapter"),
        ({"lora_target_modules": ("q_proj", "k_proj")}, "--lora-target-modules q_proj k_proj has no effect without an adapter"),
        ({"lora_alpha": 0}, "--lora-alpha 0 is out of range"),
        ({"lora_dropout": 1.0}, "--lora-dropout 1 is out of range"),
        ({"lora_target_modules": ()}, "--lora-target-modules is empty"),
        (
            {"forget_losses": ("ME+GD", "CBQ-orth+none"), "batch_size": 1},
            "--batch-size 1: CBQ-orth+none compares the rows of a micro-batch; give --batch-size 2 or more",
        ),
        ({"forget_losses": ("CBQ+none",), "beta": 2.0}, "--beta 2 has no effect with CBQ+none"),
        (
            {"project_forget": "global", "forget_losses": ("ME+none", "GA+none")},
            "--project-forget global has no effect with ME+none GA+none, which has no retain steps; drop it",
        ),
        (
            {"project_forget": "tensor", "forget_losses": ("NPO+none",)},
            "--project-forget tensor has no effect with NPO+none, which has no retain steps; drop it",
        ),
        (
            {"retain_optimizer": "sgd", "forget_losses": ("LLMU+none",)},
            "--retain-optimizer sgd has no effect with LLMU+none, which has no retain steps; drop it",
        ),
        ({"sam_rho": -0.1}, "--sam-rho -0.1 is out of range"),
        ({"sam_rho": 0.1, "optim": "adamw"}, "--sam-rho 0.1 has no effect here; it needs --optim dual-adamw"),
        ({"project_forget": "all"}, "--project-forget"),
    ],
)
def test_flags_that_make_no_sense(changes, message):
    with pytest.raises(InputError) as error:
        UnlearnArgs(**changes)
    assert message in str(error.value)
