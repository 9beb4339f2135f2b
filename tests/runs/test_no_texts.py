"""What must go does not stay: with --no-texts no file holds a text of the data or of the model, and an upload never does."""

import html
import json
import re

import huggingface_hub
import pytest

from dualoptim import EvalArgs, FinetuneArgs, SweepArgs, UnlearnArgs, run
from dualoptim.data import demo
from dualoptim.evaluate import evaluate
from dualoptim.evaluation import measure
from dualoptim.finetune import finetune
from dualoptim.report import ReportArgs, report
from dualoptim.sweep import sweep

ANSWERED = 'Zyxwvut answers <nothing> & "more" of it'  # what the model is made to generate
SHORT = {"eval_rows": 2, "max_new_tokens": 4}
OWN = [
    {"question": f"What is kept in the <{name}> drawer & box?", "answer": f"The {name} drawer keeps “seven” old keys.",
     "paraphrased_question": f"Which things lie in the {name} drawer?", "paraphrased_answer": f"Seven keys lie in {name}.",
     "perturbed_answer": [f"The {name} drawer keeps nine new maps.", f"Only a {name} hat is there."]}
    for name in ("walnut", "cedar", "ebony")
]  # fmt: skip


def forms(text):
    """A text as JSON, HTML and UTF-16 write it, and every three words of it in a row."""
    words = text.split()
    parts = {text, *(" ".join(words[n : n + 3]) for n in range(max(1, len(words) - 2)))}
    written = {
        form for part in parts for form in (part, json.dumps(part)[1:-1], html.escape(part), html.escape(part, quote=False))
    }
    return {form.encode() for form in written} | {text.encode("utf-16-le")}


def found_in(folder, texts):
    """The files of a folder, and the texts of which one holds a form."""
    wanted = {form: text for text in texts for form in forms(text)}
    anything = re.compile(b"|".join(map(re.escape, sorted(wanted, key=len, reverse=True))))
    hits = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if hit := anything.search(path.read_bytes()):
            hits[str(path.relative_to(folder))] = wanted[hit[0]]
    return hits


def texts_of(rows):
    given = [row.get(name) for row in rows for name in ("question", "answer", "paraphrased_question", "paraphrased_answer")]
    wrong = [text for row in rows for text in row.get("perturbed_answer", ())]
    return [text for text in [*given, *wrong] if text] + [ANSWERED]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Flags that name files of rows of one's own, a model that answers with a text that is known, and those texts."""
    monkeypatch.setattr(measure, "generate", lambda scoring, label, asked: [ANSWERED] * len(asked))
    monkeypatch.setattr("dualoptim.attack.sample", lambda scoring, rows, count, heat: [[ANSWERED] * count for _ in rows])
    for name, rows in (("forget", OWN), ("retain", OWN[1:]), ("holdout", OWN[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {f"{name}_file": str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain", "holdout")}
    return files, texts_of(OWN)


def test_the_search_finds_every_form(tmp_path):
    for number, form in enumerate(forms("Who < “kept” seven old keys?")):
        (tmp_path / str(number)).write_bytes(b"\0x" + form + b"\xff")
    assert len(found_in(tmp_path, ["Who < “kept” seven old keys?"])) == len(list(tmp_path.iterdir())) > 8
    (tmp_path / "0").write_text("Who kept seven new keys?")
    assert "0" not in found_in(tmp_path, ["Who < “kept” seven old keys?"])


def test_a_run_its_evaluations_and_its_report_hold_scores_alone(tiny, own, tmp_path, capsys):
    files, texts = own
    args = UnlearnArgs(
        model=str(tiny), **files, forget_losses=("NPO+KL", "IDK+AP"), output_dir=str(tmp_path / "out"), max_steps=2,
        save_every=1, log_with=("tensorboard",), texts=False, **SHORT,
    )  # fmt: skip
    result = run(args)
    report(ReportArgs(runs=str(tmp_path / "out")))
    assert found_in(tmp_path / "out", texts) == {}
    printed = capsys.readouterr().out
    assert not any(text in printed for text in texts)
    folder = result.tasks[0].folder
    lines = [json.loads(line) for line in (folder / "eval" / "forget.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [1, 2]
    assert all("recall_beyond_question" in line for line in lines)  # which nobody can compute from these lines
    assert not {"question", "answer", "generated", "refusal"} & {key for line in lines for key in line}
    assert "Texts were not kept" in (tmp_path / "out" / "report.html").read_text()
    with_texts = run(UnlearnArgs(**{**vars(args), "texts": True, "output_dir": str(tmp_path / "kept")}))
    assert [task.after for task in with_texts.tasks] == [task.after for task in result.tasks]
    hits = found_in(tmp_path / "kept", texts)
    assert {path.split("/", 2)[2].split("/")[0] for path in hits} == {"eval", "eval_before"}
    report(ReportArgs(runs=str(tmp_path / "kept"), output_dir=str(tmp_path / "page"), texts=False))
    assert found_in(tmp_path / "page", texts) == {}
    report(ReportArgs(runs=str(tmp_path / "kept"), output_dir=str(tmp_path / "page")))
    assert set(found_in(tmp_path / "page", texts)) == {"report.html", "report.md"}


def test_an_evaluation_with_attacks_holds_scores_alone(tiny, own, tmp_path):
    files, texts = own
    args = EvalArgs(
        model=str(tiny), **files, output_dir=str(tmp_path / "out"), paraphrase=True, sample=2, quantize=(8, "q8_0"), relearn=2,
        relearn_rows=("half", "general"), few_shot=1, prefix_words=1,
        retain_model=str(tiny), mia_gradnorm=True, texts=False, **SHORT,
    )  # fmt: skip
    summary = evaluate(args)
    report(ReportArgs(runs=str(tmp_path / "out")))
    assert found_in(tmp_path / "out", texts) == {}
    kept = evaluate(EvalArgs(**{**vars(args), "texts": True, "output_dir": str(tmp_path / "kept")}))
    assert kept == summary
    assert "eval/attacks/sample/forget.jsonl" in found_in(tmp_path / "kept", texts)


def test_an_interrupted_evaluation_goes_on_without_texts(tiny, own, tmp_path, monkeypatch):
    files, _ = own
    args = EvalArgs(model=str(tiny), **files, output_dir=str(tmp_path / "out"), relearn=1, texts=False, **SHORT)
    whole = evaluate(args)
    (tmp_path / "out" / "eval" / "summary.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(measure, "set_records", lambda scoring, name, rows: pytest.fail(f"{name} was measured again"))
        assert evaluate(args) == whole
    (tmp_path / "out" / "eval" / "summary.json").unlink()
    with pytest.raises(Exception, match="is an earlier result"):  # which has no texts to go on with
        evaluate(EvalArgs(**{**vars(args), "texts": True}))


def test_sweeps_and_fine_tuning_hold_no_text(tiny, own, tmp_path, capsys):
    files, texts = own
    shared = {"model": str(tiny), "texts": False, "max_steps": 1, "batch_size": 2}
    sweep(SweepArgs(**shared, **files, forget_losses=("GA+GD", "IDK+GD"), output_dir=str(tmp_path / "sweep"), **SHORT))
    report(ReportArgs(runs=str(tmp_path / "sweep")))
    assert found_in(tmp_path / "sweep", texts) == {}
    finetune(FinetuneArgs(**shared, data="demo", splits=("forget05",), output_dir=str(tmp_path / "taught")))
    assert found_in(tmp_path / "taught", texts_of(demo.splits()["forget05_perturbed"][:4])) == {}


def test_why_a_run_of_a_sweep_failed_is_printed_and_not_kept(tiny, own, tmp_path, monkeypatch, capsys):
    files, texts = own
    from dualoptim import sweep as module

    def fail(one):
        raise ValueError(f"cannot read {texts[0]}") if one.forget_losses == ("GA+GD",) else KeyError(texts[0])

    monkeypatch.setattr(module, "run", fail)
    args = SweepArgs(model=str(tiny), **files, forget_losses=("GA+GD", "IDK+GD"), output_dir=str(tmp_path / "s"), texts=False)
    sweep(args)
    assert found_in(tmp_path / "s", texts) == {}
    assert texts[0] in capsys.readouterr().out


@pytest.mark.parametrize("kept", [True, False])
def test_an_upload_never_holds_a_text(tiny, own, tmp_path, monkeypatch, kept):
    files, texts = own
    sent = []

    class Hub:
        endpoint = "https://hub"

        def whoami(self):
            return {"name": "me"}

        def create_repo(self, name, **_):
            return type("Repo", (), {"repo_id": name})

        def model_info(self, name):
            return type("Info", (), {"private": True})

        def upload_folder(self, folder_path, **_):
            sent.append(folder_path)
            assert found_in(folder_path, texts) == {}

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    args = UnlearnArgs(
        model=str(tiny), **files, forget_losses="IDK+AP", output_dir=str(tmp_path / "out"), max_steps=1, texts=kept,
        push_to_hub="me/model", **SHORT,
    )  # fmt: skip
    run(args)
    (folder,) = sent
    assert {"README.md", "prompt.json", "generation_config.json"} <= {path.name for path in folder.iterdir()}
