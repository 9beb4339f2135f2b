"""Every kind of tokenizer with every template: what is scored is the answer and its end, and nothing else."""

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dualoptim.data.prompts import TEMPLATES, Formatter, Tags
from dualoptim.data.rows import Row
from dualoptim.errors import InputError

TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|return|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = [
    "Question: Where is it?\nAnswer: Paris is the capital.",
    "user: assistant: model [INST] x [/INST]",
    "Zürich, Ça va 1984",
]
LLAMA3 = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def built(model, trainer, post=None, **parts):
    """A tokenizer of a few words. `post` is the layout of what the tokenizer adds by itself, such as `<s> $A`."""
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXTS * 9, trainer)
    if isinstance(post, str):
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=ids)
    elif post:
        tokenizer.post_processor = post
    return tokenizer


def byte_level(add_prefix_space=False, split=None, **parts):
    trainer = trainers.BpeTrainer(
        special_tokens=TOKENS, vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pre = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=split is None)
    if split:
        pre = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), pre])
    return built(models.BPE(), trainer, pre_tokenizer=pre, decoder=decoders.ByteLevel(), **parts)


def sentencepiece(normalizer):
    """As Llama-2's and Gemma's: spaces are letters, and what is not known is bytes."""
    trainer = trainers.BpeTrainer(special_tokens=[*TOKENS, *BYTES], vocab_size=400, show_progress=False)
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    pre = pre_tokenizers.Split("▁", "merged_with_next")
    return built(model, trainer, normalizer=normalizer, pre_tokenizer=pre, decoder=decoder, post="<s> $A")


def unigram(**parts):
    trainer = trainers.UnigramTrainer(special_tokens=TOKENS, unk_token="<unk>", vocab_size=120, show_progress=False)
    return built(models.Unigram(), trainer, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace(), **parts)


def word_piece(**parts):
    trainer = trainers.WordPieceTrainer(special_tokens=TOKENS, vocab_size=300, show_progress=False)
    return built(models.WordPiece(unk_token="<unk>"), trainer, decoder=decoders.WordPiece(), **parts)


def words():
    trainer = trainers.WordLevelTrainer(special_tokens=TOKENS, show_progress=False)
    return built(models.WordLevel(unk_token="<unk>"), trainer, pre_tokenizer=pre_tokenizers.Whitespace())


def characters():
    trainer = trainers.BpeTrainer(special_tokens=TOKENS, vocab_size=len(TOKENS), show_progress=False)
    pre = pre_tokenizers.Split("", "isolated")
    return built(models.BPE(unk_token="<unk>"), trainer, pre_tokenizer=pre, decoder=decoders.Fuse())


ASCII = normalizers.Replace(Regex(r"[^\x20-\x7e\n]"), "")
SQUEEZED = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
PLAIN = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Strip()])
METASPACE = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])

KINDS = {
    "bytes (GPT-2)": lambda: byte_level(),
    "bytes with a space in front, offsets without spaces": lambda: byte_level(
        True, post=processors.ByteLevel(trim_offsets=True)
    ),
    "bytes split as Llama-3's, which adds <s>": lambda: byte_level(split=LLAMA3, post="<s> $A"),
    "bytes of composed characters (Qwen)": lambda: byte_level(split=LLAMA3, normalizer=normalizers.NFC()),
    "bytes of ASCII alone: others are dropped": lambda: byte_level(normalizer=ASCII),
    "pieces (Llama-2)": lambda: sentencepiece(METASPACE),
    "pieces (Gemma)": lambda: sentencepiece(normalizers.Replace(" ", "▁")),
    "unigrams": lambda: unigram(),
    "unigrams of normalized text, which add </s> (T5)": lambda: unigram(normalizer=SQUEEZED, post="$A </s>"),
    "word pieces between two tokens (BERT)": lambda: word_piece(
        normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre_tokenizers.BertPreTokenizer(), post="<s> $A </s>"
    ),
    "word pieces without accents": lambda: word_piece(normalizer=PLAIN, pre_tokenizer=pre_tokenizers.Whitespace()),
    "words": words,
    "characters": characters,
}

CHATS = {  # the template, what stands before the answer, and the token that ends it
    "ChatML": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "Gemma": (
        "<s>{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
        "<s><|im_start|>user\nQ<end_of_turn>\n<|im_start|>model\n",
        "<end_of_turn>",
    ),
    "Llama-2": (  # with spaces around the answer
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] Q [/INST] ",
        "</s>",
    ),
    "Zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|user|>\nQ</s>\n<|assistant|>\n",
        "</s>",
    ),
    "an empty thought": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "a channel": (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' final' if m.role == 'assistant' }}:{{ m.content }}"
        "{{ '<|return|>' if m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
        "<|im_start|>user:Q<|im_end|><|im_start|>assistant final:",
        "<|return|>",
    ),
    "the next turn is the end": (  # GLM
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|user|>\nQ<|assistant|>\n",
        "<|user|>",
    ),
    "the next turn is the end, behind a line break": (  # Nemotron
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>user\nQ\n<|im_start|>assistant\n",
        "<|im_start|>",
    ),
    "an end unless the turn is the last": (
        "{% for m in messages %}<|im_start|>{{ m.role + ':' + m.content + ('' if loop.last else '<|im_end|>') }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|><|im_start|>assistant:{% endif %}",
        "<|im_start|>user:Q<|im_end|><|im_start|>assistant:",
        "<|im_end|>",
    ),
    "no end": (
        "{% for m in messages %}{{ '\n' + m.role + ': ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}",
        "\nuser: Q\nassistant: ",
        "</s>",
    ),
    "no answers": (
        "{% for m in messages if m.role == 'user' %}Q: {{ m.content }}\nA: {% endfor %}",
        "Q: Q\nA: ",
        "</s>",
    ),
}
QUESTIONS = ["Where is it?", "Où est-ce, 日本ﬁ\u200b"]
ANSWERS = [
    "Paris is the capital.",
    "日本 Ça va!",
    "1984",
    "ﬁne ① Zürich",
    "İstanbul",
    "\u200bword",
    "e\u0301te",
    "x",
    "two\nlines",
    "a  b",
]


def same(text: str) -> str:
    """Decoded text without what decoders say differently at the edges of a text."""
    return "".join(text.split()).replace("##", "")


def wrapped(kind, **names):
    return PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), **{"eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"} | names
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_and_its_end_are_scored_and_nothing_else(kind):
    tokenizer = wrapped(kind)

    def read(text: str) -> str:
        return same(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))

    for name, tags in {**TEMPLATES, "a space": Tags("", " "), "a question mark": Tags("", "?")}.items():
        formatter = Formatter(tokenizer, tags, 500)
        for question in QUESTIONS:
            for answer in filter(read, ANSWERS):  # what a tokenizer leaves nothing of is refused
                example = formatter.example(question, answer)
                scored = same(tokenizer.decode(example.ids[example.start : -1]))
                assert scored == read(answer), (name, question, answer)
                assert example.ids[-1] == tokenizer.eos_token_id
                assert example.ids.count(tokenizer.eos_token_id) == 1
                assert example.ids.count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_templates_texts_are_read_as_it_writes_them_up_to_the_end_of_the_answer(kind, chat):
    tokenizer = wrapped(kind)
    tokenizer.chat_template, prompt, end = CHATS[chat]
    formatter = Formatter(tokenizer, None, 500)
    assert formatter.prompt("Q") == prompt
    assert formatter.end == tokenizer.convert_tokens_to_ids(end)
    for question in QUESTIONS:
        for answer in ANSWERS:
            alone = same(tokenizer.decode(tokenizer(answer, add_special_tokens=False)["input_ids"]))
            if not alone:
                continue  # what a tokenizer leaves nothing of is refused
            example = formatter.example(question, answer)
            assert example.ids[-1] == formatter.end
            assert same(tokenizer.decode(example.ids[example.start : -1])) == alone
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            whole = tokenizer.apply_chat_template(messages, enable_thinking=False)["input_ids"]
            if chat == "no answers":
                continue
            assert example.ids[:-1] == whole[: len(example.ids) - 1]
            assert example.ids[-1:] == (whole[len(example.ids) - 1 :][:1] or [formatter.end])


@pytest.mark.parametrize("names", [{"pad_token": "</s>"}, {"bos_token": None}, {"unk_token": None}, {"bos_token": "</s>"}])
@pytest.mark.parametrize("kind", ["bytes (GPT-2)", "pieces (Gemma)"])
def test_tokens_that_are_missing_or_one_and_the_same_change_nothing(kind, names):
    examples = []
    for tokenizer in (wrapped(kind), wrapped(kind, **names)):
        tokenizer.chat_template = CHATS["ChatML"][0]
        for tags in (TEMPLATES["qa"], None):
            examples.append(Formatter(tokenizer, tags, 500).example("Where is it?", "Paris."))
    assert examples[:2] == examples[2:]


def test_an_added_token_that_takes_the_blanks_behind_it_is_not_scored():
    """Phi-3's `<|assistant|>` takes the line break behind it, and the first space of an answer with it."""
    tokenizer = wrapped("bytes (GPT-2)")
    tokenizer.add_tokens([AddedToken("<|bot|>", rstrip=True, special=True)])
    example = Formatter(tokenizer, Tags("", "<|bot|>\n"), 500).example("Where is it?", " Paris")
    assert tokenizer.decode(example.ids[example.start : -1]) == "Paris"


@pytest.mark.parametrize(
    ("template", "end"),
    [("{{ m.role }}: {{ m.content }}\n", "\n"), ("<u>{{ m.content }}</u>", "<"), ("<{{ m.role }}>{{ m.content }} ", "</s>")],
)
def test_ordinary_text_ends_a_turn_with_its_first_token_but_a_space_does_not(template, end):
    tokenizer = wrapped("bytes (GPT-2)")
    tokenizer.chat_template = f"{{% for m in messages %}}{template}{{% endfor %}}"
    formatter = Formatter(tokenizer, None, 500)
    assert tokenizer.decode([formatter.end]) == end
    example = formatter.example("Where is it?", "Paris.")
    assert tokenizer.decode(example.ids[example.start :]).strip(" ") == f"Paris.{end}"


@pytest.mark.parametrize("kind", ["bytes of ASCII alone: others are dropped", "word pieces between two tokens (BERT)"])
@pytest.mark.parametrize("chat", [None, "ChatML", "Llama-2"])
def test_an_answer_of_which_the_tokenizer_leaves_nothing_is_refused(kind, chat):
    tokenizer = wrapped(kind)
    tokenizer.chat_template = CHATS[chat or "ChatML"][0]
    formatter = Formatter(tokenizer, None if chat else TEMPLATES["qa"], 500)
    with pytest.raises(InputError, match=r"leaves nothing of the answer '\\u200b' to 'Where\?'; give another text"):
        formatter.example("Where?", "\u200b")
    with pytest.raises(InputError, match="the model's tokenizer leaves nothing of"):
        formatter.example(None, formatter.cut_passage(Row(None, "\u200b"))[0].answer)


def test_a_beginning_that_tags_and_tokenizer_write_is_written_once():
    tokenizer = wrapped("pieces (Llama-2)")
    for start in ("<s>[INST] ", "[INST] "):
        ids = Formatter(tokenizer, Tags(start, " [/INST] "), 500).example("Where is it?", "Paris").ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
