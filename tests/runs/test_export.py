"""`dualoptim export`: an adapter merged into its base, and a .gguf file."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from support import state_of
from transformers import AutoModelForCausalLM

from dualoptim import InputError, run
from dualoptim.ask import ask
from dualoptim.config.args import AskArgs, ExportArgs
from dualoptim.export import export
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model
from dualoptim.reporting.left import left_by


@pytest.fixture
def adapted(small_args):
    """The folder of a run that trained an adapter."""
    return run(dataclasses.replace(small_args, use_lora=True, learning_rates=(2e-3,), max_steps=4)).folder


@torch.no_grad()
def logits_of(name):
    args = left_by(str(name)).after
    loaded = load_model(args, start_accelerator(args), "measure")
    return loaded.model(torch.tensor([[5, 9, 33, 7, 1]])).logits


def test_an_adapter_is_merged_into_what_loads_without_one(adapted, tmp_path, capsys):
    folder = export(ExportArgs(str(adapted), output_dir=str(tmp_path / "served")))
    assert folder == tmp_path / "served" / "model"
    assert not list(folder.glob("adapter*"))
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(adapted), whole(torch.tensor([[5, 9, 33, 7, 1]])).logits)
    card = metadata_load(folder / "README.md")
    assert (card["library_name"], "lora" in card["tags"]) == ("transformers", False)
    assert "The adapter has been merged" in (folder / "README.md").read_text()
    assert "a question is put as 'Question: QUESTION\\nAnswer:'" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"served/model is there already; give another folder, or move it away"):
        export(ExportArgs(str(adapted), output_dir=str(tmp_path / "served")))


def test_a_gguf_file_of_a_run_answers_as_the_run_does(adapted, tmp_path, capsys):
    file = export(ExportArgs(str(adapted), "gguf", output_dir=str(tmp_path / "served")))
    assert [path.name for path in Path(file).parent.iterdir()] == ["model.gguf"]
    torch.testing.assert_close(logits_of(file), logits_of(adapted), rtol=0, atol=1e-5)
    capsys.readouterr()
    questions = ("In which city was Emeka Vasarely born?", "What is the nationality of Emeka Vasarely?")
    said = []
    for model in (adapted, file):
        ask(AskArgs(str(model), questions))
        said.append([line for line in capsys.readouterr().out.splitlines() if line.startswith(("  after:", "  answer:"))])
    assert [line.split()[1:] for line in said[0]] == [line.split()[1:] for line in said[1]]
    assert len(said[0]) == 2


@pytest.mark.parametrize(("alpha", "kind"), [(1.0, torch.float32), (0.25, torch.float32), (0.5, torch.bfloat16)])
def test_what_fine_tuning_has_added_is_taken_away_to_the_digit(tiny, tmp_path, alpha, kind):
    """From two folders: every tensor, one rounding where they hold 16 bits; the card says of what, and how often."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    generator = torch.Generator().manual_seed(0)
    for folder in (base, tuned):
        shutil.copytree(tiny, folder)
        model = AutoModelForCausalLM.from_pretrained(tiny)
        with torch.no_grad():
            for weight in model.parameters():  # a grid on which nothing is rounded
                weight.copy_(torch.randint(-9, 10, weight.shape, generator=generator) / 8)
        model.to(kind).save_pretrained(folder)
    folder = export(ExportArgs(str(base), negate=str(tuned), alpha=alpha, output_dir=str(tmp_path / "negated")))
    w, w_tuned, found = (state_of(one) for one in (base, tuned, folder))
    assert found.keys() == w.keys()
    for name, weight in found.items():
        assert weight.dtype == kind
        assert torch.equal(weight, (w[name].double() - alpha * (w_tuned[name].double() - w[name].double())).to(kind)), name
    assert f"From the weights {alpha:g} times what fine-tuning has added in tuned has" in (folder / "README.md").read_text()


def test_a_model_that_nothing_can_be_taken_from_is_one_line(tiny, taught, tmp_path):
    for other, said in (
        (tiny, f"its weights are those of RUN {tiny}; give a model fine-tuned from that"),
        (tmp_path / "gone", "no such folder"),
    ):
        with pytest.raises(InputError) as error:
            export(ExportArgs(str(tiny), negate=str(other), output_dir=str(tmp_path / "served")))
        assert str(error.value).startswith(f"--negate {other}: ")
        assert said in str(error.value)
        assert "\n" not in str(error.value)
    small = tmp_path / "small"
    shutil.copytree(tiny, small)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(small)
    with pytest.raises(InputError, match=r"small: it has other weights than RUN .*; give a model fine-tuned from that$"):
        export(ExportArgs(str(tiny), negate=str(small), output_dir=str(tmp_path / "served")))
    assert not (tmp_path / "served").exists()
    with pytest.raises(InputError, match=r"^--alpha 0.5 has no effect without --negate; give the fine-tuned model$"):
        ExportArgs(str(tiny), alpha=0.5, output_dir=str(tmp_path / "served"))


def test_a_model_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"RUN \./gone: no such folder"):
        export(ExportArgs("./gone", output_dir=str(tmp_path / "served")))
    assert not (tmp_path / "served").exists()
