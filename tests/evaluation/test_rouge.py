"""ROUGE-L recall: rouge_score's on Latin letters, right everywhere else."""

import random
import subprocess
import sys

import pytest
from rouge_score.rouge_scorer import RougeScorer

from dualoptim.evaluation.rouge import rouge_l_recall, words_beyond

WORDS = """the running quickly cities children studies relational conditional happy happiness nationalities writer's authors'
co-author 1,024 3.5% U.S.A. $12 e-mail café naïve Müller Łódź İstanbul œuvre Đà Nẵng cafe\u0301 straße
5\xa0µm ½ 2² 1ª C++ ﬁn …""".split()


def test_rouge_recall_equals_the_published_helper(shared_json):
    for case in shared_json("oracles/aggregates.json")["helpers"]["rouge"]:
        assert rouge_l_recall(case["gt"], case["gen"]) == pytest.approx(case["rougeL_recall"], abs=1e-12)


def test_values_on_latin_letters_are_those_of_rouge_score_to_the_digit():
    theirs, draw = RougeScorer(["rougeL"], use_stemmer=True), random.Random(0)
    accented = [chr(code) for code in (*range(32, 0x250), *range(0x300, 0x370), *range(0x1E00, 0x1F00), *range(0x2010, 0x2050))]
    for number in range(4000):
        pool, between = (WORDS, " ") if number % 2 else ([*accented, *"abcdefghijklmnop     " * 20], "")
        answer, generated = (between.join(draw.choices(pool, k=draw.randint(12, 40))) for _ in range(2))
        answer += " a"  # without one of a-z and 0-9 theirs is always 0
        assert rouge_l_recall(answer, generated) == theirs.score(answer, generated)["rougeL"].recall


@pytest.mark.parametrize(
    ("question", "answer", "words"),
    [
        ("What is the capital of France?", "The capital of France is Paris.", "paris"),
        ("In which cities did he live?", "He lived in one city, Lagos.", "one lagos"),  # other forms of the same words
        ("Is it Lagos or Accra?", "Lagos", "Lagos"),  # the question holds all
        ("法国的首都是哪里", "法国的首都是巴黎", "巴 黎"),
        ("👍🏽?", "👍 🎉", "🎉"),
        (None, "A passage of text.", "a passage of text"),
        ("", "Paris", "paris"),
        ("Who?", "?!", "!"),
    ],
)
def test_what_the_question_holds_is_no_part_of_what_an_answer_says(question, answer, words):
    assert sorted(words_beyond(question, answer).split()) == sorted(words.split())
    assert rouge_l_recall(words_beyond(question, answer), answer) == 1.0


def test_a_wrong_city_shares_no_word_with_the_fact_though_it_shares_five_of_six_with_the_answer():
    question, answer, wrong = (
        "What is the capital of France?",
        "The capital of France is Paris.",
        "The capital of France is Oslo.",
    )
    assert rouge_l_recall(answer, wrong) == pytest.approx(5 / 6)
    assert rouge_l_recall(words_beyond(question, answer), wrong) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "Она живёт в Париже.",
        "Η πόλη λέγεται Πάτρα.",
        "東京タワーは1958年に建てられた。",
        "กรุงเทพฯ เป็นเมืองหลวง",
        "हिन्दी में उत्तर दिया",
        "وُلِدت في القاهرة سنة ١٩٦٣",
        "ירושלים",
        "서울에서 태어났다",
        "பதில் தமிழில் உள்ளது",
        "မြန်မာဘာသာ",
        "ትግርኛ",
        "ལྷ་ས",
        "ＮＨＫ",
        "É",
        "👍🏽 🎉",
        "²",
        "?!",
    ],
)
def test_an_answer_given_word_for_word_has_recall_one_in_any_script(text):
    assert rouge_l_recall(text, text) == 1.0
    assert rouge_l_recall(text, f"{text} {text}") == 1.0
    assert rouge_l_recall(text, "") == 0.0
    assert rouge_l_recall(text, "Qwerty zxcvb") == 0.0


@pytest.mark.parametrize(
    ("answer", "generated", "recall"),
    [
        ("Она живёт в Париже", "она жила в париже", 3 / 4),  # words, whatever their case
        ("東京に住む", "京都に住む", 4 / 5),  # characters: 京 に 住 む
        ("ラーメン", "ラメン", 3 / 4),  # the long sound is a character
        ("ที่นี่", "ที่นั่น", 1 / 2),  # vowels and tones above belong to their consonant
        ("हिन्दी है", "हिन्दू है", 1 / 2),  # a vowel sign belongs to its word
        ("พูด ๑๒๓", "๑๒๓", 1 / 3),  # พู ด ๑๒๓
        ("二〇二四年", "二〇二三年", 4 / 5),
        ("она родилась in Oslo", "in Oslo", 2 / 4),  # a mixed text has words of both
        ("их два: ёж и йод", "их два: е\u0308ж и и\u0306од", 1.0),  # composed or not
        ("が", "か\u3099", 1.0),
    ],
)
def test_words_of_other_scripts_count_and_characters_where_no_space_stands(answer, generated, recall):
    assert rouge_l_recall(answer, generated) == pytest.approx(recall)


def test_it_brings_no_scikit_learn_and_leaves_it_to_others():
    code = """if True:
        import sys
        from dualoptim.evaluation.rouge import rouge_l_recall, words_beyond
        assert rouge_l_recall("the running dogs", "the dog ran") == 2 / 3
        print("pandas" in sys.modules, "sklearn" in sys.modules)
        import sklearn
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False False\n", done.stderr
