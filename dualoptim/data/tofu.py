"""Rows of question and answer, the text a model sees, its tokens, and the order in which a run meets them.

    source -> rows -> formatter -> examples -> stream of micro-batches -> one packed (or padded) batch

Three kinds of source have TOFU's shape: the built-in demo, a folder of JSON Lines files with a `task_id` in its forget
files (the published DualOptim layout), and the layout of `locuslab/TOFU`, on the hub or in a folder, where a task is a
range of rows of the configuration `full`.
"""

import csv
import itertools
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualoptim.data import demo
from dualoptim.config.args import DEMO, CommonArgs, MeasureArgs, TrainArgs
from dualoptim.errors import InputError, reason
from dualoptim.method.scores import Batch

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """A question and its answer, with the other answers that evaluation compares where the data has them.

    A passage of plain text has no question and is its own answer.
    """

    question: str | None
    answer: str
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    task: int | None = None
    golden_answer: str | None = None  # the short fact, where `answer` is the model's own long one (real-world scenario)
    original_answer: str | None = None  # a whole sentence, where `answer` is a short one (real authors, world facts)
    paraphrased_question: str | None = None

    def texts(self) -> list[str]:
        """All answers, the true one first, then its paraphrase if there is one, then the wrong ones."""
        return [self.answer, *([self.paraphrased_answer] if self.paraphrased_answer else []), *self.perturbed_answers]


def parse_row(raw: Any, place: str) -> Row:
    """A `Row` from one JSON object.

    Raises:
        InputError: naming `place`, if a field is missing, empty or of the wrong type.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{place}: not a JSON object; each line holds one with question and answer")
    for name in ("question", "answer"):
        if name not in raw:
            raise InputError(f"{place}: no field {name!r}; every row needs question and answer")
        if not isinstance(raw[name], str) or not raw[name].strip():
            raise InputError(f"{place}: {name} is {raw[name]!r}; give a text that is not empty")
    others = {name: raw.get(name) for name in ("golden_answer", "original_answer", "paraphrased_question")}
    for name, text in others.items():
        if text is not None and not (isinstance(text, str) and text.strip()):
            raise InputError(f"{place}: {name} is {text!r}; give a text that is not empty")
    paraphrased, perturbed, task = (raw.get(k) for k in ("paraphrased_answer", "perturbed_answer", "task_id"))
    if paraphrased is not None and not isinstance(paraphrased, str):
        raise InputError(f"{place}: paraphrased_answer is {paraphrased!r}; give a text")
    if perturbed is not None and not (
        isinstance(perturbed, list) and perturbed and all(isinstance(text, str) and text for text in perturbed)
    ):
        raise InputError(f"{place}: perturbed_answer is {perturbed!r}; give a list of texts")
    if task is not None:
        if isinstance(task, bool) or not isinstance(task, (int, str)) or not str(task).isdecimal():
            raise InputError(f"{place}: task_id is {task!r}; give a whole number")
        task = int(task)
    return Row(raw["question"], raw["answer"], paraphrased, tuple(perturbed or ()), task, **others)


def _json_line(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON ({error.msg}); write one JSON object per line") from None


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON Lines file; empty lines are skipped and the last line may lack its end.

    Raises:
        InputError: naming file and line.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a readable file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        rows.append(parse_row(_json_line(line, f"{path}:{number}"), f"{path}:{number}"))
    if not rows:
        raise InputError(f"{path}: holds no rows; write one JSON object per line")
    return rows


# --------------------------------------------------------------------------------------------------- sources and tasks

# Row ranges of TOFU's `full` set (200 authors x 20 questions) that are the published tasks, and what is never forgotten.
_TASK_ROWS, _TASK_STARTS = (
    {"forget01": 40, "forget05": 200, "forget10": 400},
    {
        "forget01": [3600 + 40 * k for k in range(10)],
        "forget05": [3600, 3800, 3200, 3400, 2800, 3000, 2000, 2200, 2400, 2600],
        "forget10": [3600, 3200, 2800, 2000, 2400, 400, 800, 1200, 1600],
    },
)
_RETAIN = {"forget01": "retain90", "forget05": "retain50", "forget10": "retain10", "forget": "neighbor"}
_RETAIN_ROWS = {"forget01": 3600, "forget05": 2000, "forget10": 400}
_HUB_RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
HOLDOUT = "holdout"
_EVALUATION_SETS = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}


class Source:
    """TOFU-shaped data: reads splits by name and knows which of their rows a task is."""

    def __init__(self, name: str, holdout: Sequence[Row] = ()) -> None:
        """Find out what `name` is. `holdout` are rows that no model has seen, in place of the data's own.

        Raises:
            InputError: if it looks like a folder and is none.
        """
        self.name = name
        self._holdout = list(holdout)
        self._splits: dict[str, list[Row]] = {}
        folder = Path(name).expanduser()
        self.folder = folder if name != DEMO and folder.is_dir() else None
        if name != DEMO and self.folder is None and (name.startswith(("/", ".", "~")) or name.count("/") != 1):
            raise InputError(f"--data {name}: no such folder; give a folder, a hub id such as locuslab/TOFU, or demo")
        card = self.folder / "README.md" if self.folder else None
        has_configurations = card is not None and card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8")
        self._on_hub = name != DEMO and (self.folder is None or has_configurations)
        self.cut_from_full = self._on_hub or (self.folder is not None and self._file("full") is not None)

    def _file(self, split: str) -> Path | None:
        assert self.folder is not None
        candidates = (self.folder / f"{split}{suffix}" for suffix in (".json", ".jsonl"))
        return next((path for path in candidates if path.is_file()), None)

    def rows(self, split: str) -> list[Row]:
        """All rows of one split, read once.

        Raises:
            InputError: if the split is unknown, cannot be reached, or holds a bad row.
        """
        if split not in self._splits:
            self._splits[split] = self._read(split)
        return self._splits[split]

    def _read(self, split: str) -> list[Row]:
        if self.name == DEMO:
            splits = demo.splits()
            if split not in splits:
                raise InputError(f"the demo data has no split {split!r}; it has {', '.join(splits)}")
            return [parse_row(raw, f"demo {split}:{n}") for n, raw in enumerate(splits[split], start=1)]
        if self._on_hub:
            return self._read_hub(split)
        path = self._file(split)
        if path is None:
            names = sorted(p.stem for p in self.folder.iterdir() if p.suffix in (".json", ".jsonl")) if self.folder else []
            raise InputError(f"--data {self.name} has no {split}.json; it has {', '.join(names) or 'no .json files'}")
        return read_rows(path)

    def _read_hub(self, split: str) -> list[Row]:
        import datasets  # takes a second to import and is needed for this layout alone

        try:
            loaded = datasets.load_dataset(str(self.folder or self.name), split, split="train")
        except Exception as error:  # the library raises many kinds: network, unknown id, unknown configuration, bad file
            raise InputError(
                f"--data {self.name}: configuration {split!r} cannot be loaded ({reason(error)}); check the name and "
                "the network, or give a local folder"
            ) from None
        return [parse_row(dict(raw), f"{self.name} {split}:{number}") for number, raw in enumerate(loaded, start=1)]

    # -- tasks --

    def tasks(self, split: str) -> list[int]:
        """The numbers of the forget tasks of a split."""
        if split == "forget" and (self.cut_from_full or self.name == DEMO):
            raise InputError("--split forget is the real-world scenario; give the folder of its files with --data")
        if self.cut_from_full:
            return list(range(len(_TASK_STARTS[split]) + 1))
        return _task_numbers(self.rows(split))

    def task_rows(self, split: str, task: int) -> list[Row]:
        """What task `task` of `split` is to forget.

        Raises:
            InputError: if there is no such task.
        """
        if task not in self.tasks(split):
            tasks = ", ".join(map(str, self.tasks(split)))
            raise InputError(f"task {task}: {split} of {self.name} has no such task; it has {tasks}")
        if not self.cut_from_full:
            return _of_task(self.rows(split), task)
        return self.rows(split) if task == 0 else self._cut(*self._range(split, task))

    def retain_rows(self, split: str, unlearned: Sequence[int]) -> list[Row]:
        """The retain pool while the last of `unlearned` is being forgotten.

        The rows that no task of this size ever takes away, and those of the tasks that have not been unlearned yet: the
        current task and earlier ones are out. The hub's own forget set (task 0) has the hub's own retain set.

        Raises:
            InputError: if task 0 is mixed with others.
        """
        if not self.cut_from_full:
            return self.rows(_RETAIN[split]) + _still_known(self.rows(split), unlearned)
        if 0 in unlearned:
            if len(unlearned) > 1:
                raise InputError("--task-list mixes task 0, the hub's own forget set, with the published cuts 1 to 10")
            return self.rows(_HUB_RETAIN[split])
        tasks = [task for task in self.tasks(split) if task not in (0, *unlearned)]
        return self._cut(0, _RETAIN_ROWS[split]) + [row for task in tasks for row in self.task_rows(split, task)]

    def evaluation_sets(self, split: str, task: int) -> tuple[dict[str, list[Row]], dict[str, str]]:
        """The evaluation sets, and why one of them is missing or lacks answers to compare: `(sets, skipped)`.

        `holdout` are rows that no model has seen, for membership attacks.
        """
        forget = self.task_rows(split, task)
        sets, skipped = {}, {}
        if self.cut_from_full and task > 0:
            # forget10_perturbed covers rows 3600 to 4000 of full, which hold every task of forget01 and some of the others.
            compared = {row.question: row for row in self._optional("forget10_perturbed")}
            sets["forget"] = [compared.get(row.question, row) for row in forget]
        else:
            sets["forget"] = _of_task(self._optional(f"{split}_perturbed"), task) or forget
        real_world = split == "forget"
        for name, file in _EVALUATION_SETS.items():
            file = "neighbor_perturbed" if real_world and name == "retain" else file
            rows = self._optional(file)
            if rows:
                sets[name] = rows
            elif real_world and name != "retain":
                skipped[name] = "the real-world scenario has no such set; --lm-eval-tasks measures general ability"
            else:
                skipped[name] = f"{self.name} has no {file}"
        holdout = self._holdout or self._optional(split.replace("forget", HOLDOUT))
        if holdout:
            sets[HOLDOUT] = holdout
        if real_world:  # what is known is the short fact; the long answer says more than was asked
            sets = {
                name: [replace(r, answer=r.golden_answer or r.answer, original_answer=r.answer) for r in rows]
                for name, rows in sets.items()
            }
        return sets, skipped

    def describe(self, split: str, task: int) -> str:
        """Which rows a task is, in words."""
        if not self.cut_from_full:
            return f"task {task} of {split} of {self.name}"
        if task == 0:
            return f"{split} of {self.name} (the hub's own cut)"
        start, end = self._range(split, task)
        return f"task {task} of {split}: rows {start} to {end - 1} of {self.name} full"

    def _optional(self, split: str) -> list[Row]:
        """The rows of an evaluation split, none if the source does not have it."""
        if self.name == DEMO:
            known = split in demo.splits()
        elif self._on_hub:
            self.rows("full")  # first, so that a source that cannot be reached is an error and not an empty set
            import datasets

            known = split in datasets.get_dataset_config_names(str(self.folder or self.name))
        else:
            known = self._file(split) is not None
        return self.rows(split) if known else []

    def _range(self, split: str, task: int) -> tuple[int, int]:
        start = _TASK_STARTS[split][task - 1]
        return start, start + _TASK_ROWS[split]

    def _cut(self, start: int, end: int) -> list[Row]:
        full = self.rows("full")
        if len(full) < end:
            raise InputError(f"--data {self.name}: full has {len(full)} rows, the published tasks are cut from 4000")
        return full[start:end]


def _task_numbers(rows: Sequence[Row]) -> list[int]:
    """The tasks that rows are numbered by; rows without numbers are all of task 1."""
    return sorted({row.task for row in rows if row.task is not None}) or [1]


def _still_known(rows: Sequence[Row], unlearned: Sequence[int]) -> list[Row]:
    """The rows of tasks that have not been unlearned yet."""
    return [row for row in rows if row.task not in (None, *unlearned)]


def _of_task(rows: list[Row], task: int) -> list[Row]:
    """The rows of one task; rows without task numbers are all of one."""
    return [row for row in rows if row.task in (None, task)]


class OwnFiles:
    """Rows of a user's own files, with the interface of `Source`: one file to forget, one to keep."""

    def __init__(self, args: MeasureArgs) -> None:
        """Read both files.

        Raises:
            InputError: naming file, line or column.
        """
        columns = (args.question_column, args.answer_column, args.text_column)
        self.name = str(args.forget_file)
        self._forget = read_own(Path(self.name).expanduser(), *columns)
        self._retain = read_own(Path(args.retain_file).expanduser(), *columns) if args.retain_file else []
        self._holdout = read_holdout(args)

    def cut(self, formatter: "Formatter") -> None:
        """Cut passages to what `formatter` takes."""
        self._forget, self._retain, self._holdout = (
            [part for row in rows for part in formatter.cut_passage(row)]
            for rows in (self._forget, self._retain, self._holdout)
        )

    def tasks(self, split: str) -> list[int]:
        """The task numbers in the file, or 1."""
        return _task_numbers(self._forget)

    def task_rows(self, split: str, task: int) -> list[Row]:
        """What task `task` is to forget.

        Raises:
            InputError: if there is no such task.
        """
        if task not in self.tasks(split):
            raise InputError(f"task {task}: {self.name} has no such task; it has {', '.join(map(str, self.tasks(split)))}")
        return _of_task(self._forget, task)

    def retain_rows(self, split: str, unlearned: Sequence[int]) -> list[Row]:
        """The rows to keep, and those of tasks that have not been unlearned yet."""
        return self._retain + _still_known(self._forget, unlearned)

    def evaluation_sets(self, split: str, task: int) -> tuple[dict[str, list[Row]], dict[str, str]]:
        """The rows to forget and to keep, and why the published sets are missing."""
        sets = {"forget": self.task_rows(split, task), "retain": self._retain, HOLDOUT: self._holdout}
        sets = {name: rows for name, rows in sets.items() if rows}
        skipped = {} if self._retain else {"retain": "no --retain-file"}
        return sets, skipped | dict.fromkeys(("real_authors", "world_facts"), "your own files have no such set")

    def describe(self, split: str, task: int) -> str:
        """Which rows a task is, in words."""
        return f"task {task}: {len(self.task_rows(split, task))} rows of {self.name}"


def open_source(args: MeasureArgs) -> "Source | OwnFiles":
    """Where the rows of `args` come from.

    Raises:
        InputError: if that cannot be read.
    """
    return OwnFiles(args) if args.forget_file else Source(args.data_source, read_holdout(args))


def read_holdout(args: MeasureArgs) -> list[Row]:
    """The rows of `--holdout-file`, none without it.

    Raises:
        InputError: naming file, line or column.
    """
    if args.holdout_file is None:
        return []
    return read_own(Path(args.holdout_file).expanduser(), args.question_column, args.answer_column, args.text_column)


def read_own(path: Path, question: str, answer: str, text: str) -> list[Row]:
    """Rows of a .jsonl, .json, .csv, .parquet or .txt file, whose columns go by these names.

    Raises:
        InputError: naming file, line or column.
    """
    kind = path.suffix.lower()
    lines: list[int] = []  # where the rows stand, if that is not their number
    try:
        if kind == ".txt":
            raws: list[Any] = [{text: path.read_text(encoding="utf-8")}]
        elif kind == ".csv":
            csv.field_size_limit(2**31 - 1)  # a passage may be longer than the module's 131,072 characters
            with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a mark at the start
                table = csv.DictReader(file)
                raws, lines = [], []
                for record in table:
                    raws.append(record)
                    lines.append(table.line_num)
        elif kind == ".parquet":
            import pyarrow.parquet  # comes with datasets

            raws = pyarrow.parquet.read_table(path).to_pylist()
        elif kind in (".json", ".jsonl"):
            text_lines = path.read_text(encoding="utf-8").split("\n")
            raws = [_json_line(line, f"{path}:{number}") if line.strip() else None for number, line in enumerate(text_lines, 1)]
        else:
            raise InputError(f"{path}: {kind or 'no'} ending; give a .jsonl, .json, .csv, .parquet or .txt file")
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors
        raise InputError(
            f"{path}: cannot be read ({reason(error)}); give UTF-8 text, one JSON object a line, or a table"
        ) from None
    rows = []
    for number, raw in enumerate(raws, start=1):
        if raw is None:
            continue
        place = f"{path}:{lines[number - 1] if lines else number}"
        if not isinstance(raw, dict):
            raise InputError(f"{place}: not a JSON object; write one per line")
        if raw.get("task_id") == "":  # a table's empty cell
            del raw["task_id"]
        if text in raw and question not in raw:
            if not isinstance(raw[text], str) or not raw[text].strip():
                raise InputError(f"{place}: {text} is {raw[text]!r}; give a text that is not empty")
            rows.append(replace(parse_row({**raw, "question": "-", "answer": raw[text]}, place), question=None))
            continue
        for flag, column in (("--question-column", question), ("--answer-column", answer)):
            if column not in raw:
                raise InputError(f"{place}: no column {column!r}; it has {', '.join(map(str, raw))}; name it with {flag}")
        others = ("paraphrased_answer", "perturbed_answer", "paraphrased_question", "original_answer", "task_id")
        known = {name: raw[name] for name in others if raw.get(name) not in (None, "")}
        if isinstance(known.get("perturbed_answer"), str):
            del known["perturbed_answer"]  # a table's cell holds no list
        rows.append(parse_row({"question": raw[question], "answer": raw[answer], **known}, place))
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def load_refusals(path: str | None) -> list[str]:
    """Refusals, one a line: from `path`, or the list that comes with the package.

    Raises:
        InputError: if the file cannot be read or holds none.
    """
    if path is None:
        text = resources.files("dualoptim.data").joinpath("refusals.txt").read_text(encoding="utf-8")
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--idk-file {path}: {error}; give a text file with one refusal a line") from None
    refusals = [line.strip() for line in text.splitlines() if line.strip()]
    if not refusals:
        raise InputError(f"--idk-file {path}: holds no lines; write one refusal a line")
    return refusals


# --------------------------------------------------------------------------------------------- templates and examples


@dataclass(frozen=True)
class Tags:
    """Text around a question: `question_start` question `question_end` `answer` answer."""

    question_start: str = ""
    question_end: str = ""
    answer: str = ""


TEMPLATES = {
    "qa": Tags("Question: ", "\n", "Answer: "),
    "llama2": Tags("[INST] ", " [/INST]"),
    "llama3": Tags(
        "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "phi": Tags("<|user|>\n", "<|end|>\n<|assistant|>\n"),
}


PROMPT_FILE = "prompt.json"
"""Stands beside the weights that we save: the template they were trained with, for the next command's `auto`."""


def choose_template(args: CommonArgs, tokenizer: Any) -> tuple[str, Tags | None]:
    """Name and tags of the template; no tags means the tokenizer's own chat template.

    `auto` takes the first that fits: what a model of ours was saved with, the chat template (both unless tags are given),
    llama3 or phi if their first tag is a token of the vocabulary, llama2 if the model's name says so, qa.

    Raises:
        InputError: if `chat` is asked of a tokenizer that has no chat template.
    """
    name = args.template
    saved = Path(args.model).expanduser() / PROMPT_FILE
    if name == "auto" and not args.has_tags and saved.is_file():
        prompt = json.loads(saved.read_text(encoding="utf-8"))
        return prompt["template"], Tags(**prompt["tags"]) if prompt["tags"] is not None else None
    if name == "auto":
        vocabulary = tokenizer.get_vocab()
        model = args.model.lower().replace("_", "-")
        if tokenizer.chat_template and not args.has_tags:
            name = "chat"
        elif "<|start_header_id|>" in vocabulary:
            name = "llama3"
        elif "<|assistant|>" in vocabulary:
            name = "phi"
        else:
            name = "llama2" if "llama-2" in model or "llama2" in model else "qa"
    if name == "chat":
        if not tokenizer.chat_template:
            raise InputError(f"--template chat: the tokenizer of {args.model} has no chat template; choose qa, for example")
        return name, None
    tags = TEMPLATES[name]

    def choose(given: str | None, default: str) -> str:
        return default if given is None else given.replace("\\n", "\n")

    return name, Tags(
        choose(args.question_start_tag, tags.question_start),
        choose(args.question_end_tag, tags.question_end),
        choose(args.answer_tag, tags.answer),
    )


@dataclass(frozen=True)
class Example:
    """Token ids of one text, of which those from `start` on are scored (each predicted by the one before)."""

    ids: list[int]
    start: int


@dataclass
class Formatter:
    """Turns question and answer into tokens. `tags` is None for the tokenizer's chat template."""

    tokenizer: Any
    tags: Tags | None
    max_length: int
    cut: int = field(default=0, init=False)  # texts that were longer than max_length
    _known: dict[tuple[str | None, str], tuple[list[int], int]] = field(default_factory=dict, init=False, repr=False)

    def cut_passage(self, row: Row) -> list[Row]:
        """A passage in pieces of at most `max_length` tokens, end token included; a question stays as it is.

        Raises:
            InputError: if `max_length` leaves no room for two tokens.
        """
        if row.question is not None:
            return [row]
        offsets = self.tokenizer(row.answer, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        room = self.max_length - 2  # the end token, and a beginning that some tokenizers add
        if room < 2:
            raise InputError(f"--max-length {self.max_length} is too short for pieces of a passage; give 4 or more")
        # a last piece of one token would have nothing to be predicted from: it takes one from the piece before
        starts = [*range(0, len(offsets), room)]
        if len(offsets) - starts[-1] == 1 and len(starts) > 1:
            starts[-1] -= 1
        ends = [*starts[1:], len(offsets)]
        return [
            replace(row, answer=row.answer[offsets[start][0] : offsets[end - 1][1]])
            for start, end in zip(starts, ends, strict=True)
        ]

    def prompt(self, question: str) -> str:
        """Everything before the answer."""
        if self.tags is None:
            message = [{"role": "user", "content": question}]
            return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return f"{self.tags.question_start}{question}{self.tags.question_end}{self.tags.answer}"

    def example(self, question: str | None, answer: str, score_question: bool = False) -> Example:
        """Tokens of question, answer and end-of-sequence; the answer and the end are scored. Each text is tokenized once.

        Without a question the text stands alone, and all of it but its first token is scored.

        The whole text is tokenized once and the boundary taken from character offsets: a token that begins in the prompt
        and ends in the answer (" Paris" after "Answer: ") belongs to the answer. Counting the tokens of the prompt alone,
        as published code does, puts the boundary one token too late for many tokenizers.

        Raises:
            InputError: if the question alone fills `max_length`.
        """
        if (question, answer) not in self._known:
            self._known[question, answer] = self._tokenize(question, answer)
        ids, start = self._known[question, answer]
        return Example(ids, 1 if score_question else max(start, 1))

    def _tokenize(self, question: str | None, answer: str) -> tuple[list[int], int]:
        prompt = "" if question is None else self.prompt(question)
        plain = question is None or self.tags is not None  # a chat template writes its special tokens itself
        encoded = self.tokenizer(prompt + answer, add_special_tokens=plain, return_offsets_mapping=True, verbose=False)
        ids, ends = list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]
        if ends[-1] == 0:  # an end token that the tokenizer added by itself has no characters
            ids, ends = ids[:-1], ends[:-1]
        start = next(position for position, end in enumerate(ends) if end > len(prompt))
        ids.append(self.tokenizer.eos_token_id)
        if len(ids) > self.max_length:
            self.cut += 1
            ids = ids[: self.max_length]
        if start >= len(ids):
            raise InputError(
                f"--max-length {self.max_length} leaves no room for an answer after the question {(question or '')[:60]!r} "
                f"of {start} tokens; raise it"
            )
        return ids, start

    def check(self, rows: Iterable[Row]) -> None:
        """Tokenize all texts of all rows now, so that one that does not fit is found before anything is written.

        One warning says how many texts were cut. Raises:
            InputError: as `example` does.
        """
        for row in rows:
            for text in row.texts():
                self.example(row.question, text)
        if self.cut:
            logger.warning("%d texts are longer than --max-length %d tokens and were cut", self.cut, self.max_length)
            self.cut = 0


# ------------------------------------------------------------------------------------------------------------ batches


def pack(examples: Sequence[Example], share: bool = False) -> Batch:
    """Examples end to end in one row, positions restarting at each: no padding and no attention mask.

    With `share`, an example that has its question in common with the one before it brings only the tokens in which they
    differ, and a mask hides the rest of one from the other: the same numbers from fewer tokens. In the order of their tokens
    answers to a question share the most.
    """
    paths: list[np.ndarray] = []  # where in the row the tokens of each example lie
    brought: list[int] = []  # how many of them lie there already
    length = 0
    for index, example in enumerate(examples):
        before = _common(examples[index - 1], example) if share and index else 0
        own = np.arange(length, length + len(example.ids) - before)
        paths.append(np.concatenate([paths[-1][:before], own]) if before else own)
        brought.append(before)
        length += len(own)
    parts = [example.ids[before:] for example, before in zip(examples, brought, strict=True)]
    ids = np.array(list(itertools.chain.from_iterable(parts)))
    mask = None
    if any(brought):
        mask = np.zeros((length, length), dtype=bool)
        for path, before in zip(paths, brought, strict=True):
            mask[np.ix_(path[before:], path)] = np.tri(len(path), dtype=bool)[before:]
    scored = np.concatenate([path[example.start :] for path, example in zip(paths, examples, strict=True)])
    predicting = np.concatenate([path[example.start - 1 : -1] for path, example in zip(paths, examples, strict=True)])
    keep, column = np.unique(predicting, return_inverse=True)
    sequence = np.repeat(np.arange(len(examples)), [len(example.ids) - example.start for example in examples])
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(
            np.concatenate([np.arange(before, len(path)) for path, before in zip(paths, brought, strict=True)])
        )[None],
        attention_mask=None if mask is None else torch.from_numpy(mask)[None, None],
        keep=torch.from_numpy(keep),
        row=torch.zeros(len(scored), dtype=torch.long),
        column=torch.from_numpy(column),
        position=torch.from_numpy(scored),
        labels=torch.from_numpy(ids[scored]),
        sequence=torch.from_numpy(sequence),
        num_sequences=len(examples),
        num_tokens=sum(len(example.ids) for example in examples),
    )


def _common(one: Example, other: Example) -> int:
    """With how many of the same tokens two examples begin; 0 if these are not of one question.

    That is, if they differ before their first scored token, or if all of them are scored: then it would be chance, and a mask
    for all texts together costs more than it saves.
    """
    if one.start != other.start or one.start <= 1:
        return 0
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one.ids, other.ids, strict=False)))
    return same if same >= one.start else 0


def pad(examples: Sequence[Example]) -> Batch:
    """One row per example, padded on the right to the longest, for models whose attention cannot take packed rows."""
    length = max(len(example.ids) for example in examples)
    first = min(example.start for example in examples) - 1  # logits are computed from here to the end
    ids, mask = np.zeros((2, len(examples), length), dtype=np.int64)
    row, column = [], []
    for index, example in enumerate(examples):
        ids[index, : len(example.ids)] = example.ids
        mask[index, : len(example.ids)] = 1
        column.append(np.arange(example.start - 1, len(example.ids) - 1) - first)
        row.append(np.full(len(column[-1]), index))
    rows, columns = np.concatenate(row), np.concatenate(column)
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.arange(length).repeat(len(examples), 1),
        attention_mask=torch.from_numpy(mask),
        keep=torch.arange(first, length - 1),
        row=torch.from_numpy(rows),
        column=torch.from_numpy(columns),
        position=torch.from_numpy(columns + first + 1),
        labels=torch.from_numpy(ids[rows, columns + first + 1]),
        sequence=torch.from_numpy(rows),
        num_sequences=len(examples),
        num_tokens=int(mask.sum()),
    )


def in_length_order(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first, so that memory runs out at once if it does."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return (order[start : start + size] for start in range(0, len(order), size))


@dataclass
class Stream:
    """The endless, seeded order in which one phase meets its rows.

    Epoch e visits the rows in a permutation of its own, epochs follow each other without a gap, and step k of the phase takes
    the k-th block of `global_batch` rows. So what a step sees follows from the seed, the global batch and k alone: not from
    the number of processes, and not from where a run was interrupted.

    `build(index, epoch)` gives the examples of one row: one, or several that belong together.
    """

    name: str
    rows: int
    build: Callable[[int, int], list[Example]]
    seed: int
    batch_size: int
    accumulation: int
    process: int = 0
    processes: int = 1
    _orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def of(
        args: TrainArgs, name: str, rows: int, build: Callable[[int, int], list[Example]], process: int, processes: int
    ) -> "Stream":
        """The share of process `process` of `processes` in a run with `args`."""
        return Stream(name, rows, build, args.seed, args.batch_size, args.gradient_accumulation_steps, process, processes)

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step over all processes."""
        return self.batch_size * self.accumulation * self.processes

    def window(self, step: int) -> Iterator[list[Example]]:
        """This process's micro-batches of the phase's step `step`."""
        first = step * self.global_batch + self.process * self.batch_size * self.accumulation
        for micro_batch in range(self.accumulation):
            start = first + micro_batch * self.batch_size
            visits = (divmod(position, self.rows) for position in range(start, start + self.batch_size))
            yield [example for epoch, visit in visits for example in self.build(self._order(epoch)[visit], epoch)]

    def visited(self, steps: int) -> Iterator[Example]:
        """All examples that all processes meet in the phase's first `steps` steps."""
        for position in range(steps * self.global_batch):
            epoch, visit = divmod(position, self.rows)
            yield from self.build(self._order(epoch)[visit], epoch)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = seeded(self.seed, self.name, epoch).permutation(self.rows)
        return self._orders[epoch]


def seeded(seed: int, name: str, *numbers: int) -> np.random.Generator:
    """A random generator that depends on nothing but its arguments."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *numbers])


def example_builder(
    rows: Sequence[Row],
    formatter: Formatter,
    reads: Sequence[str],
    seed: int,
    refusals: Sequence[str] = (),
    others: Sequence[Row] = (),
    score_question: bool = False,
) -> Callable[[int, int], list[Example]]:
    """`build` for a `Stream`: one example for each text that the objective `reads`.

    `answer` is the row's own, `refusal` one of `refusals` and `mismatch` the answer of one of `others`, drawn for this visit.
    """

    def drawn(text: str, row: Row, index: int, epoch: int) -> str:
        if text == "answer":
            return row.answer
        source = refusals if text == "refusal" else others
        chosen = source[int(seeded(seed, text, epoch, index).integers(len(source)))]
        return chosen if isinstance(chosen, str) else chosen.answer

    def build(index: int, epoch: int) -> list[Example]:
        row = rows[index]
        return [formatter.example(row.question, drawn(text, row, index, epoch), score_question) for text in reads]

    return build
