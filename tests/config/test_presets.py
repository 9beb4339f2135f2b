"""Published settings by name: compared number by number with what was published."""

import dataclasses

import pytest

from dualoptim import UnlearnArgs, preset
from dualoptim.config.cli import parse
from dualoptim.config.presets import PRESETS, SCENARIOS
from dualoptim.method.objectives import FORGET

# losses, optimizer, rate, forget rate, forget coefficient, batch, accumulation, epochs: typed from the published files.
# Where the source is a method's, the scenario it runs on stands before it.
PUBLISHED = {
    "tofu-llama2-7b": ("ME+GD", "dual-adamw", 1e-5, None, 0.1, 5, 4, 5),
    "tofu-phi-1.5": ("ME+GD", "dual-adamw", 1e-5, None, 0.1, 5, 4, 5),
    "real-world-llama3-8b": ("ME+GD", "dual-adamw", 5e-6, 1e-5, 0.5, 4, 4, 5),
    "tofu-phi-1.5 me-gd": ("ME+GD", "dual-adamw", 1e-5, 1e-5, 0.1, 5, 4, 5),
    "tofu-phi-1.5 idk-ap": ("IDK+AP", "dual-adamw", 1e-5, 1e-5, 1.0, 5, 4, 5),
    "tofu-phi-1.5 me-gd-plus": ("ME+GD", "dual-adamw-plus", 1e-5, 1e-5, 0.1, 4, 5, 5),
    "tofu-llama2-7b me-gd-joint": ("ME+GD", "adamw", 1e-5, None, 0.1, 4, 4, 5),
    "tofu-llama2-7b idk-ap-joint": ("IDK+AP", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "tofu-llama2-7b ga-gd": ("GA+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "real-world-llama3-8b npo-gd": ("NPO+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "idk-gd": ("IDK+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "dpo-gd": ("DPO+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "ga-kl": ("GA+KLQ", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "npo-kl": ("NPO+KLQ", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "idk-kl": ("IDK+KLQ", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "dpo-kl": ("DPO+KLQ", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "simnpo-gd": ("SimNPO+GD", "adamw", 1e-5, None, 0.125, 4, 4, 10),
    "rmu-embed": ("RMU+EMBED", "adamw", 1e-5, None, 1.0, 4, 4, 10),
    "rmu-wmdp": ("RMU+EMBED", "adamw", 5e-5, None, 1.0, 1, 16, 5),
    "undial": ("UNDIAL+none", "adamw", 1e-4, None, 1.0, 2, 8, 10),
    "wga-gd": ("WGA+GD", "adamw", 1e-5, None, 1.0, 4, 4, 5),
    "satimp-gd": ("SatImp+GD", "adamw", 1e-5, None, 0.1, 4, 4, 5),
    "ce-u": ("CE-U+none", "adamw", 1e-5, None, 1.0, 4, 4, 10),
}

# what benchmarks declare: model, losses, optimizer, rate, batch x accumulation, epochs, longest text, schedule, what trains
BENCHMARKS = {
    "lume-7b": ("olmo-finetuned-semeval25-unlearning", "GA+GD", "adamw-alternate", 1e-5, 1, 7, 500, "published", "last:8"),
    "lume-1b": ("olmo-1B-model-semeval25-unlearning", "GA+GD", "adamw-alternate", 1e-5, 1, 7, 500, "published", "last:8"),
    "muse-news": ("MUSE-News_target", "ME+GD", "dual-adamw", 1e-5, 64, 10, 2048, "constant", None),
    "muse-books": ("MUSE-Books_target", "ME+GD", "dual-adamw", 1e-5, 64, 10, 2048, "constant", None),
}


def test_every_preset_is_compared_with_what_was_published():
    assert {names.split()[-1] for names in PUBLISHED} | set(BENCHMARKS) == set(PRESETS)


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_presets_that_benchmarks_declare(name):
    args = parse(UnlearnArgs, ["--preset", name])
    assert args == preset(name)
    said = args.forget_losses[0], args.optim, args.rates[0], args.batch_size * args.gradient_accumulation_steps
    said = (*said, args.num_epochs, args.max_length, args.lr_schedule, args.trainable)
    assert (args.model.split("/")[1], *said) == BENCHMARKS[name]
    assert args.benchmark == name.removesuffix("-7b").removesuffix("-1b")
    joint = parse(UnlearnArgs, ["--preset", name, "npo-gd"])
    assert (joint.benchmark, joint.model, joint.forget_losses) == (args.benchmark, args.model, ("NPO+GD",))


@pytest.mark.parametrize("names", list(PUBLISHED))
def test_presets_hold_the_published_numbers_and_flags_override_them(names):
    by_flag = parse(UnlearnArgs, ["--preset", *names.split()])
    assert by_flag == preset(*names.split())
    losses, optim, rate, forget_rate, coefficient, batch, accumulation, epochs = PUBLISHED[names]
    assert (by_flag.forget_losses, by_flag.optim) == ((losses,), optim)
    assert (by_flag.rates, by_flag.forget_lr) == ((rate,), forget_rate)
    assert (by_flag.forget_coeff, by_flag.regularization_coeff) == (coefficient, 1.0)
    assert (by_flag.batch_size, by_flag.gradient_accumulation_steps, by_flag.num_epochs) == (batch, accumulation, epochs)
    assert (by_flag.weight_decay, by_flag.seed, by_flag.retain_freq, by_flag.forget_freq) == (0.01, 1001, 5, 1)
    assert by_flag.mask == (names != "tofu-llama2-7b me-gd-joint")
    flags = [f"--preset={names}"] if " " not in names else ["--preset", *names.split()]
    changed = parse(UnlearnArgs, [*flags, "--num-epochs", "2", "--learning-rates", "7e-6"])
    assert changed == dataclasses.replace(by_flag, num_epochs=2, learning_rates=(7e-6,))
    assert preset(*names.split(), num_epochs=2).num_epochs == 2


def test_constants_of_presets():
    assert preset("simnpo-gd").beta == 4.5  # everything else is the objective's own default
    plus = preset("me-gd-plus")
    assert (plus.adam_betas, plus.base_betas) == ((0.9, 0.95), (0.99, 0.999))
    wmdp = preset("rmu-wmdp")
    assert (wmdp.lr_schedule, wmdp.warmup_epochs, wmdp.max_steps, wmdp.max_length) == ("constant", 0, 80, 512)
    assert (wmdp.layer, wmdp.trainable) == (7, "layers.(5|6|7).mlp.down_proj")
    for name in ("rmu-embed", "rmu-wmdp", "undial", "wga-gd", "satimp-gd"):
        args, objective = preset(name), FORGET[preset(name).forget_losses[0].split("+")[0]]
        assert args.beta == objective.constants["beta"]
        assert args.gamma is None or args.gamma == objective.constants["gamma"]


def test_a_scenario_is_a_diff():
    default = UnlearnArgs()
    for scenario in SCENARIOS.values():
        assert all(getattr(default, field) != value for field, value in scenario.settings.items()), "it repeats a default"


def test_preset_without_a_name_lists_all_with_a_line_each(capsys):
    with pytest.raises(SystemExit) as end:
        parse(UnlearnArgs, ["--preset"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(preset.about in line and preset.source in line for preset, line in zip(PRESETS.values(), lines, strict=True))
