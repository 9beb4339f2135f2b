"""Question and answer as a model reads them: the template around them, their tokens, and which of these are scored."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dualoptim.config.args import CommonArgs
from dualoptim.data.rows import Row
from dualoptim.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tags:
    """Holds the text around a question: `question_start` question `question_end` `answer` answer."""

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
"""Name of the file beside saved weights that holds the template they were trained with, for the next command's `auto`."""


def choose_template(args: CommonArgs, tokenizer: Any) -> tuple[str, Tags | None]:
    """Choose the template of a model: its name and its tags, None for the tokenizer's own chat template.

    `auto` takes the first that fits: what a model of ours was saved with, the chat template (both unless tags are given),
    llama3 or phi if their first tag is a token of the vocabulary, llama2 if the model's name says so, qa.

    Raises:
        InputError: if `chat` is asked of a tokenizer that has no chat template.
    """
    saved = Path(args.model).expanduser() / PROMPT_FILE
    if args.template == "auto" and not args.has_tags and saved.is_file():
        prompt = json.loads(saved.read_text(encoding="utf-8"))
        return prompt["template"], Tags(**prompt["tags"]) if prompt["tags"] is not None else None
    name = _fitting(args, tokenizer) if args.template == "auto" else args.template
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


def _fitting(args: CommonArgs, tokenizer: Any) -> str:
    """Find the first template that fits tokenizer and model."""
    if tokenizer.chat_template and not args.has_tags:
        return "chat"
    vocabulary = tokenizer.get_vocab()
    if "<|start_header_id|>" in vocabulary:
        return "llama3"
    if "<|assistant|>" in vocabulary:
        return "phi"
    model = args.model.lower().replace("_", "-")
    return "llama2" if "llama-2" in model or "llama2" in model else "qa"


@dataclass(frozen=True)
class Example:
    """Holds the token ids of one text, of which those from `start` on are scored (each predicted by the one before)."""

    ids: list[int]
    start: int


@dataclass
class Formatter:
    """Turns questions and answers into tokens. `tags` is None for the tokenizer's chat template."""

    tokenizer: Any
    tags: Tags | None
    max_length: int
    vocabulary: int | None = field(default=None, init=False)  # tokens that the model has embeddings of
    cut: int = field(default=0, init=False)  # texts that were longer than max_length
    _known: dict[tuple[str | None, str], tuple[list[int], int]] = field(default_factory=dict, init=False, repr=False)

    def cut_passage(self, row: Row) -> list[Row]:
        """Cut a passage into pieces of at most `max_length` tokens, end token included; a question stays as it is.

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
        """Write everything before the answer."""
        if self.tags is None:
            message = [{"role": "user", "content": question}]
            return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return f"{self.tags.question_start}{question}{self.tags.question_end}{self.tags.answer}"

    def example(self, question: str | None, answer: str, score_question: bool = False) -> Example:
        """Tokenize question, answer and end-of-sequence; the answer and the end are scored. Each text is tokenized once.

        Without a question the text stands alone, and all of it but its first token is scored, as with `score_question`.

        The whole text is tokenized once and the boundary taken from character offsets: a token that begins in the prompt
        and ends in the answer (" Paris" after "Answer: ") belongs to the answer. Counting the tokens of the prompt alone,
        as published code does, puts the boundary one token too late for many tokenizers.

        Raises:
            InputError: if the question alone fills `max_length`, or if the model has no embedding of a token.
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
        if self.vocabulary is not None and max(ids) >= self.vocabulary:
            token, size = self.tokenizer.convert_ids_to_tokens(max(ids)), len(self.tokenizer)
            raise InputError(
                f"--model {self.tokenizer.name_or_path}: its tokenizer writes {token!r}, token {max(ids)}, and the model has "
                f"embeddings of {self.vocabulary} tokens; call resize_token_embeddings({size}), train and save it, or take the "
                "tokenizer that it was trained with"
            )
        return ids, start

    def check(self, rows: Iterable[Row]) -> None:
        """Tokenize all texts of all rows now, so that one that does not fit is found before anything is written.

        One warning says how many texts were cut.

        Raises:
            InputError: if a question alone fills `max_length`.
        """
        for row in rows:
            for text in row.texts():
                self.example(row.question, text)
        if self.cut:
            logger.warning("%d texts are longer than --max-length %d tokens and were cut", self.cut, self.max_length)
            self.cut = 0


def make_formatter(args: CommonArgs, tokenizer: Any) -> tuple[Formatter, str]:
    """Make the formatter for a tokenizer, and name its template: `(formatter, template)`.

    Raises:
        InputError: if the tokenizer gives no character offsets or has no end-of-sequence token.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"--model {args.model}: its tokenizer gives no character offsets; convert it to the fast (tokenizer.json) form"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {args.model}: its tokenizer has no end-of-sequence token; set eos_token and save it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    template, tags = choose_template(args, tokenizer)
    return Formatter(tokenizer, tags, args.max_length), template
