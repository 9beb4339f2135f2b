"""Chat templates: date, system prompt and thinking stay as they are, and what a template cannot do is said in one line."""

import copy
import json
import logging
from datetime import datetime

import pytest

from dualoptim import EvalArgs, UnlearnArgs, run
from dualoptim.config.cli import parse
from dualoptim.config.saved import check_same, load_yaml, write_config
from dualoptim.data import demo
from dualoptim.data.chat import Chat
from dualoptim.data.prompts import PROMPT_FILE, make_formatter
from dualoptim.errors import InputError
from dualoptim.evaluate import evaluate
from dualoptim.evaluation.decoding import end_tokens
from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model

CHAT = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
LLAMA32 = (  # the date as Llama-3.2's template finds it; Llama-3.1's has a fixed one where none is given
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today Date: {{ date_string }}\n" + CHAT
)
LLAMA31 = LLAMA32.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
SMOLLM3 = "{%- set today = strftime_now('%d %B %Y') -%}Today Date: {{ today }}\n" + CHAT
IN_A_MACRO = "{% macro head() %}It is {{ strftime_now('%A, %-d.%-m.%y %H:%M:%S') }}.{% endmacro %}\n{{ head() }}" + CHAT


MODEL, TOKENIZER = demo.tiny_model(0)


def tokenizer(template):
    made = copy.deepcopy(TOKENIZER)
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def model_with(tmp_path_factory):
    """Save an untrained model with a chat template."""

    def save(template):
        folder = tmp_path_factory.mktemp("model")
        MODEL.save_pretrained(folder)
        tokenizer(template).save_pretrained(folder)
        return str(folder)

    return save


def formatter_of(model, **flags):
    return load_model(UnlearnArgs(model=model, **flags), start_accelerator(UnlearnArgs())).formatter


# ------------------------------------------------------------------------------------------------------------------ the date


@pytest.mark.parametrize(
    ("template", "default", "other"),
    [
        (LLAMA32, "Today Date: 10 Apr 2025\n", "Today Date: 3 Feb 2001\n"),
        (LLAMA31, "Today Date: 10 Apr 2025\n", "Today Date: 3 Feb 2001\n"),
        (SMOLLM3, "Today Date: 10 April 2025\n", "Today Date: 03 February 2001\n"),
        (IN_A_MACRO, "It is Thursday, 10.4.25 00:00:00.", "It is Saturday, 3.2.01 00:00:00."),
        ("{{ strftime_now(format='%Y-%m-%d').split('-')[0] }} " + CHAT, "2025 ", "2001 "),
    ],
)
def test_a_template_that_asks_for_the_day_gets_the_pinned_one(template, default, other):
    for flags, start in (({}, default), ({"date_string": "3 Feb 2001"}, other)):
        formatter, name = make_formatter(UnlearnArgs(model="m", **flags), tokenizer(template))
        assert name == "chat"
        assert formatter.prompt("Why?") == start + "<u>Why?</u><a>"
        assert formatter.date_string == flags.get("date_string", "10 Apr 2025")


def test_a_template_without_a_date_is_left_as_it_is():
    made = tokenizer("\n\n" + CHAT)
    formatter, _ = make_formatter(UnlearnArgs(model="m"), made)
    asked = [{"role": "user", "content": "Why?"}]
    assert formatter.prompt("Why?") == made.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert (formatter.date_string, formatter.system_prompt) == (None, None)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"date_string": "2025-04-10"}, "--date-string '2025-04-10' is not a date; write it as 10 Apr 2025"),
        ({"date_string": "31 Feb 2025"}, "--date-string '31 Feb 2025' is not a date"),
        ({"date_string": ""}, "--date-string is empty"),
        ({"system_prompt": " "}, "--system-prompt is empty"),
    ],
)
def test_what_is_no_date_and_no_prompt_is_refused(flags, line):
    with pytest.raises(InputError, match=line):
        UnlearnArgs(**flags)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"date_string": "10 Apr 2025"}, "--date-string '10 Apr 2025': the chat template of m writes no date; drop the flag"),
        (
            {"date_string": "10 Apr 2025", "template": "qa"},
            "--date-string '10 Apr 2025': template qa has no place for it; drop",
        ),
        (
            {"system_prompt": "Be brief.", "answer_tag": "="},
            "--system-prompt 'Be brief.': template qa has no place for it; drop",
        ),
    ],
)
def test_a_flag_that_nothing_would_read_is_refused(flags, line):
    with pytest.raises(InputError, match=line):
        make_formatter(UnlearnArgs(model="m", **flags), tokenizer(CHAT))


@pytest.mark.parametrize("own", [{"date_string": "26 Jul 2024", "system_prompt": "Be brief."}, {"date_string": "26 Jul 2024"}])
def test_a_folders_own_date_and_system_prompt_win_and_others_are_refused(own, tmp_path):
    own = {"system_prompt": None, **own}
    (tmp_path / PROMPT_FILE).write_text(json.dumps({"template": "chat", "tags": None, **own}))
    for flags in ({}, {"date_string": "26 Jul 2024"}, {"template": "chat"}):
        formatter, _ = make_formatter(UnlearnArgs(model=str(tmp_path), **flags), tokenizer(LLAMA32))
        assert (formatter.date_string, formatter.system_prompt) == (own["date_string"], own["system_prompt"])
        assert formatter.prompt("Why?").startswith("Today Date: 26 Jul 2024\n<u>" + (own["system_prompt"] or "Why?"))
    with pytest.raises(InputError, match=r"--date-string '10 Apr 2025': .* was trained with '26 Jul 2024' .*; drop the flag"):
        make_formatter(UnlearnArgs(model=str(tmp_path), date_string="10 Apr 2025"), tokenizer(LLAMA32))
    with pytest.raises(
        InputError, match=f"--system-prompt 'Think.': .* with '{own['system_prompt'] or 'none'}' .*; drop the flag"
    ):
        make_formatter(UnlearnArgs(model=str(tmp_path), system_prompt="Think."), tokenizer(LLAMA32))
    formatter, _ = make_formatter(UnlearnArgs(model=str(tmp_path), template="qa"), tokenizer(LLAMA32))
    assert (formatter.date_string, formatter.system_prompt) == (None, None)


@pytest.mark.parametrize(("template", "warns"), [(LLAMA32, True), (LLAMA31, True), (CHAT, False)])
def test_a_folder_of_an_older_version_gets_the_default_with_a_warning(template, warns, tmp_path, caplog):
    (tmp_path / PROMPT_FILE).write_text(json.dumps({"template": "chat", "tags": None}))
    with caplog.at_level(logging.WARNING):
        formatter, _ = make_formatter(UnlearnArgs(model=str(tmp_path)), tokenizer(template))
    assert formatter.date_string == ("10 Apr 2025" if warns else None)
    assert [record.message for record in caplog.records] == warns * [
        f"{tmp_path}: {PROMPT_FILE} is older than --date-string, which the day of its prompts can be given with; "
        "they are now of 10 Apr 2025, without thinking"
    ]
    args = UnlearnArgs(model=str(tmp_path), date_string="26 Jul 2024")
    if warns:
        assert make_formatter(args, tokenizer(template))[0].date_string == "26 Jul 2024"


@pytest.mark.parametrize("text", ["", "{", '{"template": "chat"}', "[]"])
def test_a_broken_prompt_file_is_said_so(text, tmp_path):
    (tmp_path / PROMPT_FILE).write_text(text)
    with pytest.raises(InputError, match=r"--model .*: prompt.json cannot be read \(.*\); write it anew, or remove it"):
        make_formatter(UnlearnArgs(model=str(tmp_path)), tokenizer(CHAT))


def test_a_run_keeps_its_date_and_system_prompt_for_the_next_command(model_with, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "Who was Ilvara Quenby?", "answer": "A geologist."}\n')
    args = UnlearnArgs(
        model=model_with(LLAMA32),
        forget_file=str(tmp_path / "rows.jsonl"),
        forget_losses=("NPO+none",),
        max_steps=1,
        eval=False,
        date_string="3 Feb 2001",
        system_prompt="Be brief.",
        output_dir=str(tmp_path / "out"),
    )
    (result,) = run(args).tasks
    saved = json.loads((result.model / PROMPT_FILE).read_text())
    assert saved == {"template": "chat", "tags": None, "date_string": "3 Feb 2001", "system_prompt": "Be brief."}
    config = load_yaml(result.folder / "config.yaml", UnlearnArgs)
    assert (config.template, config.date_string, config.system_prompt) == ("chat", "3 Feb 2001", "Be brief.")
    formatter = formatter_of(str(result.model))
    assert formatter.prompt("Why?") == "Today Date: 3 Feb 2001\n<u>Be brief.</u><u>Why?</u><a>"
    with pytest.raises(InputError, match=r"--date-string '10 Apr 2025': .* was trained with '3 Feb 2001'"):
        formatter_of(str(result.model), date_string="10 Apr 2025")


def test_a_run_from_before_the_flag_goes_on(tmp_path):
    write_config(tmp_path / "config.yaml", {"model": "m"})
    defaults = {**parse(UnlearnArgs, ["--model", "m"]).__dict__}
    resolved = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    check_same(tmp_path / "config.yaml", resolved | {"date_string": "10 Apr 2025"}, UnlearnArgs)
    with pytest.raises(InputError, match=r"--resume: --system-prompt was None in .* and is Be brief.; give the same value"):
        check_same(tmp_path / "config.yaml", resolved | {"system_prompt": "Be brief."}, UnlearnArgs)


# --------------------------------------------------------------------------------------------------------------- what is said


def test_thinking_is_off_where_a_template_has_it():
    qwen3 = CHAT + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    smollm3 = "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}{{ enable_thinking }}" + CHAT
    for template, prompt in ((qwen3, "<u>Why?</u><a><think>\n\n</think>\n\n"), (smollm3, "False<u>Why?</u><a>")):
        assert make_formatter(UnlearnArgs(model="m"), tokenizer(template))[0].prompt("Why?") == prompt


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('First message must be system') }}", "First message must be system"),
        ({"rag": CHAT, "tool_use": CHAT}, "This model has multiple chat templates with no default"),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ messages[0].content.nothing() }}", "has no attribute 'nothing'"),
        ("{{ messages[0]['content'][0]['text'] + 'x' }}", "has no attribute 'text'"),
    ],
)
def test_a_template_that_fails_does_so_in_one_line_of_its_own_words(template, reason):
    made = tokenizer(template)
    with pytest.raises(InputError, match=f"--model .*: its chat template cannot be used .*{reason}.*; give --template qa$"):
        make_formatter(UnlearnArgs(model="m"), made)
    assert make_formatter(UnlearnArgs(model="m", template="qa"), made)[1] == "qa"


def test_named_templates_are_read_where_one_is_the_default():
    formatter, _ = make_formatter(UnlearnArgs(model="m"), tokenizer({"rag": "no", "default": CHAT}))
    assert formatter.prompt("Why?") == "<u>Why?</u><a>"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<u>{% for c in m['content'] %}{{ c['text'] }}{% endfor %}</u>{% endfor %}<a>",
        "{% for m in messages %}{% if m.role == 'human' %}{{ m.content }}{% endif %}{% endfor %}<a>",
        "<a>",
    ],
)
def test_a_template_without_the_question_is_refused(template):
    with pytest.raises(InputError, match=r"its chat template does not write the question 'Who\?'; give --template qa"):
        make_formatter(UnlearnArgs(model="m"), tokenizer(template))


def test_a_question_that_a_template_leaves_out_is_refused_and_one_that_it_trims_is_not():
    template = "{% for m in messages %}{{ m.content.split('#')[0] | trim }}|{% endfor %}"
    formatter, _ = make_formatter(UnlearnArgs(model="m"), tokenizer(template))
    assert formatter.prompt(" Why? ") == "Why?|"
    with pytest.raises(InputError, match="does not write the question 'What is C#, and why"):
        formatter.prompt("What is C#, and why?")


def test_a_template_without_a_place_for_a_system_prompt_is_said_so():
    gemma = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
    silent = CHAT.replace("for m in messages", "for m in messages if m.role != 'system'")
    args = UnlearnArgs(model="m", system_prompt="Be brief.")
    with pytest.raises(InputError, match=r"System role not supported.*; drop --system-prompt, or give --template qa"):
        make_formatter(args, tokenizer(gemma))
    with pytest.raises(
        InputError, match=r"--system-prompt 'Be brief.': the chat template of .* does not write it; drop the flag"
    ):
        make_formatter(args, tokenizer(silent))
    assert make_formatter(args, tokenizer(CHAT))[0].prompt("Why?") == "<u>Be brief.</u><u>Why?</u><a>"


# -------------------------------------------------------------------------------------------------------- the end of a turn


def test_generation_stops_at_the_end_of_a_turn_which_is_in_no_answer(model_with, tmp_path, monkeypatch):
    """The turn ends with ordinary text here, which a decoder does not leave out as it does a special token."""
    folder = model_with("{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}")
    loaded = load_model(EvalArgs(model=folder), start_accelerator(EvalArgs(model=folder)))
    end = loaded.formatter.end
    assert loaded.tokenizer.decode([end]) == "<"
    assert end_tokens(loaded) == sorted({end, loaded.tokenizer.eos_token_id})
    said = loaded.tokenizer("A geologist.")["input_ids"]

    def answer(self, input_ids, generation_config, **_):
        assert generation_config.eos_token_id == end_tokens(loaded)
        return input_ids.new_tensor([[*row, *said, end, *said] for row in input_ids.tolist()])

    monkeypatch.setattr(type(loaded.model), "generate", answer)
    monkeypatch.setattr("dualoptim.models.load.answered_at_once", lambda *_: "any")  # the probe generates as well
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Who was Ilvara Quenby?", "answer": "A geologist."}\n')
    evaluate(EvalArgs(model=folder, forget_file=str(rows), output_dir=str(tmp_path / "out")))
    (record,) = map(json.loads, (tmp_path / "out/eval/forget.jsonl").read_text().splitlines())
    assert record["generated"] == "A geologist."


def test_the_clock_says_what_strftime_says():
    day = datetime(2025, 4, 10)
    for directive in ("%d %b %Y", "%Y-%m-%d", "%A %-d %B", "%j", "%H:%M", "%y%m%d", "%I:%M %p", "%x"):
        chat = Chat(tokenizer("{{ strftime_now('" + directive + "') }}|{{ messages[0].content }}"))
        assert chat.prompt("Why?") == f"{day.strftime(directive)}|Why?"
