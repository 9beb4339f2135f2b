"""The commands: what they print and end with, and what they take their defaults from."""

import importlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from support import ROOT

from dualoptim import EvalArgs, FinetuneArgs, InputError, NonFiniteError, UnlearnArgs
from dualoptim import __main__ as command
from dualoptim.config import cli
from dualoptim.config.cli import main, parse, unforeseen
from dualoptim.errors import WriteError


def ended(capsys, monkeypatch, *words):
    """The exit code of `dualoptim WORDS`, and what it prints to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["dualoptim", *words])
    with pytest.raises(SystemExit) as end:
        command.main()
    return end.value.code, *capsys.readouterr()


def test_without_a_command_all_are_listed(capsys, monkeypatch):
    code, out, err = ended(capsys, monkeypatch)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == [*command.COMMANDS, "launch-file"]
    for word in command.COMMANDS.values():
        assert word.about in out
    assert ended(capsys, monkeypatch, "--help") == (code, out, err)


@pytest.mark.parametrize("word", ["unlern", "--preset", "launch_file"])
def test_an_unknown_command_is_one_line(word, capsys, monkeypatch):
    code, out, err = ended(capsys, monkeypatch, word)
    assert (code, out) == (2, "")
    behind = "; flags stand behind a command, as in dualoptim unlearn --preset" if word == "--preset" else ""
    assert err == f"error: {word!r} is no command{behind}; give one of {', '.join(command.COMMANDS)}, launch-file\n"


def test_a_launch_file_is_found_by_its_name(capsys, monkeypatch):
    code, out, _ = ended(capsys, monkeypatch, "launch-file", "zero3")
    assert code == 0
    assert Path(out.strip()).read_text() == (ROOT / "accelerate_configs" / "zero3.yaml").read_text()


@pytest.mark.parametrize("names", [["nothing"], [], ["zero2", "zero3"]])
def test_a_launch_file_that_is_not_there_is_one_line(names, capsys, monkeypatch):
    code, out, err = ended(capsys, monkeypatch, "launch-file", *names)
    assert (code, out) == (2, "")
    assert err.startswith(" ".join(["error: launch-file", *names]) + ": give one of cpu, ddp, fsdp2, single_gpu, zero1")
    assert err.count("\n") == 1


def test_a_command_gets_the_flags_behind_its_word(capsys, monkeypatch):
    called = []
    monkeypatch.setattr(command, "_imported", lambda place: FinetuneArgs if place[0] == "config.args" else called.append)
    code, _, _ = ended(capsys, monkeypatch, "finetune", "--num-epochs", "3", "--data", "demo")
    assert code == 0
    assert called == [FinetuneArgs(num_epochs=3, data="demo")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "finetune",
            "nothing says what is to be learned; give --forget-file FILE, --data FOLDER (or locuslab/TOFU) or --",
        ),
        ("finetune --model m --splits full", "nothing says what is to be learned; give --forget-file FILE"),
        ("eval", "--model demo has no weights on disk; give a folder"),
        ("sweep --seeds 1 2", "a sweep needs a folder that a second call finds again; give --output-dir"),
        ("report", "no RUN is given; name the output folder of a run"),
        ("export runs/mine", "an export needs a folder to write to; give --output-dir"),
        ("ask runs/mine who --questions-file f.txt", "--questions-file f.txt and a question are given; give one of them"),
        ("ask runs/mine --max-new-tokens 0", "--max-new-tokens 0 is out of range; give 1 or more"),
    ],
)
def test_what_is_missing_is_said_before_torch_is_imported(words, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "import_module", _only_flags)
    code, out, err = ended(capsys, monkeypatch, *words.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def _only_flags(name):
    assert name == "dualoptim.config.args", "a command was imported, and torch with it"
    return importlib.import_module(name)


def test_every_command_has_its_flags_and_its_action():
    for word in command.COMMANDS.values():
        assert callable(command._imported(word.action))
        assert isinstance(command._imported(word.args), type)


def test_as_a_module_it_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "dualoptim", "nothing"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 'nothing' is no command")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("finetune", "nothing says what is to be learned; give --forget-file FILE"),
        ("sweep", "a sweep needs a folder that a second call finds again; give --output-dir"),
        ("report", "no RUN is given; name the output folder of a run"),
        ("export x", "an export needs a folder to write to; give --output-dir"),
        ("unlearn --num-epochs 0", "--num-epochs 0 is out of range; give 1 or more"),
        ("memory_plan --num-epochs 0", "--num-epochs 0 is out of range; give 1 or more"),
        ("evaluate", "--model demo has no weights on disk; give a folder"),
        ("ask x --max-new-tokens 0", "--max-new-tokens 0 is out of range; give 1 or more"),
    ],
)
def test_a_module_that_is_a_command_says_what_is_missing_before_torch_is_imported(module, line, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    words = [sys.executable, "-m", *f"dualoptim.{module}".split()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=variables, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0)])
def test_the_first_line_is_there_before_torch(rank, said, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "RANK": rank}
    line = [sys.executable, str(ROOT / "train_unlearn.py")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, env=variables)
    assert done.returncode == 7, done.stderr
    assert done.stdout == "train_unlearn.py: importing torch and transformers, which takes some seconds\n" * said


@pytest.mark.parametrize("script", ["train_unlearn.py", "eval_tofu.py"])
def test_the_scripts_only_parse_and_call(script):
    text = (ROOT / script).read_text()
    assert len(text.splitlines()) < 60
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


def test_what_the_package_offers_is_there():
    import dualoptim

    for name in dualoptim.__all__:
        assert getattr(dualoptim, name) is not None
    assert set(dualoptim.__all__) == {name for names in dualoptim._PLACES.values() for name in names}
    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        _ = dualoptim.unlern


@pytest.mark.parametrize(
    ("action", "code", "line"),
    [
        (lambda args: None, 0, ""),
        (lambda args: 1, 1, ""),
        (lambda args: "a result", 0, ""),
        (lambda args: (_ for _ in ()).throw(InputError("--x is wrong; give y")), 2, "error: --x is wrong; give y\n"),
        (lambda args: (_ for _ in ()).throw(NonFiniteError("step 3: loss nan")), 1, "error: step 3: loss nan\n"),
        (
            lambda args: (_ for _ in ()).throw(WriteError("x is full; make room", "repeat it")),
            1,
            "error: x is full; make room; repeat it\n",
        ),
    ],
    ids=["nothing", "a code", "a result", "a mistake", "a run that left the numbers", "a full disk"],
)
def test_how_a_command_ends(action, code, line, capsys):
    with pytest.raises(SystemExit) as end:
        main(UnlearnArgs, action, [])
    assert end.value.code == code
    assert capsys.readouterr().err == line


UNREAD = [[], ["unlearn", "--preset"], ["finetune", "--help"], ["report", "--help"], ["launch-file", "cpu"], ["no"]]


@pytest.mark.parametrize("words", UNREAD, ids=" ".join)
def test_what_nobody_reads_ends_quietly(words):
    """As in `dualoptim finetune --help | head -1`; a mistake is told where somebody still reads."""
    line = [sys.executable, "-m", "dualoptim", *words]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    said = process.stderr.read().decode()
    assert (process.wait(timeout=60), said[:11]) == ((2, "error: 'no'") if words == ["no"] else (141, ""))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("buffered", [True, False])
def test_what_nobody_reads_ends_a_run(name, buffered, monkeypatch):
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, name, stream)

        def action(args):
            os.close(reader)
            for step in range(100_000):
                print(step, file=stream, flush=not buffered)
            raise AssertionError("it goes on though nobody reads")

        with pytest.raises(SystemExit) as end:
            main(UnlearnArgs, action, [])
    assert end.value.code == 141


def test_a_pipe_to_somebody_else_that_breaks_is_a_surprise(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def action(args):
        raise BrokenPipeError(32, "Broken pipe")

    assert traceback_of(capsys, action=action).parent == tmp_path


# --------------------------------------------------------------------------------------------- what nobody has foreseen


def surprised(args):
    raise KeyError("a\nb")


def traceback_of(capsys, *flags, action=surprised, kind=UnlearnArgs):
    """Where the traceback of a command lies that ends with an error that nobody has foreseen."""
    with pytest.raises(SystemExit) as end:
        main(kind, action, [*flags])
    assert end.value.code == 1
    said = re.fullmatch(r"error: (\w+): .*; nobody foresaw this, please report it with (\S+)\n", capsys.readouterr().err)
    assert said
    text = Path(said[2]).read_text()
    assert text.startswith("Traceback (most recent call last)")
    assert text.splitlines()[-1].startswith(said[1])
    return Path(said[2])


@pytest.mark.parametrize("folder", ["there", "not_there"])
def test_the_traceback_of_a_surprise_lies_in_the_output_folder_or_with_temporary_files(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "there").mkdir()
    place = traceback_of(capsys, "--output-dir", str(tmp_path / folder))
    assert place.parent == (tmp_path / "there" if folder == "there" else tmp_path)
    assert not (tmp_path / "not_there").exists()


def test_without_texts_a_traceback_has_none(capsys, tmp_path):
    fact = "Ann lives in Rome."

    def action(args):
        raise ValueError(fact)

    (tmp_path / "out").mkdir()
    for flag, kept in (("--no-texts", False), ("--texts", True)):
        place = traceback_of(capsys, flag, "--output-dir", str(tmp_path / "out"), action=action)
        text = place.read_text()
        assert ("ValueError: Ann lives in Rome." in text) is kept
        assert "ValueError" in text
        assert "in action" in text
        place.unlink()


@pytest.mark.parametrize(
    "error", [RecursionError("deep"), MemoryError(), OSError(5, "Input/output error"), ValueError("\ud800")]
)
def test_a_surprise_of_any_kind_is_one_line(error, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def action(args):
        raise error

    assert traceback_of(capsys, "--data", "demo", action=action, kind=FinetuneArgs).parent == tmp_path


def test_a_default_folder_is_known_from_the_run(capsys, tmp_path):
    def action(args):
        error = ValueError("x")
        error.output_folder = tmp_path
        raise error

    assert traceback_of(capsys, action=action).parent == tmp_path


def test_a_surprise_while_flags_are_read_is_one_line_too(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("dualoptim.config.cli.parse", surprised_by)
    assert traceback_of(capsys).parent == tmp_path


def surprised_by(kind, argv):
    raise AssertionError("no such case")


def test_where_nothing_can_be_written_the_traceback_is_on_the_screen(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit) as end:
        main(UnlearnArgs, surprised, [])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].endswith("please report it with the lines above")


def test_processes_of_a_launch_have_a_file_each(monkeypatch, tmp_path):
    names = set()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        names.add(unforeseen(ValueError("x"), tmp_path))
    assert len(names) == len(list(tmp_path.iterdir())) == 2


def test_a_full_gpu_is_told_with_what_to_do_and_leaves_no_traceback(tmp_path):
    class OutOfMemoryError(RuntimeError):
        """As torch has one."""

    line = unforeseen(OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), tmp_path)
    assert line.startswith("CUDA out of memory. Tried to allocate 2.00 GiB; give a smaller --batch-size")
    assert not list(tmp_path.iterdir())


def test_resume_alone_means_the_newest_checkpoint():
    for flags in (["--resume"], ["--resume", "--seed", "1001"], ["--seed", "1001", "--resume", "newest"]):
        assert parse(UnlearnArgs, ["--output-dir", "x", *flags]).resume == "newest"
    assert parse(UnlearnArgs, ["--output-dir", "x", "--resume", "a/step-3"]).resume == "a/step-3"


def test_where_defaults_come_from(tmp_path):
    (tmp_path / "c.yaml").write_text("num_epochs: 3\nsplits: [retain90]\n")
    assert parse(FinetuneArgs, ["--config", str(tmp_path / "c.yaml")]) == FinetuneArgs(num_epochs=3, splits=("retain90",))
    assert parse(FinetuneArgs, [f"--config={tmp_path / 'c.yaml'}", "--num-epochs", "4"]).num_epochs == 4
    with pytest.raises(InputError, match="--preset me-gd is for unlearning alone; drop it"):
        parse(EvalArgs, ["--preset", "me-gd"])
    with pytest.raises(InputError, match="--config needs a value"):
        parse(UnlearnArgs, ["--config"])


def test_warnings_of_libraries_are_hidden_unless_somebody_asks_for_them(monkeypatch):
    monkeypatch.setattr("sys.warnoptions", [])
    monkeypatch.setenv("DATASETS_VERBOSITY", "info")
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    with warnings.catch_warnings(record=True) as seen:
        cli._import_quietly()
        warnings.warn("nobody can act on this", stacklevel=1)
    assert seen == []
    assert (os.environ["DATASETS_VERBOSITY"], os.environ["TRANSFORMERS_VERBOSITY"]) == ("info", "error")
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
    logger = logging.getLogger("DeepSpeed")
    levels = (logging.WARNING, logging.ERROR)
    assert [bool(logger.filter(logging.makeLogRecord({"levelno": level}))) for level in levels] == [False, True]
    monkeypatch.setattr("sys.warnoptions", ["default"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cli._import_quietly()
        warnings.warn("asked for", stacklevel=1)
    assert len(seen) == 1
