"""Question and answer as a model reads them: the template around them, their tokens, and which of these are scored."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dualoptim.config.args import DATE, CommonArgs
from dualoptim.config.flags import flag_name
from dualoptim.data.chat import Chat
from dualoptim.data.prompt_file import PROMPT_FILE, saved_prompt
from dualoptim.data.rows import Asking, Row
from dualoptim.errors import InputError, blamed

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


def choose_template(args: CommonArgs, tokenizer: Any) -> tuple[str, Tags | None]:
    """Choose the template of a model: its name and its tags, None for the tokenizer's own chat template.

    `auto` takes the first that fits: what a model of ours was saved with, the chat template (both unless tags are given),
    llama3 or phi if their first tag is a token of the vocabulary, llama2 if the model's name says so, qa.

    Raises:
        InputError: if `chat` is asked of a tokenizer that has no chat template.
    """
    prompt = saved_prompt(args.model)
    if args.template == "auto" and not args.has_tags and prompt is not None:
        return prompt["template"], None if prompt["tags"] is None else Tags(**prompt["tags"])
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
    """Holds the token ids of one text, of which those from `start` on are scored, each predicted by the one before."""

    ids: list[int]
    start: int  # 0: the first token is scored as well, by what a layer puts out there, for nothing predicts it
    ended: bool = True  # an end token follows
    labels: list[int] | None = None  # of the scored tokens, where other ones are asked of the model than those that it reads


@dataclass
class Formatter:
    """Turns questions and answers into tokens. `tags` is None for the tokenizer's chat template.

    `date_string` and `system_prompt` are what a chat template writes; None where it writes none.
    """

    tokenizer: Any
    tags: Tags | None
    max_length: int
    date_string: str | None = None
    system_prompt: str | None = None
    vocabulary: int | None = field(default=None, init=False)  # tokens that the model has embeddings of
    cut: int = field(default=0, init=False)  # texts that were longer than max_length
    _known: dict[tuple[str | None, str, Asking | None], Example] = field(default_factory=dict, init=False, repr=False)

    def cut_passage(self, row: Row) -> list[Row]:
        """Cut a passage into pieces of at most `max_length` tokens, of which the last one ends; questions and pieces stay.

        Raises:
            InputError: if `max_length` leaves no room for three tokens, of which one may go to the last piece.
        """
        if row.question is not None or row.ids:
            return [row]
        _, offsets = self._encoded(row.answer, special=False)
        room = self.max_length - 2  # the end token, and a beginning that some tokenizers add
        if room < 3:
            raise InputError(f"--max-length {self.max_length} is too short for pieces of a passage; give 5 or more")
        # a last piece of one token would have nothing to be predicted from: it takes one from the piece before
        if not offsets:
            raise InputError(f"{row.place}: the model's tokenizer leaves nothing of {row.answer[:60]!r}; give another text")
        starts = [*range(0, len(offsets), room)]
        if len(offsets) - starts[-1] == 1 and len(starts) > 1:
            starts[-1] -= 1
        ends, goes_on = [*starts[1:], len(offsets)], replace(row.asking or Asking(), end=False)
        pieces = [
            replace(row, answer=row.answer[offsets[start][0] : offsets[end - 1][1]], asking=goes_on)
            for start, end in zip(starts, ends, strict=True)
        ]
        return [*pieces[:-1], replace(pieces[-1], asking=row.asking)]

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer's chat template."""
        return Chat(self.tokenizer, self.date_string or DATE, self.system_prompt)

    @property
    def end(self) -> int:
        """The token that ends an answer: the end of a turn as the chat template writes it, otherwise the end-of-sequence."""
        end: int = self.tokenizer.eos_token_id if self.tags is not None else self.chat.end
        return end

    def prompt(self, question: str) -> str:
        """Write everything before the answer.

        Raises:
            InputError: if a chat template cannot.
        """
        if self.tags is None:
            return self.chat.prompt(question)
        return f"{self.tags.question_start}{question}{self.tags.question_end}{self.tags.answer}"

    def of_row(self, row: Row, text: str, score_question: bool = False) -> Example:
        """Tokenize one of a row's texts, or another in its place, as its benchmark puts it. Errors are those of `example`."""
        if row.ids and text == row.answer:
            return Example(list(row.ids), 1, ended=False)
        return self.example(row.question, text, score_question, row.asking)

    def example(self, question: str | None, answer: str, score_question: bool = False, asking: Asking | None = None) -> Example:
        """Tokenize question, answer and its end; the answer and the end are scored. Each text is tokenized once.

        Without a question the text stands alone, and all of it but its first token is scored, as with `score_question`.

        The whole text is tokenized once and the boundary taken from character offsets: a token that begins in the prompt
        and ends in the answer (" Paris" after "Answer: ") belongs to the answer. Counting the tokens of the prompt alone,
        as published code does, puts the boundary one token too late for many tokenizers.

        Raises:
            InputError: if the question alone fills `max_length`, if the tokenizer leaves nothing of the answer, or if the model
                has no embedding of a token.
        """
        if (question, answer, asking) not in self._known:
            self._known[question, answer, asking] = self._tokenize(question, answer, asking)
        known = self._known[question, answer, asking]
        return replace(known, start=1) if score_question else known

    def _encoded(self, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenize a text, with the tokens that the tokenizer adds by itself or without: ids, and the characters of each."""
        remedy = "give the folder that save_pretrained wrote of both"
        with blamed("--model", self.tokenizer.name_or_path, remedy, "its tokenizer fails on a text"):
            encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])

    def _tokenize(self, question: str | None, answer: str, asking: Asking | None) -> Example:
        asking = asking or Asking()
        prompt, answer = ("", answer) if question is None else asking.words(question, answer, self.prompt)
        chat = question is not None and not asking.plain and self.tags is None  # a template writes its special tokens itself
        text = prompt + answer + (self.chat.space if chat else "")
        ids, spans = self._encoded(text, special=not chat)
        if ids[:2] == [self.tokenizer.bos_token_id] * 2:  # the template begins with what the tokenizer adds by itself
            ids, spans = ids[1:], spans[1:]
        while spans and spans[-1][1] == 0:  # an end token that the tokenizer added by itself has no characters
            ids, spans = ids[:-1], spans[:-1]
        start = next((n for n, (_, end) in enumerate(spans) if end > len(prompt)), None)
        if (
            start is not None
            and ids[start] in self.tokenizer.added_tokens_decoder
            and text[len(prompt) : spans[start][1]].isspace()
        ):
            start += 1  # an added token, such as <|assistant|>, that takes the blanks behind it
        if start is None or spans[start][0] >= len(prompt) + len(answer):
            raise InputError(
                f"the model's tokenizer leaves nothing of the answer {answer[:60]!r} to {(question or '')[:60]!r}; "
                "give another text"
            )
        ended = asking.end or len(ids) < 2  # something has to be predicted
        if ended:
            ids.append(self.tokenizer.eos_token_id if question is None or asking.plain else self.end)
        longest = max(self.max_length, asking.length)
        if len(ids) > longest:
            self.cut += 1
            ids = ids[:longest]
        if start >= len(ids):
            raise InputError(
                f"--max-length {longest} leaves no room for an answer after the question {(question or '')[:60]!r} "
                f"of {start} tokens; raise it"
            )
        if self.vocabulary is not None and max(ids) >= self.vocabulary:
            token, size = self.tokenizer.convert_ids_to_tokens(max(ids)), len(self.tokenizer)
            raise InputError(
                f"--model {self.tokenizer.name_or_path}: its tokenizer writes {token!r}, token {max(ids)}, and the model has "
                f"embeddings of {self.vocabulary} tokens; call resize_token_embeddings({size}), train and save it, or take the "
                "tokenizer that it was trained with"
            )
        return Example(ids, max(start, 1), ended)

    def check(self, rows: Iterable[Row]) -> None:
        """Tokenize all texts of all rows now, so that one that does not fit is found before anything is written.

        One warning says how many texts were cut.

        Raises:
            InputError: naming the row, if a question alone fills `max_length` or the tokenizer drops all of an answer.
        """
        for row in rows:
            for text in (*row.texts(), *filter(None, [row.refusal, *row.alternatives])):
                try:
                    self.of_row(row, text)
                except InputError as error:
                    raise InputError(f"{row.place}: {error}" if row.place else str(error)) from None
        if self.cut:
            logger.warning("%d texts are longer than --max-length %d tokens and were cut", self.cut, self.max_length)
            self.cut = 0


def make_formatter(args: CommonArgs, tokenizer: Any) -> tuple[Formatter, str]:
    """Make the formatter for a tokenizer, and name its template: `(formatter, template)`.

    Raises:
        InputError: if the tokenizer gives no character offsets or has no end-of-sequence token, or if its chat template fails,
            or date or system prompt have no place or are not those that the model was trained with.
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
    if tags is None:
        return Formatter(tokenizer, None, args.max_length, *_date_and_system_prompt(args, tokenizer)), template
    for name in ("date_string", "system_prompt"):
        if (given := getattr(args, name)) is not None:
            raise InputError(f"{flag_name(name)} {given[:60]!r}: template {template} has no place for it; drop the flag")
    return Formatter(tokenizer, tags, args.max_length), template


def _date_and_system_prompt(args: CommonArgs, tokenizer: Any) -> tuple[str | None, str | None]:
    """Choose the date (None if the chat template writes none) and the system prompt: a trained model's own, else the flags'.

    Raises:
        InputError: if a flag differs from the model's own, if there is no place for it, or if the template fails.
    """
    said = {"date_string": args.date_string, "system_prompt": args.system_prompt}
    saved = saved_prompt(args.model)
    own = {name: value for name, value in saved.items() if name in said} if saved and saved["template"] == "chat" else {}
    for name, trained in own.items():
        given = said[name]
        if given not in (None, trained) and (name, trained) != ("date_string", None):
            raise InputError(
                f"{flag_name(name)} {given[:60]!r}: {args.model} was trained with {(trained or 'none')[:60]!r} "
                f"({PROMPT_FILE}); drop the flag"
            )
        said[name] = trained or given
    chat = Chat(tokenizer, said["date_string"] or DATE, said["system_prompt"])
    text = chat.prompt("Who?")
    if args.date_string is not None and not chat.writes_date:
        raise InputError(f"--date-string {args.date_string!r}: the chat template of {args.model} writes no date; drop the flag")
    if saved and saved["template"] == "chat" and not own and text != chat.unpinned("Who?"):
        logger.warning(
            "%s: %s is older than --date-string, which the day of its prompts can be given with; they are now of %s, without "
            "thinking",
            args.model,
            PROMPT_FILE,
            chat.date_string,
        )
    return chat.date_string if chat.writes_date else None, chat.system_prompt
