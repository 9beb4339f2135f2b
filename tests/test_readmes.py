"""Every block of code in every README: its commands exist, and a test runs them, or it is said what that would need."""

import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import tyro
import yaml
from accelerate.commands.launch import launch_command_parser
from support import ROOT

from dualoptim import InputError, __main__
from dualoptim.__main__ import COMMANDS, _imported
from dualoptim.config.args import CommonArgs
from dualoptim.config.cli import parse
from dualoptim.config.flags import flag_name, helps
from dualoptim.config.spelling import names_of
from dualoptim.sweep import runs_of

ROOMS = [path for folder in (ROOT, ROOT / "dualoptim", ROOT / "tests") for path in folder.glob("[!.]*/README.md")]
READMES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOMS)]


class Run(NamedTuple):
    """The test that runs a block, and how it is shortened: as printed where nothing is said."""

    test: str
    shortened: str = ""


class Needs(NamedTuple):
    """What running a block would need that tests do not have."""

    what: Literal["a GPU", "the hub", "hours"]


CHAIN = Run("tests/test_readmes.py::test_the_real_job_and_what_follows_it", "every fortieth row, a step or two, a tiny model")
OWN = "tests/test_readmes.py::test_the_first_page_forgets_facts_of_ones_own"
OWN_FILES = Run("tests/test_readmes.py::test_own_files_as_the_page_on_data_has_them", "two steps, the demo's model")
PYTHON = Run("tests/test_readmes.py::test_the_first_page_runs_from_python")
DEMO = Run("tests/runs/test_run.py::test_accelerate_launch_prints_the_table", "once installed, two steps")
SLURM = Run("tests/runs/test_slurm.py::test_a_script_for_slurm_unlearns_on_every_node_that_it_is_given", "three steps")
METHOD = Run("tests/method/test_readme.py::test_the_examples_of_a_new_objective_and_a_new_optimizer_run")
BLOCKS: dict[str, dict[str, Run | Needs]] = {
    "CONTRIBUTING.md": {
        "from dataclasses import": Run("tests/test_readmes.py::test_contributing_adds_a_flag"),
        "pip install -e '.[test]'": Needs("hours"),
    },
    "README.md": {
        "pip install -e . &&": DEMO,
        "cat > forget.csv": Run(OWN),
        "dualoptim report runs/mine": Run(OWN),
        "accelerate launch train_unlearn.py --preset tofu-llama2-7b": Needs("a GPU"),
        "accelerate launch --config_file accelerate_configs/zero3.yaml": Needs("the hub"),
        "pip install gguf": CHAIN,
        "dualoptim sweep": CHAIN,
        "accelerate launch eval_tofu.py": CHAIN,
        "from dualoptim import UnlearnArgs": PYTHON,
        "import torch": PYTHON,
    },
    "accelerate_configs/README.md": {
        "accelerate launch --config_file accelerate_configs/zero3.yaml train_unlearn.py --model ...": Needs("a GPU"),
        "sbatch": SLURM,
        "accelerate launch --config_file accelerate_configs/zero3.yaml --num_machines 2": Needs("a GPU"),
        "accelerate launch --config_file accelerate_configs/zero3.yaml train_unlearn.py --preset": Run(
            "tests/runs/test_memory_plan.py::test_a_configuration_is_enough_and_nothing_is_written", "without the launcher"
        ),
    },
    "dualoptim/config/README.md": {
        "dualoptim unlearn --preset tofu-phi-1.5": Needs("the hub"),
        "# sail-sg/closer-look-LLM-unlearning": Needs("the hub"),
    },
    "dualoptim/data/README.md": {
        "accelerate launch train_unlearn.py --model my-model": OWN_FILES,
        "dualoptim unlearn --benchmark lume": Needs("the hub"),
        "rows:": Run("tests/runs/test_benchmark.py::test_the_benchmark_of_the_readme_runs"),
        "class Sums": Run("tests/data/test_readme.py::test_the_layout_of_the_readme_is_a_source"),
    },
    "dualoptim/evaluation/README.md": {
        "dualoptim finetune": Needs("hours"),
        "accelerate launch eval_tofu.py": CHAIN,
        "from dualoptim.evaluation.metrics": Run("tests/evaluation/test_readme.py::test_the_example_of_a_new_metric_runs"),
        "python -m dualoptim.finetune": CHAIN,
        "python tests/speed/frontier.py": Needs("hours"),
    },
    "dualoptim/method/README.md": {"from dualoptim import FORGET": METHOD, "import torch": METHOD},
    "dualoptim/models/README.md": {
        "dualoptim export": Run(
            "tests/runs/test_export.py::test_a_gguf_file_of_a_run_answers_as_the_run_does", "a few steps, the demo's model"
        )
    },
    "dualoptim/reporting/README.md": {
        "dualoptim sweep": Needs("hours"),
        "python -m dualoptim.report": CHAIN,
        "dualoptim ask": Run("tests/runs/test_ask.py::test_a_model_is_asked_alone_or_beside_another", "the demo's model"),
    },
    "tests/fuzz/README.md": {"pytest tests/fuzz": Needs("hours")},
    "tests/runs/README.md": {"pytest": Needs("hours"), "accelerate launch train_unlearn.py": CHAIN},
    "tests/speed/README.md": {
        "python tests/speed/speed.py": Needs("hours"),
        "python tests/speed/gpu.py": Needs("a GPU"),
        "python tests/speed/memory.py": Needs("hours"),
    },
}
"""Blocks by how they begin, but for what is no code."""

NO_CODE = re.compile(r"\||\[forget\]|@article|\S+/\n|d?m_o <- |llama-2-7b: ")
"""How tables, answers, BibTeX, trees of folders, formulas, and what a dry run prints begin."""

SCRIPTS = {"train_unlearn.py": "unlearn", "eval_tofu.py": "eval"}


class Block(NamedTuple):
    """A fenced block with its language, or a paragraph indented by four spaces."""

    file: str
    language: str
    text: str


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    fenced = [Block(name, language, code) for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)]
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    indented = re.findall(r"(?<=\n\n)((?:    .*\n)+)", rest)
    return fenced + [Block(name, "", re.sub("^    ", "", code, flags=re.M)) for code in indented]


ALL = [block for path in READMES for block in blocks_of(path)]
CODE = [block for block in ALL if not NO_CODE.match(block.text)]


def shown(block: Block) -> str:
    return f"{block.file}: {block.text[:40]}"


def test_every_block_is_run_by_a_test_or_says_what_that_would_need():
    left = {(file, beginning) for file, beginnings in BLOCKS.items() for beginning in beginnings}
    for block in CODE:
        found = [beginning for beginning in BLOCKS.get(block.file, {}) if block.text.startswith(beginning)]
        assert found, f"{shown(block)}: give it a line in BLOCKS"
        left.discard((block.file, max(found, key=len)))
    assert not left, "is in no README any more"
    for beginnings in BLOCKS.values():
        for how in beginnings.values():
            if isinstance(how, Run):
                file, _, test = how.test.partition("::")
                assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), how.test
                assert (ROOT / file).is_file()


# ---------------------------------------------------------------------------------------------------- what is typed exists

RECORD = """
: > words
command_not_found_handle() { printf '%s\\0' "$@" >> words; printf '\\n\\0' >> words; echo stand-in; }
function .ci/floors { :; }
PATH=/nowhere
"""


def commands_of(script: str, folder: Path, before: str = RECORD) -> list[list[str]]:
    """The words of every command of a shell script, as bash reads it: a stand-in for each writes them down."""
    done = subprocess.run(["/bin/bash", "-c", before + script], cwd=folder, capture_output=True, text=True, timeout=60)
    assert "syntax error" not in done.stderr, f"{script}\n{done.stderr}"
    assert "line " not in done.stderr, f"{script}\n{done.stderr}"
    commands = (folder / "words").read_text(encoding="utf-8").split("\n\0")
    return [command.rstrip("\0").split("\0") for command in commands if command]


@functools.cache
def launcher():
    return launch_command_parser()


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """Which command of dualoptim is called, and its flags."""
    if words[0] == "accelerate":
        assert words[1] == "launch"
        launch = launcher().parse_args(words[2:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file()
        if launch.module:
            return ours(["python", "-m", launch.training_script, *launch.training_script_args])
        return SCRIPTS[launch.training_script], launch.training_script_args
    if words[0] == "sbatch":
        (script,) = [word for word in words if word.endswith(".sh")]
        assert (ROOT / script).is_file()
        return "unlearn", words[words.index(script) + 1 :]
    if words[:2] == ["python", "-m"]:
        words = [*words[2].split("."), *words[3:]]
    return (words[1], words[2:]) if words[0] == "dualoptim" else None


def arguments_of(name: str, words: list[str]):
    """What a command is given: unknown flags and values that do not fit fail here."""
    kind = _imported(COMMANDS[name].args)
    return parse(kind, words) if issubclass(kind, CommonArgs) else tyro.cli(kind, args=words)


def check(words: list[str], config: pytest.Config) -> None:
    """Refuse a command that is none, or that names what is not there."""
    name, *rest = words
    known = ours(words)
    if known:
        command, flags_given = known
        if command == "launch-file":
            assert __main__._launch_file(command, flags_given)
        else:
            arguments_of(command, flags_given)
    elif name == "python":
        if rest[0] != "-c":
            text = (ROOT / rest[0]).read_text(encoding="utf-8")
            assert all(f'"{word}"' in text for word in rest if word.startswith("--")), words
    elif name == "pytest":
        for before, word in zip(words, rest, strict=False):
            if before == "-m":
                marks = {line.partition(":")[0] for line in config.getini("markers")}
                assert word in marks, words
            elif "/" in word:
                assert (ROOT / word).exists(), words
    elif name == "pip":
        extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for extra in re.findall(r"\.\[(.*?)\]", " ".join(rest)):
            assert re.search(rf"^{extra} = \[", extras, re.M), words
    else:
        assert name in ("mkdir", "head", "cat", "find", "ruff", "mypy", "git"), f"{words}: say in check() how it is checked"


@pytest.mark.parametrize("block", CODE, ids=shown)
def test_every_block_is_what_its_language_says_and_names_what_exists(block, tmp_path, monkeypatch, pytestconfig):
    if block.language == "python":
        compile(block.text, block.file, "exec")
    elif block.language == "yaml":
        assert yaml.safe_load(block.text)
    else:
        assert block.language in ("", "bash")
        (tmp_path / "case").touch()
        (tmp_path / "tofu-part").mkdir()
        monkeypatch.setenv("TOFU", "tofu")
        monkeypatch.setenv("GGUF", "model.gguf")
        monkeypatch.chdir(tmp_path)
        commands = commands_of(block.text, tmp_path)
        assert commands
        for words in commands:
            check(words, pytestconfig)


def test_a_command_in_a_sentence_names_what_exists(tmp_path, monkeypatch, pytestconfig):
    monkeypatch.chdir(tmp_path)
    for path in READMES:
        for command in re.findall(r"`((?:pytest|python tests/|dualoptim) [^`\n\[]*)`", path.read_text(encoding="utf-8")):
            for words in commands_of(command, tmp_path):
                if len(words) == 2:  # named, not given
                    assert words[1] in COMMANDS
                else:
                    check(words, pytestconfig)


def test_every_flag_that_a_readme_names_exists():
    known = {"help", "preset", "config", "tyro_print_completion"}
    for kind in (_imported(command.args) for command in COMMANDS.values()):
        known |= set(names_of(kind)) | {f"no_{name}" for name in names_of(kind)}
    known |= {option.lstrip("-") for action in launcher()._actions for option in action.option_strings}
    known = {name.replace("-", "_") for name in known}
    # SLURM's, of tests/speed, ruff's, pip's and git's
    others = "--nodes --signal --only --at-once --device --parts --size --launches --check --no-deps --tags".split()
    for path in READMES:
        for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*\*?", path.read_text(encoding="utf-8")):
            if flag.endswith("*"):
                assert any(flag_name(name).startswith(flag[:-1]) for name in known), f"{path}: {flag}"
            else:
                assert flag[2:].replace("-", "_") in known or flag in others, f"{path}: {flag}"


def test_a_sentence_counts_the_runs_of_the_sweep_above_it(tmp_path):
    (block,) = [
        block.text for block in CODE if block.file.endswith("reporting/README.md") and block.text.startswith("dualoptim sweep")
    ]
    (words,) = commands_of(block, tmp_path)
    text = (ROOT / "dualoptim/reporting/README.md").read_text(encoding="utf-8")
    assert f"takes at most so many of those {len(runs_of(arguments_of(*ours(words))))} runs" in text


def test_what_readmes_link_to_is_there():
    for path in READMES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path}: {target}"


# ------------------------------------------------------------------------------------------------------------- what is run


def test_the_first_page_runs_from_python(taught, tmp_path, monkeypatch):
    """The Python of the README, word for word, on the demo's model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(taught)
    blocks = [block.text for block in CODE if (block.file, block.language) == ("README.md", "python")]
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    assert (tmp_path / "runs/python/ME+GD_lr0.00015/task1/model/config.json").is_file()


def test_the_first_page_forgets_facts_of_ones_own(taught, tmp_path):
    """The five lines of the README and the report after them, word for word, on the demo's model."""
    (tmp_path / "my-model").symlink_to(taught)
    (tmp_path / "train_unlearn.py").symlink_to(ROOT / "train_unlearn.py")
    five, report = [block.text for block in CODE if (block.file, block.language) == ("README.md", "bash")]
    assert five.count("\n") == 5
    script = f'dualoptim() {{ "{sys.executable}" -m dualoptim "$@"; }}\nset -e\n{five}{report}'
    environment = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs/mine/ME+GD_lr1e-05/task1/model/model.safetensors").is_file()
    assert "Emeka Vasarely" in (tmp_path / "runs/mine/report.html").read_text(encoding="utf-8")
    assert "\n  before: Emeka Vasarely was born in Tbilisi.\n  after:" in done.stdout


def test_contributing_adds_a_flag(tmp_path, monkeypatch):
    (block,) = [block.text for block in CODE if (block.file, block.language) == ("CONTRIBUTING.md", "python")]
    assert len(block.splitlines()) <= 10
    (tmp_path / "patient.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module("patient").PatientArgs
    assert helps(kind)["patience"] == "Epochs without progress after which training stops; 0 goes on."
    assert parse(kind, ["--patience", "3"]).patience == 3
    with pytest.raises(InputError, match="--patience -1 is out of range; give 0 or more"):
        parse(kind, ["--patience", "-1"])


SHORTER = {
    "finetune": "--max-steps 1 --save-dtype bfloat16",
    "unlearn": "--max-steps 2 --save-dtype bfloat16 --eval-rows 1 --max-new-tokens 4",
    "sweep": "--max-steps 2 --eval-rows 1 --max-new-tokens 4 --seeds 1 --forget-lrs 5e-5",
    "eval": "--eval-rows 1 --max-new-tokens 4",
    "report": "",
}
"""What is added to each command of the real job: of a flag that is given twice the later one counts."""

RECORD_OURS = """
set -e
: > words
record() { printf '%s\\0' "$@" >> words; printf '\\n\\0' >> words; }
accelerate() { record accelerate "$@"; }
dualoptim() { record dualoptim "$@"; }
python() { if [ "$1" = -c ]; then "$PYTHON" "$@"; else record python "$@"; fi; }
pip() { :; }
git() { :; }
"""


def run_shortened(blocks: list[Block], folder: Path, replaced: dict[str, str]) -> list:
    """Run what blocks of a shell say: bash the shell's own part, this process our commands with what `SHORTER` adds."""
    script = "".join(block.text for block in blocks)
    for text, other in replaced.items():
        assert text in script, f"{text} is to be replaced, and is not there"
        script = script.replace(text, other)
    outcomes = []
    for words in commands_of(script, folder, RECORD_OURS):
        name, given = ours(words)
        args = arguments_of(name, [*given, *SHORTER[name].split()])
        outcomes.append((name, _imported(COMMANDS[name].action)(args)))
    return outcomes


def blocks_that(how: Run) -> list[Block]:
    found = [
        block
        for block in CODE
        for beginning, value in BLOCKS[block.file].items()
        if value is how and block.text.startswith(beginning)
    ]
    order = [*BLOCKS]
    return sorted(found, key=lambda block: order.index(block.file))


FEWER = {"head -n 80": "sed -n 1~40p", "head -n 40": "sed -n 1~40p"}  # one row of each task
FOUND = '$(find $(python -c "import site; print(*site.getsitepackages())") -name "SmolLM2*.gguf")'


@pytest.fixture
def clone(shared, tmp_path, monkeypatch):
    """What the README has one clone: the published data, in the folder that the commands are typed in."""
    (tmp_path / "DualOptim" / "LLM").mkdir(parents=True)
    (tmp_path / "DualOptim" / "LLM" / "data").symlink_to(shared("data/tofu"))
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.chdir(tmp_path)


@pytest.mark.launch  # half a minute: ten commands
def test_the_real_job_and_what_follows_it(tiny, clone, tmp_path):
    """SmolLM2's commands on each page in turn, with few rows and steps and a tiny model in its place."""
    weaker = {"--relearn 20": "--relearn 2", "--sample 8": "--sample 1"}
    done = run_shortened(blocks_that(CHAIN), tmp_path, {**FEWER, **weaker, FOUND: str(tiny)})
    assert [name for name, _ in done].count("eval") == 3
    compared = (tmp_path / "runs/compared/report.md").read_text(encoding="utf-8")
    assert all(losses in compared for losses in ("ME+GD", "NPO+GD"))
    assert (tmp_path / "runs/smollm2/IDK+AP_lr6e-05/task1/model/config.json").is_file()


@pytest.mark.launch  # a model of 135 million parameters
def test_the_real_job_takes_the_real_model(gguf, clone, tmp_path):
    run_shortened(blocks_that(CHAIN)[:1], tmp_path, FEWER)


def test_the_tab_key_completes_flags(tmp_path):
    (source,) = re.findall(r"`(source <\(dualoptim .*?\))`", (ROOT / "README.md").read_text(encoding="utf-8"))
    press = "COMP_WORDS=(dualoptim unlearn --forget-l)\nCOMP_CWORD=2\n$(complete -p dualoptim | cut -d' ' -f3)"
    script = f'dualoptim() {{ "{sys.executable}" -m dualoptim "$@"; }}\n{source}\n{press}\necho ${{COMPREPLY[@]}}'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["--forget-losses", "--forget-loss", "--forget-lr", "--forget-lrs"]


def test_own_files_as_the_page_on_data_has_them(taught, tmp_path, monkeypatch):
    (tmp_path / "my-model").symlink_to(taught)
    (tmp_path / "forget.csv").write_text("prompt,reply\nWho?,Marta.\n")
    (tmp_path / "keep.jsonl").write_text('{"prompt": "Where?", "reply": "In Ostby."}\n')
    (tmp_path / "document.txt").write_text("Marta keeps the harbour of Ostby.")
    monkeypatch.chdir(tmp_path)
    run_shortened(blocks_that(OWN_FILES), tmp_path, {})
    assert (tmp_path / "runs/mine/NPO+KL_lr1e-05/task1/model/config.json").is_file()
    assert (tmp_path / "runs/doc/NPO+none_lr1e-05/task1/model/config.json").is_file()
