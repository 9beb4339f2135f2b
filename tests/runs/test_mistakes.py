"""What is found wrong once data and model are read: one line, exit code 2, nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import ROOT
from transformers import BertConfig, BertLMHeadModel, T5Config

from dualoptim import EvalArgs, FinetuneArgs, UnlearnArgs, run
from dualoptim.config.cli import main
from dualoptim.config.saved import write_config
from dualoptim.evaluate import evaluate
from dualoptim.finetune import finetune
from dualoptim.report import ReportArgs, report

GOOD = '{"question": "Q?", "answer": "A."}\n'


def row(**fields):
    return json.dumps({"question": "Who?", "answer": "Me.", "task_id": 1, **fields}) + "\n"


@pytest.fixture
def bad(tmp_path, tiny):
    """A folder with everything that can be wrong, by name."""

    def data(name, forget, retain=GOOD, **others):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "forget01.json").write_text(forget)
        (folder / "retain90.json").write_text(retain)
        for file, text in others.items():
            (folder / f"{file}.json").write_text(text)

    data("good", row())
    data("bad_json", row() + '{"question": \n')
    data("array", "[1, 2]\n")
    data("no_answer", row() + '{"question": "Who?"}\n')
    data("empty_answer", row(answer="  "))
    data("number_answer", row(answer=7))
    data("no_rows", "\n\n")
    data("bad_task", row(task_id="one"))
    data("float_task", row(task_id=1.5))
    data("infinite_task", row(task_id=float("inf")))
    data("long_compared", row(), retain_perturbed=row(question="word " * 900))
    data("bad_perturbed", row(), forget01_perturbed=row(perturbed_answer="no list"))
    data("long_question", row(question="word " * 900))
    data("short_full", row(), full=GOOD * 9)
    (tmp_path / "no_retain").mkdir()
    (tmp_path / "no_retain" / "forget01.json").write_text(row())
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "forget01.json").write_bytes('{"question": "é'.encode("latin-1"))

    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "good_model" / "model").mkdir(parents=True)
    for file in Path(tiny).iterdir():
        (tmp_path / "good_model" / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "used" / "eval").mkdir(parents=True)
    (tmp_path / "used" / "eval" / "summary.json").write_text("{}")
    (tmp_path / "t5").mkdir()
    T5Config().save_pretrained(tmp_path / "t5")
    BertLMHeadModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)).save_pretrained(
        tmp_path / "bert"
    )
    for name in ("no_weights", "broken_weights", "no_eos"):
        (tmp_path / name).mkdir()
        for file in Path(tiny).iterdir():
            if file.name != "model.safetensors":
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken_weights" / "model.safetensors").write_bytes(b"not safetensors")
    config = json.loads((tmp_path / "no_eos" / "tokenizer_config.json").read_text())
    (tmp_path / "no_eos" / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    save_file({"x": torch.zeros(1)}, tmp_path / "no_eos" / "model.safetensors")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nothing")
    (tmp_path / "no_refusals.txt").write_text("\n\n")
    (tmp_path / "bad.yaml").write_text("learning_rate: 1e-5\n")
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "used" / "ME+GD_lr1e-05" / "task1").mkdir(parents=True)
    (tmp_path / "used" / "ME+GD_lr1e-05" / "task1" / "log.jsonl").write_text("{}\n")
    (tmp_path / "earlier" / "ME+GD_lr1e-05" / "task1").mkdir(parents=True)
    write_config(tmp_path / "earlier" / "ME+GD_lr1e-05" / "task1" / "config.yaml", {})
    (tmp_path / "others" / "ME+GD_lr1e-05" / "task1").mkdir(parents=True)
    (tmp_path / "others" / "ME+GD_lr1e-05" / "task1" / "log.jsonl").write_text("{}\n")
    return tmp_path


# flags of a command, and a part of the line that a user must see; {d} is the folder above, {m} a good model. What the flags
# alone can be wrong in is in tests/config/test_mistakes.py.
UNLEARN = [
    ("--split forget", "--split forget is the real-world scenario; give the folder of its files with --data"),
    ("--preset real-world-llama3-8b --model {m}", "give the folder of its files with --data"),
    ("--max-length 5", "leaves no room for an answer"),
    ("--template chat", "has no chat template"),
    ("--model {m} --data {d}/float_task --split forget01", "column 'task_id' is 1.5; give a whole number"),
    ("--model {m} --data {d}/infinite_task --split forget01", "column 'task_id' is inf; give a whole number"),
    ("--model {m} --data {d}/long_compared --split forget01", "leaves no room for an answer"),
    ("--forget-optimizer adam", "--forget-optimizer adam, --retain-optimizer adamw: 'adam' is no optimizer's name; give adamw"),
    ("--retain-optimizer torch.optim.Nothing", "has no attribute 'Nothing'"),
    ("--retain-optimizer torch.nn.Linear", "torch.nn.Linear is no torch optimizer"),
    ("--forget-optimizer torch.optim.LBFGS", "--forget-optimizer torch.optim.LBFGS, --retain-optimizer adamw: LBFGS"),
    ("--forget-optimizer torch.optim.NAdam", "the forget optimizer's state does not start at zero"),
    ("--forget-optimizer signsgd --forget-adam-betas 0.9 0.99", "no moments that betas 0.9 0.99 could be of"),
    ("--forget-losses ME+GD RMU+EMBED --layer 99", "--layer 99: RMU+EMBED takes one of the model's layers 0 to"),
    ("--forget-losses NPO+GD --reference-dir {d}/a_file", "a_file: Not a directory; give another path"),
    ("--model {m} --data {d}/nowhere", "no such folder; give a folder"),
    ("--model {m} --data {d}/empty_folder --split forget01", "has no forget01.json; it has no .json files"),
    ("--model {m} --data {d}/good --split forget10", "has no forget10.json; it has forget01, retain90"),
    ("--model {m} --data demo --split forget01", "the demo data has no split 'forget01'"),
    ("--model {m} --data {d}/no_retain --split forget01", "has no retain90.json"),
    ("--model {m} --data {d}/good --split forget01 --task-list 2", "has no such task; it has 1"),
    ("--model {m} --data {d}/bad_json --split forget01", "forget01.json:2: not JSON"),
    ("--model {m} --data {d}/array --split forget01", "forget01.json:1: not a JSON object"),
    ("--model {m} --data {d}/no_answer --split forget01", "forget01.json:2: no field 'answer'"),
    ("--model {m} --data {d}/empty_answer --split forget01", "forget01.json:1: column 'answer' is '  '"),
    ("--model {m} --data {d}/number_answer --split forget01", "forget01.json:1: column 'answer' is 7"),
    ("--model {m} --data {d}/no_rows --split forget01", "holds no rows"),
    ("--model {m} --data {d}/bad_task --split forget01", "column 'task_id' is 'one'; give a whole number"),
    ("--model {m} --data {d}/bad_perturbed --split forget01", "_perturbed.json:1: column 'perturbed_answer' is 'no list'"),
    ("--model {m} --data {d}/latin --split forget01", "not UTF-8"),
    ("--model {m} --data {d}/long_question --split forget01", "leaves no room for an answer"),
    ("--model {m} --data {d}/short_full --split forget01", "full has 9 rows"),
    ("--model {m} --data nobody/nothing --split forget01", "cannot be loaded"),
    ("--model {d}/nowhere --data demo", "no such folder; give a folder, a .gguf file or a hub id"),
    ("--model {d}/empty_folder --data demo", "the folder has no config.json"),
    ("--model {d}/none.gguf --data demo", "no such file; give the path of a .gguf file"),
    ("--model {d}/broken.gguf --data demo", "cannot load it"),
    ("--model {d}/t5 --data demo", "t5 is not a decoder-only language model"),
    ("--model {d}/bert --data demo", "bert is not a decoder-only language model"),
    ("--model {d}/no_weights --data demo", "cannot load it"),
    ("--model {d}/broken_weights --data demo", "cannot load it"),
    ("--model {d}/no_eos --data demo", "no end-of-sequence token"),
    ("--model nobody/nothing --data demo", "cannot load it"),
    ("--model {m} --data demo --template chat", "has no chat template"),
    ("--model {m} --data demo --idk-file {d}/none.txt", "--idk-file"),
    ("--model {m} --data demo --idk-file {d}/no_refusals.txt", "holds no lines"),
    ("--model {m} --data demo --attn-implementation flash_attention_2", "needs CUDA"),
    ("--model {m} --data demo --output-dir {d}/earlier", "is an earlier result"),
    ("--model {m} --data demo --output-dir {d}/others --overwrite", "task1 was not written by dualoptim; move it away"),
    ("--model {m} --data demo --output-dir {d}/a_file", "a_file"),
    ("--push-to-hub me/forgot", "--push-to-hub me/forgot: HF_HUB_OFFLINE is set, which forbids uploads; unset it"),
]
EVAL = [
    ("", "--model demo has no weights on disk"),
    ("--model {m} --data demo --task 99", "task 99: forget05 of demo has no such task"),
    ("--model {m} --data {d}/long_compared --split forget01 --overwrite --output-dir {d}/used", "leaves no room for an answer"),
    ("--model {m} --data demo --sentence-encoder {d}/empty_folder", "--sentence-encoder {d}/empty_folder: cannot be loaded"),
    ("--model {m} --data demo --sentence-encoder nobody/nothing", "give a folder or hub id of a sentence encoder"),
    ("--model {m} --data demo --entailment-model {d}/empty_folder", "--entailment-model {d}/empty_folder: "),
    ("--model {m} --data demo --entailment-model {m}", "its labels are LABEL_0, LABEL_1, none of them entailment"),
    (
        "--model {m} --data demo --retain-logs {d}/nowhere",
        "{d}/nowhere: cannot be read (No such file or directory)",
    ),
    ("--model {m} --data demo --retain-logs {d}/empty_folder", "the folder has no summary.json"),
    ("--model {m} --data demo --retain-model {d}/nowhere", "--retain-model {d}/nowhere: no such folder"),
    ("--model {m} --data demo --reference-model {d}/nowhere", "--reference-model {d}/nowhere: no such folder"),
    ("--model {m} --data demo --idk-file {d}/no_refusals.txt", "holds no lines"),
    ("--model {m} --data demo --holdout-file {d}/none.jsonl", "none.jsonl: cannot be read"),
    ("--model {m} --data {d}/good --split forget01 --reference-model {m}", "is for membership attacks; give --holdout-file"),
    ("--model {m} --data {d}/good --split forget01 --mia-gradnorm", "is for membership attacks; give --holdout-file"),
    ("--model {m} --data demo --relearn 2 --relearn-rows nothing", "--relearn-rows nothing: no such file; give forget, half"),
    ("--model {m} --data demo --prefix-words 900", "--prefix-words 900: no answer to a question of the forget set has more"),
    ("--model {m} --data demo --few-shot 9 --max-length 60", "--max-length 60 leaves no room for an answer after the question"),
    ("--model {m} --data {d}/good --split forget01 --paraphrase", "have no paraphrased_question"),
]
FINETUNE = [
    ("--model {m} --data demo --splits nothing", "the demo data has no split 'nothing'"),
    ("--model {m} --data demo --splits forget05 --tasks 99", "--tasks 99: no row of forget05 belongs to this task"),
    ("--model {d}/good_model/model --data demo --output-dir {d}/good_model --overwrite", "holds the model or the data"),
]
REPORT = [
    ("{d}/nowhere", "RUN {d}/nowhere: no such folder; give the output folder of"),
    ("{d}/a_file", "a_file: no such folder; give the output folder of"),
    ("{d}/empty_folder", "empty_folder: no task<k>/ with config.yaml and log.jsonl in it, and no eval/summary.json; give"),
    ("{d}/good_model", "good_model: no task<k>/ with config.yaml"),
    ("{d}/used --output-dir {d}/a_file", "--output-dir {d}/a_file: Not a directory"),
]
CASES = [
    *((UnlearnArgs, run, *case) for case in UNLEARN),
    *((EvalArgs, evaluate, *case) for case in EVAL),
    *((FinetuneArgs, finetune, *case) for case in FINETUNE),
    *((ReportArgs, report, *case) for case in REPORT),
]


def listing(folder):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize(("kind", "action", "flags", "message"), CASES, ids=[f"{c[0].__name__} {c[2]}" for c in CASES])
def test_one_line_and_exit_code_two(kind, action, flags, message, bad, tiny, capsys, monkeypatch):
    monkeypatch.chdir(bad)
    monkeypatch.setattr(sys, "argv", ["command", *flags.format(d=bad, m=tiny).split()])
    message = message.replace("{d}", str(bad))
    before = listing(bad)
    with pytest.raises(SystemExit) as end:
        main(kind, action)
    stderr = capsys.readouterr().err
    assert end.value.code == 2, stderr
    assert " ".join(message.replace("{d}", str(bad)).split()) in " ".join(stderr.replace("│", " ").split()), stderr
    assert "Traceback" not in stderr
    if "For full helptext" not in stderr:  # tyro draws its own box, of several lines
        assert [line for line in stderr.splitlines() if line.startswith("error: ")] == [stderr.strip().splitlines()[-1]]
    assert listing(bad) == before, "something was written"


def ended(*flags):
    line = [sys.executable, str(ROOT / "train_unlearn.py"), *flags]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_the_script_itself_ends_with_two():
    assert ended("--num-epochs", "0") == (2, "error: --num-epochs 0 is out of range; give 1 or more")


@pytest.mark.launch
def test_the_script_ends_with_two_after_what_libraries_say():
    code, line = ended("--model", "./nowhere")
    assert code == 2
    assert line.startswith("error: --data locuslab/TOFU: configuration 'full' cannot be loaded")
