"""Have a tokenizer's own chat template write a question, the same on every day, and say how it ends an answer."""

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from dualoptim.config.args import DATE
from dualoptim.config.checks import DATE_FORMAT
from dualoptim.errors import InputError, blamed

_QUESTION, _ANSWER = "Who?", "Quandelwyn"  # an answer that no template writes by itself
_DIRECTIVES = [padded + letter for padded in ("", "-") for letter in "aAbBcdDeFGhHIjklmMpPrRsSTuUVwWxXyYzZ"]  # of strftime


@dataclass(frozen=True)
class Chat:
    """Write texts with a chat template: on a day that stays, with a system prompt if there is one, without thinking."""

    tokenizer: Any
    date_string: str = DATE
    system_prompt: str | None = None

    def prompt(self, question: str) -> str:
        """Write everything before the answer.

        Raises:
            InputError: if the template fails, or leaves out the question or the system prompt.
        """
        text = self._write(question) + self._around_answer[0]
        if question.strip() not in text:
            raise InputError(
                f"--model {self.tokenizer.name_or_path}: its chat template does not write the question {question[:60]!r}; "
                "give --template qa"
            )
        if self.system_prompt is not None and self.system_prompt.strip() not in text:
            raise InputError(
                f"--system-prompt {self.system_prompt[:60]!r}: the chat template of {self.tokenizer.name_or_path} does not "
                "write it; drop the flag"
            )
        return text

    def unpinned(self, question: str) -> str:
        """Write everything before the answer as of today, as the tokenizer does by itself."""
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return text

    @property
    def space(self) -> str:
        """The blank text that the template writes between an answer and its end."""
        return self._around_answer[1]

    @property
    def end(self) -> int:
        """The token with which the template ends an answer."""
        return self._around_answer[2]

    @cached_property
    def writes_date(self) -> bool:
        """Whether prompts depend on the date."""
        return self._write(_QUESTION) != Chat(self.tokenizer, "01 Feb 1999", self.system_prompt)._write(_QUESTION)

    @cached_property
    def _around_answer(self) -> tuple[str, str, int]:
        """What the template writes before an answer (an empty thought), the blanks behind it, and the token of its end.

        The end is the added token (such as <|im_end|>) behind the answer, or the one that begins the next turn if there is
        nothing but blanks until there; without one it is the first token behind the answer. Where the template writes no
        answer, or only spaces behind it, an answer ends with the end-of-sequence.
        """
        end_of_sequence, no_ends = self.tokenizer.eos_token_id, (self.tokenizer.unk_token_id, self.tokenizer.bos_token_id)
        asked, whole = self._write(_QUESTION), self._write(_QUESTION, _ANSWER)
        before, found, _ = whole.rpartition(_ANSWER)
        if not found:
            return "", "", end_of_sequence
        lead = before.removeprefix(asked) if before.startswith(asked) else ""
        behind = self._tokens_behind_answer(whole)
        for tokens in (behind, self._tokens_behind_answer(self._write(_QUESTION, _ANSWER, _QUESTION))):
            for token, blanks in tokens:
                if token in self.tokenizer.added_tokens_decoder and (token == end_of_sequence or token not in no_ends):
                    return lead, blanks, token
        first = next((token for token, blanks in behind if not blanks), end_of_sequence)
        ends = first != self.tokenizer.unk_token_id and self.tokenizer.decode([first]).strip(" ")  # a space ends nothing
        return lead, "", first if ends else end_of_sequence

    def _tokens_behind_answer(self, whole: str) -> list[tuple[int, str]]:
        """The tokens behind the answer, each with the blanks between; those behind other text are left out."""
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        stop = whole.rindex(_ANSWER) + len(_ANSWER)
        return [
            (token, whole[stop:begin])
            for token, (begin, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            if begin >= stop and not whole[stop:begin].strip()
        ]

    def _write(self, question: str, answer: str | None = None, more: str | None = None) -> str:
        """Write a question and leave the turn to the model, or write its answer as well, and one more question.

        Raises:
            InputError: if the template fails, in its own words.
        """
        said = (("system", self.system_prompt), ("user", question), ("assistant", answer), ("user", more))
        messages = [{"role": role, "content": text} for role, text in said if text is not None]
        remedy = "give --template qa" if self.system_prompt is None else "drop --system-prompt, or give --template qa"
        with blamed("--model", self.tokenizer.name_or_path, remedy, "its chat template cannot be used"):
            template = self.tokenizer.get_chat_template()
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self._clock + template if "strftime_now" in template else template,
                tokenize=False,
                add_generation_prompt=answer is None,
                date_string=self.date_string,
                enable_thinking=False,
            )
        return text

    @property
    def _clock(self) -> str:
        """A macro that takes the place of `strftime_now` in a template: variables of a template cannot be functions."""
        day = datetime.strptime(self.date_string, DATE_FORMAT)
        filled = "".join(f"|replace('%{letter}','{day.strftime(f'%{letter}')}')" for letter in _DIRECTIVES)
        return f"{{%- macro strftime_now(format) -%}}{{{{ format{filled} }}}}{{%- endmacro +%}}"
