"""The house: which room imports which, how large a file may be, and that what the READMEs say can be done."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dualoptim.__main__ import COMMANDS, _launch_files
from dualoptim.data.declaration import benchmarks

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dualoptim"
ROOMS = ("method", "config", "data", "models", "evaluation", "reporting")
FLOORS = (("errors", "atomic", "signals", "__init__"), *((room,) for room in ROOMS))  # the commands stand above all of them
EVENING = ("dual", "objectives", "schedule", "scores", "loop", "engine")
PYTHON = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it, but for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    known = {module_of(path) for path in PYTHON}
    return {name for name in found if name in known and name != "dualoptim"}


def floor_of(module: str) -> int:
    room = module.split(".")[1] if "." in module else "__init__"
    return next((n for n, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS))


@pytest.mark.parametrize("path", PYTHON, ids=module_of)
def test_a_room_imports_only_rooms_above_it(path):
    module = module_of(path)
    for other in imports_of(path):
        assert floor_of(other) <= floor_of(module), f"{module} imports {other}"
        if module.startswith("dualoptim.method"):
            assert other.startswith("dualoptim.method") or other == "dualoptim.errors", f"{module} imports {other}"


def test_no_module_imports_in_a_circle():
    arrows = {module_of(path): imports_of(path) for path in PYTHON}
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in arrows[module] - {module}:
                walk(other, (*way, module))
            done.add(module)

    for module in arrows:
        walk(module, ())


def test_no_module_needs_what_only_some_systems_have():
    """Windows has no fcntl, and no such signals: what uses them asks whether they are there."""
    for path in PYTHON:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tried = {
            id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for one in node.body for inner in ast.walk(one)
        }
        for node in ast.walk(tree):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            assert id(node) in tried or not names & {"fcntl", "grp", "pwd", "resource", "termios"}, path
            missing = isinstance(node, ast.Attribute) and node.attr in ("SIGHUP", "SIGUSR1", "SIGKILL", "fork", "getuid")
            assert not missing, f"{path}:{node.lineno}"


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_needs_a_second_sitting():
    for path in [*PYTHON, *ROOT.glob("*.py")]:
        assert lines_of(path) <= 300 or module_of(path) == "dualoptim.config.args", path
    assert sum(lines_of(PACKAGE / "method" / f"{name}.py") for name in EVENING) <= 900
    assert lines_of(ROOT / "README.md") <= 200
    assert lines_of(ROOT / "CONTRIBUTING.md") <= 80


def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]


def parameters(function: ast.FunctionDef) -> int:
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(argument.arg not in ("self", "cls", "ctx") for argument in every)


def test_a_step_is_seen_on_one_screen_and_functions_take_few_parameters():
    (step,) = [function for function in functions_of(PACKAGE / "method" / "loop.py") if function.name == "take_step"]
    assert step.end_lineno - step.lineno + 1 <= 40
    functions = [(path, function) for path in PYTHON for function in functions_of(path)]
    few = [parameters(function) <= 4 for _, function in functions]
    assert sum(few) >= 0.95 * len(few)
    for path, function in functions:
        constructor = function.name == "__init__" and "optim.Optimizer" in path.read_text(encoding="utf-8")
        assert parameters(function) <= 7 or constructor or path.name in ("adamw.py", "plus.py"), (path, function.name)


def test_tests_mirror_the_package():
    for room in ROOMS:
        modules = {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"}
        for path in (ROOT / "tests" / room).glob("test_*.py"):
            name = path.stem.removeprefix("test_")
            others = ("readme", "mistakes", "tokenizers", *benchmarks())
            assert name in modules or name in others, f"{path} tests no module of {room}"


# ------------------------------------------------------------------------------------------------------- what is installed


def test_every_folder_is_a_package_and_every_command_is_there():
    (listed,) = re.findall(r"^packages = \[\n(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.S | re.M)
    folders = {"dualoptim", *(f"dualoptim.{room}" for room in ROOMS), "dualoptim.launch_files"}
    assert set(re.findall(r'"(.*?)"', listed)) == folders
    assert set(COMMANDS) == {"unlearn", "eval", "finetune", "sweep", "ask", "report", "export", "plan"}
    assert set(_launch_files()) == {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    for text in (path.read_text(encoding="utf-8") for path in PYTHON):
        assert "'dualoptim[" not in text, "the package is on no index: name the package that is missing"


@pytest.mark.launch
def test_the_wheel_holds_what_the_package_needs(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in PYTHON:
        assert str(path.relative_to(ROOT)) in names
    for name in (
        "py.typed",
        "data/demo.json",
        "data/refusals.txt",
        "data/questions.txt",
        "data/benchmarks/lume.yaml",
        "reporting/page.html",
        "launch_files/zero3.yaml",
    ):
        assert f"dualoptim/{name}" in names
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", tmp_path / "site", wheel], check=True
    )
    code = "import dualoptim, dualoptim.__main__ as m; print(dualoptim.__file__, *m._launch_files().values())"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True
    )
    assert where.stdout.count(str(tmp_path / "site")) == 1 + len(list((ROOT / "accelerate_configs").glob("*.yaml")))
