"""`python -m dualoptim.report RUN [RUN ...]`: what runs did and how they compare, in Markdown, as PNGs and as one HTML page.

The page needs no network and no script, and shows light or dark as the reader's system does. Nothing in a report depends on
when or where it is made: the same results give the same bytes.
"""

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from dualoptim.reporting import plots
from dualoptim.reporting import tables
from dualoptim.config.args import check_range, main
from dualoptim.models.checkpoint import write_text
from dualoptim.errors import InputError

Row = tuple[str, ...]


@dataclass(frozen=True)
class ReportArgs:
    """Describe runs that are finished, or as far as they are: settings, scores before and after, plots, example answers.

    Several runs are compared as well. Writes report.md, report.html and the plots as report/*.png; an earlier report there is
    replaced.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Output folders of train_unlearn.py, of a sweep or of eval_tofu.py, or single task folders."""
    output_dir: str | None = None
    """Folder that the report is written to. Default: the first RUN."""
    examples: int = 3
    """Answers per evaluation set that are shown."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("no RUN is given; name the output folder of a run, such as runs/demo")
        check_range("--examples", self.examples, 0)


# ------------------------------------------------------------------------------------------------- what runs have left


@dataclass(frozen=True)
class State:
    """A task that was unlearned, or a model that was evaluated: everything its folder says, as far as it is there."""

    label: str
    folder: Path
    settings: dict[str, Any]
    task: int | None
    log: list[dict[str, Any]]
    before: dict[str, Any] | None
    after: dict[str, Any] | None


def find_states(run: Path, name: str = "") -> list[State]:
    """Every task and evaluation of a RUN, tasks in the order in which they were unlearned; `name` begins their labels.

    Raises:
        InputError: if there is none, or one of their files cannot be read.
    """
    if not run.is_dir():
        raise InputError(f"RUN {run}: no such folder; give the output folder of train_unlearn.py, a sweep or eval_tofu.py")
    folders = [run] if _is_task(run) else []
    folders = folders or [path for depth in ("", "*/", "*/*/") for path in run.glob(f"{depth}task*") if _is_task(path)]
    states = [_task_state(folder, run, name) for folder in folders]
    states.sort(key=lambda state: (_natural(str(state.folder.parent)), _position(state)))
    if run not in folders and (run / "eval" / "summary.json").is_file():
        states.append(
            State(
                name or run.resolve().name,
                run,
                _read_yaml(run / "eval" / "config.yaml"),
                None,
                [],
                None,
                _read_json(run / "eval" / "summary.json"),
            )
        )
    if not states:
        raise InputError(
            f"RUN {run}: no task<k>/ with config.yaml and log.jsonl in it, and no eval/summary.json; give the output folder of "
            "train_unlearn.py, a sweep or eval_tofu.py"
        )
    return states


def _is_task(folder: Path) -> bool:
    named = re.fullmatch(r"task\d+", folder.resolve().name)
    return bool(named) and (folder / "config.yaml").is_file() and (folder / "log.jsonl").is_file()


def _task_state(folder: Path, run: Path, name: str) -> State:
    whole = folder.resolve()
    label = "/".join(whole.relative_to(run.resolve()).parts) or f"{whole.parent.name}/{whole.name}"
    return State(
        f"{name}/{label}" if name and folder != run else name or label,
        folder,
        _read_yaml(folder / "config.yaml"),
        int(whole.name.removeprefix("task")),
        _read_json_lines(folder / "log.jsonl"),
        *(_read_json(folder / part / "summary.json") for part in ("eval_before", "eval")),
    )


def _position(state: State) -> int:
    order = state.settings.get("task_list") or []
    return order.index(state.task) if state.task in order else len(order)


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts task2 before task10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read_json(path: Path) -> dict[str, Any] | None:
    return _parse(path, path.read_text(encoding="utf-8")) if path.is_file() else None


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # generated texts hold other separators too
    return [_parse(f"{path}:{number}", line) for number, line in enumerate(lines, 1)]


def _parse(place: Path | str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON ({error.msg}); repeat that run, or restore the file") from None
    if not isinstance(value, dict):
        raise InputError(f"{place}: not a JSON object; repeat that run, or restore the file")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())}); restore the file") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no `name: value` lines; restore the file")
    return value


# ------------------------------------------------------------------------------------- a report as a list of its blocks


@dataclass(frozen=True)
class Heading:
    """A title; 1 is the report's own."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text, the header first; the first `left` columns are words, the others numbers.

    `pairs` of a name and a value need no table on a page, where they fill its width instead.
    """

    rows: Sequence[Row]
    left: int = 1
    pairs: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure: the name of its file, what it shows in one sentence (for those who do not see it), and how it is drawn."""

    name: str
    says: str
    draw: plots.Draw

    @cached_property
    def picture(self) -> plots.Picture:
        """The figure, drawn once."""
        return plots.render(self.draw)


@dataclass(frozen=True)
class Example:
    """A question and what was answered: pairs of who and what."""

    question: str
    answers: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Listing:
    """A text that is folded away under its title."""

    title: str
    text: str


Block = Heading | Text | Table | Plot | Example | Listing


def build(states: Sequence[State], title: str, examples: int) -> list[Block]:
    """The report on some states: how they compare, and then each of them."""
    blocks: list[Block] = [Heading(1, f"Unlearning report: {title}")]
    if len(states) > 1:
        blocks += _comparison(states)
    groups: dict[str, list[State]] = {}
    for state in states:
        groups.setdefault(str(state.folder.parent if state.task is not None else state.folder), []).append(state)
    for group in groups.values():
        if len(group) > 1 and all(state.before and state.after for state in group):
            name = group[0].label.rpartition("/")[0] or group[0].folder.resolve().parent.name
            blocks += [Heading(2, f"{name}, task by task"), *_tasks(name, group)]
        for state in group if len(states) <= _MANY else ():
            blocks += _state(state, examples)
    if len(states) > _MANY:
        text = f"{len(states)} results are too many for a part about each; name one of their folders as RUN for that."
        blocks.append(Text(text))
    return blocks


_MANY = 20  # results of which each gets its own part, of about half a megabyte


def _comparison(states: Sequence[State]) -> list[Block]:
    """All states side by side: their settings as far as they differ, their scores, and utility against forgetting."""
    columns = ("forget probability", "forget ROUGE-L", "retain probability", "retain ROUGE-L", "model utility")
    rows: list[Row] = [("", "result", *columns, "forget efficacy", "forget quality")]
    for number, state in enumerate(states, 1):
        summary = state.after or {}
        sets = summary.get("sets", {})
        values = [sets.get(name, {}).get(key) for name in ("forget", "retain") for key in ("probability", "rouge_l_recall")]
        values += [summary.get("model_utility"), summary.get("untargeted_forget_efficacy")]
        quality = tables.p_value(summary.get("tofu", {}).get("forget_quality"))
        rows.append((str(number), state.label, *map(tables.number, values), quality))
    blocks: list[Block] = [
        Heading(2, "Comparison"),
        Text("Scores after unlearning, or as evaluated. " + _AIMS),
        Table(rows, left=2),
    ]
    differing = [
        name
        for name in tables.SHOWN_SETTINGS
        if len({tables.shown_value(state.settings.get(name)) for state in states if state.settings}) > 1
    ]
    if differing:
        rows = [("", "result", *(name.replace("_", " ") for name in differing))]
        for number, state in enumerate(states, 1):
            rows.append((str(number), state.label, *(tables.shown_value(state.settings.get(name)) for name in differing)))
        blocks += [Heading(3, "Where their settings differ"), Table(rows, left=len(rows[0]))]
    return blocks + _utility_plot("comparison", states)


_AIMS = "Scores of the forget set should fall, those of the others stay; model utility should stay, forget efficacy rise."


def _utility_plot(name: str, states: Sequence[State]) -> list[Block]:
    paths = [_columns(state) for state in states]
    if not any(plots.utility_place(summary) for path in paths for summary in path.values()):
        return []
    says = "Model utility against forget efficacy, before and after unlearning"
    says += ": " + _list(f"{s.label} {_change(s, 'model_utility')}" for s in states) if len(states) == 1 else ""
    if len(states) > 1:
        says += "; the numbers are those of the table"
    return [Plot(f"{name}-utility", f"{says}.", plots.utility(paths))]


def _tasks(name: str, group: Sequence[State]) -> list[Block]:
    """A sequence of tasks: every task so far, measured after each."""
    lines = tables.sequence(group)
    rows = tables.sequence_rows(lines)
    says = "Probability of the true answers of every task so far, of the retain set, and model utility, after each task."
    return [Plot(f"{name}-tasks", says, plots.tasks(*tables.sequence_curves(lines))), Table(rows)]


def _state(state: State, examples: int) -> list[Block]:
    """Everything about one task or evaluated model."""
    blocks: list[Block] = [Heading(2, state.label), Text(_headline(state))]
    if state.settings:
        rows = tables.setting_rows(state.settings)
        blocks += [Heading(3, "Settings"), Table(rows, left=2, pairs=True)] if len(rows) > 1 else []
        everything = yaml.safe_dump(state.settings, sort_keys=False, allow_unicode=True)
        blocks.append(Listing("All settings and versions", everything))
    columns = _columns(state)
    if columns:
        blocks += [Heading(3, "Scores"), *_tables(tables.aggregate_rows(columns), tables.privacy_rows(columns))]
        blocks += [Table(rows, left=2)] if len(rows := tables.set_rows(columns)) > 1 else []
        if "retain_only" in (state.after or {}):
            blocks.append(Text(f"The retain-only model is {state.after['retain_only'].get('from', 'not named')}."))  # type: ignore[index]
    if state.task is not None:
        blocks += _step_plots(state)
    if state.after and state.after.get("attacks"):
        blocks += _attacks(state, state.after)
    blocks += _examples(state, examples)
    skipped = tables.skipped_rows(state.after or state.before or {})
    if state.task is not None:
        for part, there in (("before", state.before), ("after", state.after)):
            skipped += (
                [] if there else [(f"every score {part}", "there is no evaluation (--no-eval, or the run was interrupted)")]
            )
    if len(skipped) > 1:
        blocks += [Heading(3, "Skipped"), Table(skipped, left=2)]
    return blocks


def _columns(state: State) -> dict[str, Mapping[str, Any]]:
    """The summaries that there are, by title; a model that was evaluated alone has one of its own."""
    columns = tables.side_by_side(state.before, state.after)
    return {"score" if title == "after" and state.task is None else title: summary for title, summary in columns.items()}


def _tables(*tables_: Sequence[Row]) -> list[Block]:
    return [Table(rows) for rows in tables_ if len(rows) > 1]


def _headline(state: State) -> str:
    """What happened, in one or two sentences."""
    parts = []
    if state.task is not None:
        losses = tables.shown_value(state.settings.get("forget_losses"))
        seconds = sum(record.get("seconds", 0) for record in state.log)
        parts.append(f"Task {state.task} unlearned with {losses} in {len(state.log)} optimizer steps ({seconds:.0f} s).")
    moved = [
        f"{title} {change}"
        for title, path in (
            ("probability of the forget set's true answers", "sets.forget.probability"),
            ("of the retain set's", "sets.retain.probability"),
            ("model utility", "model_utility"),
        )
        if (change := _change(state, path))
    ]
    if moved:
        text = _list(moved)
        parts.append(f"{text[0].upper()}{text[1:]}.")
    return " ".join(parts) or "Nothing was measured."


def _change(state: State, path: str) -> str:
    """A score before and after, as `0.993 → 0.001`; empty where there is none."""
    values = []
    for summary in (state.before, state.after):
        value: Any = summary
        for key in path.split("."):
            value = (value or {}).get(key)
        values += [] if value is None else [tables.number(value)]
    return " → ".join(values)


def _list(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _step_plots(state: State) -> list[Block]:
    blocks: list[Block] = []
    if any("loss" in record for record in state.log):
        says = f"Forget and retain loss over the {len(state.log)} optimizer steps."
        blocks.append(Plot(f"{state.label}-losses", says, plots.losses(state.log)))
    if any(record.get("grad_norm") for record in state.log):
        says = "Gradient norm of every step before clipping, on a logarithmic axis."
        blocks.append(Plot(f"{state.label}-gradients", says, plots.gradient_norms(state.log)))
    blocks += _utility_plot(state.label, [state])
    if state.before and state.after:
        curves = tables.sequence_curves(tables.sequence([state]))
        says = "Probability of the true answers of the task and of the retain set, and model utility, before and after."
        blocks.append(Plot(f"{state.label}-task", says, plots.tasks(*curves)))
    return [Heading(3, "Plots"), *blocks] if blocks else []


def _attacks(state: State, after: Mapping[str, Any]) -> list[Block]:
    """What brings the forget set back, and how each attack was made."""
    found = after["attacks"]
    blocks: list[Block] = [Heading(3, "Attacks: what brings it back"), Table(tables.attack_rows(state.before, after))]
    notes = {"Relearned on": found.get("relearn", {}).get("what")}
    notes |= {f"{bits} bits": result.get("how") for bits, result in found.get("quantize", {}).items()}
    if "temperature" in found.get("sample", {}):
        notes["Samples"] = f"drawn at temperature {found['sample']['temperature']:g}; the best answer to each question counts"
    blocks += [Text(f"{what}: {how.rstrip('.')}.") for what, how in notes.items() if how]
    if found.get("relearn", {}).get("curve"):
        says = "Probability of the forget set's true answers while the model is fine-tuned on a part of them again."
        blocks.append(Plot(f"{state.label}-relearn", says, plots.relearning(state.before, found["relearn"])))
    says = "Probability and ROUGE-L recall of the forget set before and after unlearning and under every attack."
    return [*blocks, Plot(f"{state.label}-attacks", says, plots.attacks(tables.attacked_states(state.before, after)))]


def _examples(state: State, count: int) -> list[Block]:
    """The first answers of every set, before and after."""
    blocks: list[Block] = []
    for name in (state.after or state.before or {}).get("sets", {}) if count else ():
        found = {
            title: _read_json_lines(state.folder / part / f"{name}.jsonl")[:count]
            for title, part in (("before", "eval_before"), ("after" if state.task is not None else "answer", "eval"))
        }
        longest = max(found.values(), key=len)
        blocks += [Heading(4, tables.set_title(name).capitalize())] if longest else []
        for index, row in enumerate(longest):
            answers = [("truth", _clipped(row["answer"]))]
            answers += [(title, _clipped(rows[index]["generated"])) for title, rows in found.items() if index < len(rows)]
            blocks.append(Example(row["question"] or "(a passage, continued from its middle)", answers))
    return [Heading(3, "Example answers"), *blocks] if blocks else []


def _clipped(text: str, length: int = 280) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= length else f"{text[:length]} …"


# ------------------------------------------------------------------------------------------------------------ Markdown


def to_markdown(blocks: Sequence[Block]) -> str:
    """The report in Markdown, whose plots are the PNGs in report/."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_plain(block.text)}"
    if isinstance(block, Text):
        return _plain(block.text)
    if isinstance(block, Table):
        return tables.markdown_table([tuple(map(_plain, row)) for row in block.rows], block.left)
    if isinstance(block, Plot):
        return f"![{_plain(block.says)}](report/{_file(block.name)})"
    if isinstance(block, Example):
        return "\n".join([f"**{_plain(block.question)}**", "", *(f"- {who}: {_plain(what)}" for who, what in block.answers)])
    # a fence longer than any run of backticks within
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
    return f"<details><summary>{html.escape(block.title)}</summary>\n\n{fence}yaml\n{block.text}{fence}\n\n</details>"


def _plain(text: str) -> str:
    """Text in which nothing is Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#&~$])", r"\\\1", " ".join(text.split()))


def _file(name: str) -> str:
    """The name of a plot's PNG."""
    return re.sub(r"[^\w.+-]+", "-", name) + ".png"


# ---------------------------------------------------------------------------------------------------------------- HTML

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --quiet: #5b6470; --page: #ffffff; --panel: #f5f6f8; --line: #d9dde3;
  --forget: #c2410c; --retain: #1d6fa5; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6e8; --quiet: #a0a8b3; --page: #15171a; --panel: #1d2024;
  --line: #363b43; --forget: #fb923c; --retain: #5cb3ec; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem; background: var(--page);
  color: var(--text); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; padding-top: .8rem;
  border-top: 1px solid var(--line); } h3 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
h4 { font-size: .95rem; margin: 1.4rem 0 .4rem; color: var(--quiet); }
p { max-width: 46rem; } nav ul { padding-left: 1.2rem; columns: 18rem; } a { color: var(--retain); }
.table { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; white-space: normal; vertical-align: bottom; overflow-wrap: normal; }
.word { text-align: left; } td.long { white-space: normal; min-width: 16rem; }
.fall { color: var(--forget); } .rise { color: var(--retain); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem 2rem; }
figure { margin: 0; max-width: 36rem; } figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--quiet); font-size: .85rem; }
.example { background: var(--panel); border-radius: .4rem; padding: .7rem 1rem; margin: .6rem 0; }
.example p { margin: 0 0 .3rem; font-weight: 600; max-width: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: 0; } dt { color: var(--quiet); }
dd { margin: 0; } .pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: .3rem 2rem;
  font-size: .9rem; margin: .8rem 0; } .pairs div { display: flex; gap: .8rem; justify-content: space-between;
  border-bottom: 1px solid var(--line); padding: .2rem 0; } .pairs dt { flex: none; } .pairs dd { text-align: right; }
pre { overflow-x: auto; background: var(--panel); padding: 1rem; font-size: .85rem; white-space: pre; }
@media (max-width: 40rem) { th, td { padding-right: .6rem; } td.word { white-space: normal; overflow-wrap: normal; }
  td.long, td.phrase { min-width: 8.5rem; } table { font-size: .85rem; } }
summary { cursor: pointer; color: var(--quiet); }
"""


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The report as one page, with everything that it shows inside it."""
    anchors = {id(block): f"part-{number}" for number, block in enumerate(blocks) if isinstance(block, Heading)}
    body, plotted = [], False
    for block in blocks:
        if isinstance(block, Plot) != plotted:
            plotted = not plotted
            body.append('<div class="plots">' if plotted else "</div>")
        body.append(_html(block, anchors.get(id(block), "")))
        if isinstance(block, Heading) and block.level == 1:
            body.append(_contents(blocks, anchors))
    body += ["</div>"] if plotted else []
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Unlearning report: {html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _contents(blocks: Sequence[Block], anchors: Mapping[int, str]) -> str:
    """Links to the parts, if there are several."""
    parts = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    if len(parts) < 2:
        return ""
    links = "".join(f'<li><a href="#{anchors[id(part)]}">{html.escape(part.text)}</a></li>' for part in parts)
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def _html(block: Block, anchor: str) -> str:
    if isinstance(block, Heading):
        return f'<h{block.level} id="{anchor}">{html.escape(block.text)}</h{block.level}>'
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Plot):
        light, dark = (base64.b64encode(svg).decode() for svg in (block.picture.light, block.picture.dark))
        return (
            f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="data:image/svg+xml;base64,{dark}">'
            f'<img src="data:image/svg+xml;base64,{light}" alt="{html.escape(block.says)}" width="540" height="360"></picture>'
            f"<figcaption>{html.escape(block.says)}</figcaption></figure>"
        )
    if isinstance(block, Example):
        answers = "".join(f"<dt>{html.escape(who)}</dt><dd>{html.escape(what)}</dd>" for who, what in block.answers)
        return f'<div class="example"><p>{html.escape(block.question)}</p><dl>{answers}</dl></div>'
    return f"<details><summary>{html.escape(block.title)}</summary><pre>{html.escape(block.text)}</pre></details>"


def _html_table(table: Table) -> str:
    if table.pairs:
        pairs = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in table.rows[1:])
        return f'<dl class="pairs">{pairs}</dl>'
    lines = []
    for index, row in enumerate(table.rows):
        tag, cells = ("td", []) if index else ("th", [])
        for column, cell in enumerate(row):
            kinds = ["word"] if column < table.left else []
            kinds += ["long"] if index and len(cell) > 40 else ["phrase"] if len(cell) > 16 else []
            kinds += [cell] if index and cell in ("fall", "rise") else []
            shown = {"fall": "↓ fall", "rise": "↑ rise"}.get(cell, cell) if index else cell
            name = f' class="{" ".join(kinds)}"' if kinds else ""
            cells.append(f"<{tag}{name}>{html.escape(shown)}</{tag}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head, *rest = lines
    inside = f"<table><thead>{head}</thead><tbody>{''.join(rest)}</tbody></table>"
    return f'<div class="table" tabindex="0">{inside}</div>'


# ------------------------------------------------------------------------------------------------------------- command


def report(args: ReportArgs) -> Path:
    """Write report.md, report.html and report/*.png, and return the folder.

    Raises:
        InputError: if a RUN holds nothing to report on or cannot be read, or the folder cannot be written.
    """
    runs = list({path.resolve(): path for path in (Path(run).expanduser() for run in args.runs)}.values())
    names = [run.resolve().name for run in runs]
    names = [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
    states = [state for run, name in zip(runs, names, strict=True) for state in find_states(run, name if len(runs) > 1 else "")]
    title = ", ".join(names)
    blocks = build(states, title, args.examples)
    folder = Path(args.output_dir).expanduser() if args.output_dir else runs[0]
    page = to_html(blocks, title)
    pictures = [block for block in blocks if isinstance(block, Plot)]
    try:
        write_text(folder / "report.md", to_markdown(blocks))
        write_text(folder / "report.html", page)
        for block in pictures:
            (folder / "report").mkdir(exist_ok=True)
            (folder / "report" / _file(block.name)).write_bytes(block.picture.png)
    except OSError as error:
        raise InputError(f"--output-dir: {error.filename} cannot be written ({error.strerror}); give another folder") from None
    print(f"{len(states)} results, {len(pictures)} plots: {folder / 'report.html'}, {folder / 'report.md'}")
    return folder


if __name__ == "__main__":
    main(ReportArgs, report)
