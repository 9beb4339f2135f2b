"""The notebooks, whose cells run from top to bottom."""

import json
from pathlib import Path

import pytest


@pytest.mark.launch  # a minute: it teaches the demo's model
@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    assert names["own"].after["verdict"]["forgotten"] == "yes"
    assert names["own"].after["verdict"]["kept"] == "yes"
    assert (tmp_path / "runs" / "report" / "report.html").is_file()
    assert capsys.readouterr().out.count("Verdict: forgotten") >= 4  # of each run, and printed again
