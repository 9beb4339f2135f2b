"""Published settings by name: compared number by number with what was published."""

import dataclasses
import subprocess
import sys

import pytest

from dualoptim import InputError, SweepArgs, UnlearnArgs, preset
from dualoptim.config.cli import parse
from dualoptim.config.flags import flags
from dualoptim.config.presets import METHODS, SCENARIOS, of_benchmarks, presets, published
from dualoptim.config.product import single_runs
from dualoptim.method.objectives import FORGET
from dualoptim.method.schedule import Plan, steps_per_epoch

# losses, optimizer, rate, forget rate, forget coefficient, batch, accumulation, epochs, steps (0: those of the epochs), mask:
# typed from the published scripts and files. Where the source is a method's, the scenario it runs on stands before it.
PUBLISHED = {
    "tofu-llama2-7b": ("ME-floor+GD", "dual-adamw", 1e-5, 1e-5, 1.0, 5, 4, 5, 0, True),
    "tofu-phi-1.5": ("ME-floor+GD", "dual-adamw", 1e-5, 1e-5, 1.0, 5, 4, 5, 0, True),
    "real-world-llama3-8b": ("ME-floor+GD", "dual-adamw", 5e-6, 1e-5, 0.5, 4, 4, 5, 0, True),
    "tofu-phi-1.5 me-gd": ("ME-floor+GD", "dual-adamw", 1e-5, 1e-5, 1.0, 5, 4, 5, 0, True),
    "tofu-phi-1.5 idk-ap": ("IDK+AP", "dual-adamw", 1e-5, 1e-5, 1.0, 5, 4, 5, 0, True),
    "tofu-phi-1.5 me-gd-plus": ("ME-floor+GD", "dual-adamw-plus", 1e-5, 1e-5, 1.0, 4, 5, 5, 300, True),
    "tofu-phi-1.5 idk-ap-plus": ("IDK+AP", "dual-adamw-plus", 1e-5, 1e-5, 1.0, 4, 5, 5, 300, True),
    "tofu-phi-1.5 npo-gd-plus": ("NPO+GD", "dual-adamw-plus", 1e-5, 1e-5, 1.0, 4, 5, 5, 300, True),
    "tofu-phi-1.5 dpo-gd-plus": ("DPO+GD", "dual-adamw-plus", 1e-5, 1.5e-5, 1.0, 4, 5, 5, 300, True),
    "tofu-llama2-7b me-gd-joint": ("ME-floor+GD", "adamw", 1e-5, None, 0.1, 4, 4, 5, 0, False),
    "tofu-llama2-7b idk-ap-joint": ("IDK+AP", "adamw", 1e-5, None, 1.0, 4, 4, 5, 0, True),
    "tofu-llama2-7b ga-gd": ("GA+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5, 0, True),
    "real-world-llama3-8b npo-gd": ("NPO+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5, 0, True),
    "idk-gd": ("IDK+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5, 0, True),
    "dpo-gd": ("DPO+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5, 0, True),
    "ga-kl": ("GA+KLQ", "adamw", 1e-5, None, 1.0, 4, 4, 5, 0, True),
    "npo-kl": ("NPO+KLQ", "adamw", 1e-5, None, 1.0, 4, 4, 5, 0, True),
    "idk-kl": ("IDK+KLQ", "adamw", 1e-5, None, 1.0, 4, 4, 5, 0, True),
    "dpo-kl": ("DPO+KLQ", "adamw", 1e-5, None, 1.0, 4, 4, 5, 0, True),
    "simnpo-gd": ("SimNPO+GD", "adamw", 1e-5, None, 0.125, 4, 4, 10, 0, True),
    "rmu-embed": ("RMU+EMBED", "adamw", 1e-5, None, 1.0, 4, 4, 10, 0, True),
    "rmu": ("RMUQ+EMBEDQ", "adamw", 5e-5, None, 1.0, 4, 1, 5, 150, True),
    "rmu-adaptive": ("ARMU-once+EMBEDQ", "adamw", 5e-5, None, 1.0, 4, 1, 5, 500, True),
    "rmu-wmdp": ("RMU+EMBED", "adamw", 5e-5, None, 1.0, 1, 16, 5, 80, True),
    "undial": ("UNDIAL+none", "adamw", 1e-4, None, 1.0, 2, 8, 10, 0, True),
    "wga-gd": ("WGA+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5, 0, True),
    "satimp-gd": ("SatImp+GD", "adamw", 1e-5, None, 0.1, 4, 4, 5, 0, True),
    "ce-u": ("CE-U+none", "adamw", 1e-5, None, 1.0, 4, 4, 10, 0, True),
    # a method undoes what one before it says
    "tofu-phi-1.5 rmu-wmdp me-gd-plus me-gd-joint idk-ap": ("IDK+AP", "dual-adamw", 1e-5, 1e-5, 1.0, 4, 4, 5, 0, True),
}

# what a script cannot say: files of one's own, the text of a template, kernels, and the type in which weights are stored
NEVER_STATED = set(
    """benchmark benchmark_rows question_start_tag question_end_tag answer_tag date_string system_prompt attn_implementation
    targets forget_file retain_file question_column answer_column text_column refusal_column alternative_column idk_file
    retain_questions save_dtype""".split()
)

# what benchmarks declare: model, losses, optimizer, rate, batch x accumulation, epochs, longest text, schedule, what trains
BENCHMARKS = {
    "lume-7b": ("olmo-finetuned-semeval25-unlearning", "GA+GD", "adamw-alternate", 1e-5, 1, 7, 500, "published", "last:8"),
    "lume-1b": ("olmo-1B-model-semeval25-unlearning", "GA+GD", "adamw-alternate", 1e-5, 1, 7, 500, "published", "last:8"),
    "muse-news": ("MUSE-News_target", "ME+GD", "dual-adamw", 1e-5, 64, 10, 2048, "constant", None),
    "muse-books": ("MUSE-Books_target", "ME+GD", "dual-adamw", 1e-5, 64, 10, 2048, "constant", None),
    "wmdp-zephyr": ("zephyr-7b-beta", "ME-floor+GD", "dual-adamw", 1e-5, 4, 5, 768, "linear", None),
    "rwku-ga": ("Meta-Llama-3-8B-Instruct", "GA+none", "adamw", 6e-8, 8, 3, 512, "cosine", None),
    "rwku-npo": ("Meta-Llama-3-8B-Instruct", "NPO+none", "adamw", 2e-6, 16, 3, 512, "cosine", None),
    "rwku-dpo": ("Meta-Llama-3-8B-Instruct", "DPO+none", "adamw", 5e-6, 8, 3, 512, "cosine", None),
    "rwku-rt": ("Meta-Llama-3-8B-Instruct", "IDK+none", "adamw", 4e-7, 8, 3, 512, "cosine", None),
}
RWKU = {"rwku-ga": "rwku", "rwku-npo": "rwku", "rwku-dpo": "rwku-pairs", "rwku-rt": "rwku-refusals"}


def test_every_preset_is_compared_with_what_was_published():
    assert {names.split()[-1] for names in PUBLISHED} | set(BENCHMARKS) == set(presets())


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_presets_that_benchmarks_declare(name):
    args = parse(UnlearnArgs, ["--preset", name])
    assert args == preset(name)
    said = args.forget_losses[0], args.optim, args.rates[0], args.batch_size * args.gradient_accumulation_steps
    said = (*said, args.num_epochs, args.max_length, args.lr_schedule, args.trainable)
    assert (args.model.split("/")[1], *said) == BENCHMARKS[name]
    assert args.benchmark == RWKU.get(name, name.removesuffix("-7b").removesuffix("-1b").removesuffix("-zephyr"))
    assert (args.warmup_steps, args.weight_decay) == ((20, 0.0) if name in RWKU else (None, 0.01))
    joint = parse(UnlearnArgs, ["--preset", name, "npo-gd"])
    assert (joint.benchmark, joint.model, joint.forget_losses) == (args.benchmark, args.model, ("NPO+GD",))


@pytest.mark.parametrize("names", list(PUBLISHED))
def test_presets_hold_the_published_numbers_and_flags_override_them(names):
    by_flag = parse(UnlearnArgs, ["--preset", *names.split()])
    assert by_flag == preset(*names.split())
    losses, optim, rate, forget_rate, coefficient, batch, accumulation, epochs, steps, mask = PUBLISHED[names]
    assert (by_flag.forget_losses, by_flag.optim) == ((losses,), optim)
    assert (by_flag.rates, by_flag.forget_lr) == ((rate,), forget_rate)
    kept, clipped = (1200.0, 0.0) if names in ("rmu", "rmu-adaptive") else (1.0, 1.0)
    assert (by_flag.forget_coeff, by_flag.regularization_coeff) == (coefficient, kept)
    assert (by_flag.batch_size, by_flag.gradient_accumulation_steps, by_flag.num_epochs) == (batch, accumulation, epochs)
    assert (by_flag.weight_decay, by_flag.seed, by_flag.retain_freq, by_flag.forget_freq) == (0.01, 1001, 5, 1)
    assert (by_flag.max_steps, by_flag.mask, by_flag.max_grad_norm) == (steps, mask, clipped)
    betas = (0.9, 0.95) if optim == "dual-adamw-plus" else (0.9, 0.999)
    assert (by_flag.adam_betas, by_flag.base_betas) == (betas, betas if optim == "dual-adamw-plus" else None)
    if "rmu-wmdp" not in names and kept == 1:
        assert (by_flag.lr_schedule, by_flag.warmup_epochs) == ("linear", 1)  # transformers', whose first step moves nothing
    flags = [f"--preset={names}"] if " " not in names else ["--preset", *names.split()]
    changed = parse(UnlearnArgs, [*flags, "--num-epochs", "2", "--learning-rates", "7e-6"])
    assert changed == dataclasses.replace(by_flag, num_epochs=2, learning_rates=(7e-6,))
    assert preset(*names.split(), num_epochs=2).num_epochs == 2


def test_a_preset_that_is_like_another_says_what_differs():
    seven, one = preset("lume-7b"), preset("lume-1b")
    assert (seven.gradient_checkpointing, one.gradient_checkpointing) == (True, False)
    assert seven == dataclasses.replace(one, model=seven.model, gradient_checkpointing=True)
    assert of_benchmarks()["lume-1b"].source == of_benchmarks()["lume-7b"].source


def test_benchmarks_are_read_for_presets_when_one_is_named_and_once():
    code = "import dualoptim.config.presets as p; assert not p.of_benchmarks.cache_info().misses; p.presets(); p.presets(); "
    subprocess.run([sys.executable, "-c", f"{code}assert p.of_benchmarks.cache_info().misses == 1"], check=True)


def test_constants_of_presets():
    assert preset("simnpo-gd").beta == 4.5  # everything else is the objective's own default
    assert {preset(name).beta for name in ("idk-ap", "npo-gd", "dpo-kl", "npo-gd-plus", "idk-ap-joint")} == {0.1}
    assert preset("idk-ap", forget_losses="GA+GD").beta is None  # a constant belongs to the pair that the preset names
    assert preset("idk-ap", forget_losses="NPO+GD", beta=0.2).beta == 0.2
    wmdp = preset("rmu-wmdp")
    assert (wmdp.lr_schedule, wmdp.warmup_epochs, wmdp.max_steps, wmdp.max_length) == ("constant", 0, 80, 512)
    assert (wmdp.layer, wmdp.trainable) == (7, "layers.(5|6|7).mlp.down_proj")
    own = preset("wmdp-zephyr", "rmu")
    assert (own.beta, own.layer, own.trainable, own.max_steps) == (6.5, 7, "layers.(5|6|7).mlp.down_proj", 150)
    assert (own.lr_schedule, own.warmup_epochs, own.max_grad_norm, own.max_length) == ("constant", 0, 0, 768)
    assert own.lm_eval_tasks == ("wmdp_bio", "wmdp_cyber", "mmlu")
    assert (preset("rmu-adaptive").beta, preset("rmu-adaptive").max_steps) == (5.0, 500)
    for name in ("rmu-embed", "rmu-wmdp", "undial", "wga-gd", "satimp-gd"):
        args, objective = preset(name), FORGET[preset(name).forget_losses[0].split("+")[0]]
        assert args.beta == objective.constants["beta"]
        assert args.gamma is None or args.gamma == objective.constants["gamma"]


@pytest.mark.parametrize("name", list(presets()))
def test_no_default_shows_through_a_released_run(name):
    """Defaults change, and what a script says does not: all that changes numbers is stated, of a method by its scenario."""
    of_a_benchmark = name in of_benchmarks()
    scenario = [] if name in SCENARIOS or name in BENCHMARKS else ["wmdp-zephyr" if of_a_benchmark else "tofu-phi-1.5"]
    stated = set(published([*scenario, name]))
    # what the benchmark declares, and TOFU's splits; people that a model knows are the user's
    never = {"data", "split", "template"} if of_a_benchmark else {"data"} if name == "real-world-llama3-8b" else set()
    assert {name for name, flag in flags(UnlearnArgs).items() if flag.changes == "numbers"} - stated <= NEVER_STATED | never
    assert {"max_steps", *([] if of_a_benchmark else ["eval_rows"])} <= stated
    assert stated <= set(flags(UnlearnArgs))


@pytest.mark.parametrize("name", list(presets()))
def test_the_rate_of_forget_steps_is_a_presets_own_and_not_that_of_a_default(name):
    scenario = [] if name in SCENARIOS or name in of_benchmarks() else ["tofu-phi-1.5"]
    args = preset(*scenario, name)
    (one,) = single_runs(args)
    assert one.forget_lr == (None if args.optim == "adamw" else args.forget_lr or one.learning_rates[0])
    if args.optim == "adamw":  # the rate of what was published, over two states
        (one,) = single_runs(preset(name, optim="dual-adamw"))
        assert one.forget_lr == one.learning_rates[0]


@pytest.mark.parametrize("name", list(presets()))
def test_a_batch_is_stated_as_a_whole_and_by_every_benchmark(name):
    stated = {"batch_size", "gradient_accumulation_steps"} & set(presets()[name].settings)
    assert len(stated) == 2 or (not stated and name not in of_benchmarks())


@pytest.mark.parametrize(("split", "rows", "forget"), [("forget01", 40, 1), ("forget05", 200, 5), ("forget10", 400, 10)])
def test_steps_are_those_of_the_released_runs(split, rows, forget):
    """Two processes; DualOptim has 5 epochs of a forget step and five retain steps per 40 rows, DualOptim+ 300 steps."""

    def plan(*names):
        args = preset(*names, split=split)
        cycle, batch = (("forget", args.forget_freq), ("retain", args.retain_freq)), args.batch_size * 2
        per_epoch = steps_per_epoch(rows, batch * args.gradient_accumulation_steps, cycle)
        more = args.warmup_epochs, args.max_steps, args.warmup_steps, args.lr_schedule
        return Plan(cycle, per_epoch, args.num_epochs, *more)

    dual, plus = plan("tofu-phi-1.5", "me-gd"), plan("tofu-phi-1.5", "me-gd-plus")
    assert (dual.last_step, dual.total_steps, dual.steps_of("forget")) == (30 * forget, 30 * forget, 5 * forget)
    assert (plus.last_step, plus.total_steps, plus.steps_of("forget")) == (300, 300, 50)
    assert dual.warmup_steps == plus.warmup_steps == 6 * forget
    if forget == 1:
        assert [dual.lr_factor(step) for step in range(0, 30, 6)] == [0, 1, 0.75, 0.5, 0.25]


def test_an_adapter_of_a_preset_is_the_published_one():
    for args in (preset("me-gd", use_lora=True), parse(UnlearnArgs, ["--preset", "me-gd", "--use-lora"])):
        assert (args.lora_rank, args.lora_alpha, args.lora_dropout) == (8, 32, 0.05)
    assert preset("me-gd").lora_dropout == 0
    assert UnlearnArgs(use_lora=True).lora_dropout == 0
    assert parse(UnlearnArgs, ["--use-lora"]).lora_dropout == 0
    assert parse(UnlearnArgs, ["--preset", "me-gd", "--use-lora", "--lora-dropout", "0"]).lora_dropout == 0
    with pytest.raises(InputError, match=r"--lora-dropout 0.1 has no effect without an adapter"):
        parse(UnlearnArgs, ["--preset", "me-gd", "--lora-dropout", "0.1"])


def test_a_strength_is_a_factor_of_the_rate_that_a_preset_or_a_file_gives_forget_steps(tmp_path):
    assert parse(UnlearnArgs, ["--preset", "dpo-gd-plus", "--forget-strength", "2"]).forget_lr == 3e-5
    assert preset("me-gd", forget_strength=0.5).forget_lr == 5e-6
    (tmp_path / "c.yaml").write_text("forget_lr: 4e-5\n")
    assert parse(UnlearnArgs, ["--config", str(tmp_path / "c.yaml"), "--forget-strength", "2"]).forget_lr == 8e-5
    with pytest.raises(InputError, match=r"--forget-strength 2.0 and --forget-lr 1e-05 both set the rate of forget steps"):
        parse(UnlearnArgs, ["--preset", "me-gd", "--forget-strength", "2", "--forget-lr", "1e-5"])


def test_a_sweep_over_forget_rates_takes_the_place_of_a_presets():
    args = parse(SweepArgs, ["--preset", "me-gd", "--forget-lrs", "1e-5", "2e-5"])
    assert (args.forget_lr, args.forget_lrs, args.learning_rates) == (None, (1e-5, 2e-5), (1e-5,))


def test_without_an_evaluation_a_preset_says_nothing_of_one():
    assert preset("tofu-phi-1.5").eval_rows == 300
    assert parse(UnlearnArgs, ["--preset", "tofu-phi-1.5", "--no-eval"]).eval_rows == 0


@pytest.mark.parametrize(
    ("names", "processes", "flags", "note"),
    [
        ("tofu-phi-1.5 me-gd", 2, "", ""),
        ("tofu-phi-1.5 npo-gd", 2, "", ""),
        ("tofu-phi-1.5 me-gd", 1, "--gradient-accumulation-steps 8", ""),
        (
            "tofu-phi-1.5 me-gd",
            1,
            "",
            "a step takes 20 rows here (5 x 4 on 1 process), and 40 in the published runs (5 x 4 on 2);",
        ),
        (
            "me-gd",
            2,
            "",
            "a step takes 8 rows here (4 x 1 on 2 processes), and 40 in the published runs (5 x 4 on 2); give --batch-size 5",
        ),
        ("idk-ap", 1, "", "give --batch-size 5 --gradient-accumulation-steps 8\n"),
        (
            "me-gd-plus",
            3,
            "",
            "a step takes 60 rows here (4 x 5 on 3 processes), and 40 in the published runs (4 x 5 on 2); start 2",
        ),
        ("muse-news", 1, "", ""),
        ("muse-news me-gd", 1, "", ""),
    ],
)
def test_another_number_of_rows_a_step_is_told(names, processes, flags, note, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    parse(UnlearnArgs, ["--preset", *names.split(), *flags.split()])
    said = capsys.readouterr().out
    assert (note in said) if note else said == ""
    monkeypatch.setenv("RANK", "1")
    parse(UnlearnArgs, ["--preset", *names.split(), *flags.split()])
    assert capsys.readouterr().out == ""


def test_preset_without_a_name_lists_all_with_a_line_each(capsys):
    with pytest.raises(SystemExit) as end:
        parse(UnlearnArgs, ["--preset"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    first, second, third = (number for number, line in enumerate(lines) if not line.startswith(" "))
    kinds = {"scenarios": lines[first:second], "methods": lines[second:third], "of benchmarks": lines[third:]}
    for (title, (head, *own)), known in zip(kinds.items(), (SCENARIOS, METHODS, of_benchmarks()), strict=True):
        assert head.startswith(title)
        assert [line.split()[0] for line in own] == list(known)
        assert all(preset.about in line and preset.source in line for preset, line in zip(known.values(), own, strict=True))
