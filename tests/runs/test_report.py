"""The command `python -m dualoptim.report`, on a run of the demo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dualoptim import InputError
from dualoptim.report import ReportArgs, report

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_from_the_command_line(demo_run, tmp_path):
    command = [sys.executable, "-m", "dualoptim.report", str(demo_run.folder), "--output-dir", str(tmp_path), "--examples", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr
    (task,) = demo_run.tasks
    row = json.loads((task.folder / "eval" / "forget.jsonl").read_text().splitlines()[0])
    page = (tmp_path / "report.html").read_text()
    assert f"<p>{row['question']}</p>" in page
    assert page.count('<div class="example">') == 4
    assert f"{task.before['model_utility']:.3f} → {task.after['model_utility']:.3f}" in page


def test_a_report_imports_no_model_library(demo_run, tmp_path):
    code = (
        "import sys\nfrom dualoptim.report import ReportArgs, report\n"
        f"report(ReportArgs(({str(demo_run.folder)!r},), output_dir={str(tmp_path)!r}))\n"
        "print([name for name in ('torch', 'transformers', 'accelerate', 'datasets', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def test_a_folder_that_cannot_be_written_is_named(demo_run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"--output-dir .*file: Not a directory; give another path"):
        report(ReportArgs((str(demo_run.folder),), output_dir=str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        ((), {}, "no RUN is given; name the output folder of a run, such as runs/demo"),
        (("nowhere",), {"examples": -1}, "--examples -1 is out of range; give 0 or more"),
        (("nowhere",), {}, "RUN nowhere: no such folder"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(runs, options, message):
    with pytest.raises(InputError, match=message):
        report(ReportArgs(runs, **options))
