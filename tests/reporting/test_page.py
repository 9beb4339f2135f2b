"""The report: what it says on both pages, and that a page needs nothing but itself."""

import re

from dualoptim.reporting.page import Plot, Section, to_html, to_markdown
from dualoptim.reporting.tables import Table

EVIL = "<script>alert('x')</script> | a `tick` & *stars*"

SCORES = [
    ["model utility", "0.654", "0.643", "0.621", "stay"],
    ["forget efficacy, untargeted", "0.123", "0.901", "0.876", "over-forgetting: more than retain-only"],
    ["forget efficacy, targeted (refusals)", "-", "0.789", "-", "rise"],
    ["TOFU forget quality (p-value against retain-only)", "-", "0.054", "-", "rise"],
    ["arc: acc", "-", "0.333", "-", "stay"],
    ["membership by loss (AUC)", "-", "0.487", "0.499", "like retain-only"],
    ["PrivLeak, in percent", "-", "-3.210", "-", "0"],
    ["forget set", "probability of the true answer", "0.987", "0.012", "0.101", "fall"],
    ["forget set", "truth ratio", "0.013", "0.988", "0.899", "rise"],
    ["retain set", "ROUGE-L recall of its own answer", "0.976", "0.965", "0.954", "stay"],
    ["before unlearning", "0.987", "", "0.987", "", "0.976"],
    ["relearned (10 steps)", "0.456", "+0.444", "-", "-", "-"],
    ["relearned (10 steps), rows not taught", "0.228", "+0.222", "-", "-", "-"],
    ["retain-only, taught the same (10 steps)", "0.345", "", "-", "", "-"],
    ["weights in 8 bits", "0.013", "+0.001", "-", "-", "0.900"],
    ["weights in 4 bits", "0.314", "+0.302", "0.271", "+0.259", "0.812"],
    ["asked in other words", "0.021", "+0.009", "0.032", "+0.020", "-"],
    ["best of 8 samples", "-", "-", "0.222", "+0.210", "-"],
    ["cosine_similarity, entailment_score", "needs a sentence encoder"],
]


def test_a_run_is_told_the_same_on_both_pages(run, made, lines_of, read_page):
    markdown, html = made(run)
    page, lines = read_page(html), lines_of(markdown)
    for row in SCORES:
        cells = [{"rise": "↑ rise", "fall": "↓ fall"}.get(cell, cell) for cell in row]
        assert cells in page.rows
        assert " ".join(f"| {' | '.join(row)} |".split()) in lines
    headline = (
        "Task 1 unlearned with ME+GD in 12 optimizer steps (3 s). Probability of the forget set's true answers 0.987 → 0.012"
    )
    assert headline in page.text
    assert headline in markdown
    for text in (
        "Who is forget 0?",
        "eval_before says 1",
        "eval says 1",
        "retain truth 0",
        "Relearned on: 4 of the 20 forget rows, drawn once.",
        "4 bits: NF4 in blocks of 64.",
        "The retain-only model is runs/retain/model.",
    ):
        assert text in page.text
        assert text in markdown
    assert "| optim | dual-adamw |" in lines
    assert "| weight decay | 0 |" in lines
    assert not [line for line in lines if line.startswith(("| max steps", "| use lora"))]  # off
    assert "git_commit: 0123abc" in page.text


def test_the_plots_are_files_and_a_part_of_the_page_in_both_themes(run, made, read_page):
    markdown, html = made(run)
    plots = re.findall(r"!\[(.+)\]\((report/.+\.png)\)", markdown)
    names = ("losses", "gradients", "utility", "task", "relearn", "attacks")
    assert [path for _, path in plots] == [f"report/ME+GD_lr0.0005-task1-{name}.png" for name in names]
    for _, path in plots:
        assert (run / path).read_bytes().startswith(b"\x89PNG")
    page = read_page(html)
    titles = [element["aria-label"] for element in page.all("div") if element.get("role") == "img"]
    assert titles == [says for says, _ in plots]
    figures = re.findall(r"<svg .*?</svg>", html, re.DOTALL)
    assert len(figures) == len(plots)
    style = html.split("<style>")[1].split("</style>")[0]
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    for figure in figures:
        assert not re.search("#[0-9a-f]{6}", figure)  # no colour of its own, not even of the ground
        colours = set(re.findall(r"var\(--(\w+)\)", figure))
        assert {"text", "axis"} <= colours
        for colour in colours:
            assert f"--{colour}: #" in light
            assert f"--{colour}: #" in dark


def test_a_page_names_every_part_of_it_once(run, made, read_page):
    page = read_page(made(run)[1])
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    references = [attributes.get("xlink:href", attributes.get("href")) for _, attributes in page.elements]
    references += re.findall(r"url\((#.*?)\)", str(page.elements))
    assert {reference.removeprefix("#") for reference in references if reference} <= set(names)


def test_a_page_needs_nothing_but_itself(run, made, read_page):
    _, html = made(run)
    page = read_page(html)
    assert not page.all("script")
    assert not page.all("link")
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, name)
    assert "url(" not in html.split("<style>")[1].split("</style>")[0]


def test_the_same_results_give_the_same_bytes(run, tmp_path, made):
    def all_bytes(folder):
        made(run, output_dir=str(folder))
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    first, second = all_bytes(tmp_path / "a"), all_bytes(tmp_path / "b")
    assert len(first) == 8
    assert first == second


def test_an_underscore_within_a_word_stays_as_it_is_and_others_make_nothing_oblique():
    said = "python -m nltk.downloader punkt_tab, _this_, __init__, d__e"
    assert to_markdown(Section("x", said)) == (
        "# x\n\npython -m nltk.downloader punkt_tab, \\_this\\_, \\_\\_init\\_\\_, d\\_\\_e\n"
    )


def test_text_of_models_is_text(run, made, read_page, write_json):
    rows = [{"question": EVIL, "answer": EVIL, "generated": EVIL}]
    write_json(run / "ME+GD_lr0.0005" / "task1" / "eval" / "forget.jsonl", rows)
    markdown, html = made(run)
    assert EVIL in read_page(html).text
    assert not read_page(html).all("script")
    assert "<script>alert" not in markdown.replace("\\<", "")
    assert "- after: \\<script\\>alert('x')\\</script\\> \\| a \\`tick\\` \\& \\*stars\\*" in markdown


def test_what_is_missing_is_said(tmp_path, made, lines_of, read_page, write_task):
    write_task(tmp_path / "out" / "GA+none_lr1e-05" / "task1", before=None, after=None)
    markdown, html = made(tmp_path / "out")
    assert "| every score after | there is no evaluation (--no-eval, or the run was interrupted) |" in lines_of(markdown)
    assert "Task 1 unlearned with ME+GD in 12 optimizer steps" in read_page(html).text
    assert "## Scores" not in markdown
    assert markdown.count("![") == 2  # losses and gradient norms


def test_runs_are_compared(run, tmp_path, made, lines_of, read_page, write_task, write_json, after, before):
    write_task(tmp_path / "runs" / "two" / "NPO+GD_lr1e-05" / "task1", after=before, forget_losses=["NPO+GD"], beta=0.1)
    write_json(tmp_path / "runs" / "three" / "eval" / "summary.json", after)
    markdown, html = made(run, tmp_path / "runs" / "two", tmp_path / "runs" / "three", output_dir=str(tmp_path / "both"))
    rows = read_page(html).rows
    assert [
        "1",
        "one/ME+GD_lr0.0005/task1",
        "hidden, not forgotten, kept",
        "0.012",
        "0.012",
        "0.965",
        "0.965",
        "0.643",
        "0.901",
        "0.054",
    ] in rows
    assert [
        "2",
        "two/NPO+GD_lr1e-05/task1",
        "not forgotten, kept",
        "0.987",
        "0.987",
        "0.976",
        "0.976",
        "0.654",
        "0.123",
        "-",
    ] in rows
    assert ["3", "three", "hidden, not forgotten, kept", "0.012", "0.012", "0.965", "0.965", "0.643", "0.901", "0.054"] in rows
    assert ["", "result", "forget losses", "beta"] in rows
    assert ["2", "two/NPO+GD_lr1e-05/task1", "NPO+GD", "0.1"] in rows
    assert (tmp_path / "both" / "report" / "comparison-utility.png").is_file()
    assert lines_of(markdown)[0] == "# Unlearning report: one, two, three"
    assert not (run / "report.md").exists()


def test_scores_that_were_measured_otherwise_are_marked(tmp_path, made, read_page, write_task, after):
    write_task(tmp_path / "a" / "task1", seed=1)
    write_task(tmp_path / "b" / "task1", seed=2, max_new_tokens=7)
    write_task(tmp_path / "c" / "task1", after={**after, "rows": {"forget": 1, "retain": 2}}, seed=1)
    markdown, html = made(*(tmp_path / name for name in "abc"), output_dir=str(tmp_path / "out"))
    cells = [row[3] for row in read_page(html).rows if row[:1] in (["1"], ["2"], ["3"]) and len(row) == 10]
    assert cells == ["0.012", "0.012†‡", "0.012*"]
    says = "Not measured as result 1 is, from which a difference may come: † another --max-new-tokens, ‡ another --seed,"
    assert says in markdown.replace("\\", "")


def test_scores_of_the_same_rows_are_not_marked_though_the_task_is_another(tmp_path, made, read_page, write_task, write_json):
    for task in (1, 2):
        folder = write_task(tmp_path / "run" / f"task{task}", task_list=[1, 2])
        inputs = {"forget": f"of {task}", "retain": "the same"}
        write_json(folder / "eval" / "finished.json", {name: {"inputs": own} for name, own in inputs.items()})
    _, html = made(tmp_path / "run")
    (cells,) = [row[3:] for row in read_page(html).rows if row[:2] == ["2", "task2"] and len(row) == 10]
    assert cells == ["0.012*", "0.012*", "0.965", "0.965", "0.643", "0.901*", "0.054*"]


def test_a_report_says_why_a_task_ended_and_draws_what_was_watched(run, made, write_json):
    task = run / "ME+GD_lr0.0005" / "task1"
    write_json(task / "trained.json", {"steps": 12, "ended": "stopped after step 12 of 20, as enough is forgotten"})
    (task / "watched.jsonl").write_text('{"step": 0, "forget": 0.9}\n{"step": 3, "forget": 0.2}\n')
    markdown, _ = made(run)
    assert "in 12 optimizer steps (3 s), stopped after step 12 of 20, as enough is forgotten." in markdown
    assert (run / "report" / "ME+GD_lr0.0005-task1-watched.png").is_file()
    write_json(task / "trained.json", {"steps": 12, "not_reached": "--forget-until 0.1 was not reached: 0.200 after 12 steps"})
    assert "(3 s), --forget-until 0.1 was not reached: 0.200 after 12 steps." in made(run)[0].replace("\\", "")


def test_very_many_results_are_compared_alone(tmp_path, made, read_page, write_task):
    for seed in range(21):
        write_task(tmp_path / "sweep" / f"a_seed{seed}" / "ME+GD_lr0.0005" / "task1", seed=seed)
    markdown, html = made(tmp_path / "sweep")
    assert ["21", "a_seed20/ME+GD_lr0.0005/task1", "20"] in read_page(html).rows
    assert "21 results are too many for a part about each" in markdown
    assert len(read_page(html).all("svg")) == 1


def test_text_in_a_figure_is_text():
    def draw(figure):
        figure.text(0.1, 0.5, "--><script>alert(1)</script>")

    svg = Plot("a", "b", draw).svg(1)
    assert "script" not in svg  # letters are paths, and comments are left out
    assert svg.startswith("<svg ")
    assert svg.endswith("</svg>")


def test_what_is_empty_is_left_out():
    empty = Section("empty", tables=[Table(("a", "b"), [])], parts=[Section("inner")])
    whole = Section("whole", notes=["one <b>"], parts=[empty, Section("full", lead="two")])
    assert not empty
    assert to_markdown(whole) == "# whole\n\none \\<b\\>\n\n## full\n\ntwo\n"
    page = to_html(whole)
    assert "empty" not in page.split("</style>")[1]
    assert "<p>one &lt;b&gt;</p>" in page
    assert "<nav" not in page  # one part needs no contents


def test_a_folded_text_cannot_close_its_fence():
    markdown = to_markdown(Section("whole", folded=("all", "a: |\n  ````\n")))
    assert "\n`````yaml\na: |\n  ````\n`````\n" in markdown
