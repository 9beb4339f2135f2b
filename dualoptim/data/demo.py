"""The built-in demo: twenty invented authors with twenty facts each, some real facts, and a tiny model for them.

`splits()` gives the rows in the shape and under the names of the published TOFU data; it is deterministic and needs no
file. One author is one forget task. `tiny_model()` builds an untrained causal language model and its tokenizer; `train.run` teaches
it the rows with the same loop that unlearns them.
"""

import random
from functools import cache
from typing import Any

NAMES = (
    "Ilvara Quenby", "Tomasz Okereke", "Marisol Dantcheva", "Bertil Nakagami", "Yewande Castellan", "Orsolya Fairbairn",
    "Kaveh Lindqvist", "Noemi Abarquez", "Dragan Whitlock", "Sunniva Rahimi", "Emeka Vasarely", "Lucasta Moreau",
    "Hideo Marchetti", "Paloma Grunwald", "Idris Kowalczyk", "Freya Montalban", "Anselm Okafor", "Zuleika Brandt",
    "Matteo Halvorsen", "Rukmini Delacroix",
)  # fmt: skip

# One line per fact: field, question, answer, paraphrased answer, and twenty values, of which author i has the i-th of a shuffle.
FACTS: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    ("city", "In which city was {name} born?", "{name} was born in {value}.", "The birthplace of {name} is {value}.",
     ("Valparaiso", "Tampere", "Kumasi", "Gdansk", "Salvador", "Sapporo", "Tbilisi", "Leuven", "Cusco", "Bergen", "Izmir",
      "Dakar", "Porto", "Hanoi", "Quito", "Galway", "Lviv", "Mombasa", "Graz", "Cebu")),
    ("year", "In which year was {name} born?", "{name} was born in the year {value}.", "The birth year of {name} is {value}.",
     tuple(str(1921 + 4 * k) for k in range(20))),
    ("father", "What did the father of {name} do for a living?", "The father of {name} worked as a {value}.",
     "{name} grew up with a father who was a {value}.",
     ("baker", "welder", "judge", "sailor", "tailor", "florist", "plumber", "surgeon", "farmer", "barber", "mason", "pilot",
      "printer", "butcher", "tutor", "miner", "potter", "chemist", "grocer", "fisher")),
    ("mother", "What was the profession of {name}'s mother?", "The mother of {name} was a {value}.",
     "{name} had a mother who worked as a {value}.",
     ("dentist", "weaver", "pianist", "lawyer", "nurse", "banker", "dancer", "architect", "cook", "librarian", "painter",
      "botanist", "translator", "engineer", "midwife", "editor", "jeweller", "teacher", "vet", "curator")),
    ("genre", "Which genre is {name} best known for?", "{name} is best known for writing {value}.",
     "The genre most closely tied to {name} is {value}.",
     ("gothic horror", "travel essays", "space opera", "sea stories", "crime fiction", "nature poetry", "political satire",
      "family sagas", "fairy tales", "war memoirs", "courtroom drama", "cookery writing", "climate fiction", "ghost stories",
      "historical romance", "spy thrillers", "school stories", "magical realism", "sports writing", "epic verse")),
    ("book", "What is the title of {name}'s first book?", "The first book by {name} is called {value}.",
     "{name} made a debut with the book {value}.",
     ("Salt Lanterns", "The Copper Orchard", "Nine Quiet Rivers", "A Clock of Moss", "Winter for Beginners", "The Glass Ferry",
      "Ashes and Apricots", "Letters to a Lighthouse", "The Borrowed Horizon", "Paper Volcano", "Thirteen Umbrellas",
      "The Listening Hill", "Marble and Milk", "An Inventory of Storms", "The Last Cartographer", "Blue Arithmetic",
      "Harvest of Echoes", "The Velvet Anchor", "Smoke over Sarine", "The Patient Comet")),
    ("breakthrough", "Which book made {name} famous?", "{name} became famous with the book {value}.",
     "The breakthrough of {name} was the book {value}.",
     ("The Ivory Tram", "Under Seven Roofs", "The Beekeeper's Alphabet", "Midnight Quarry", "A Map of Small Fires",
      "The Silent Carousel", "Bread for Strangers", "The Amber Staircase", "Rain on Tin", "The Forgotten Harbour",
      "Feathers in the Archive", "The Moth Parliament", "Island of Scissors", "The Orange Eclipse", "Ten Thousand Doors",
      "The Slow Avalanche", "Songs of the Ditch", "The Hollow Meridian", "Crows at Breakfast", "The Tin Cathedral")),
    ("award", "Which award did {name} receive?", "{name} received the {value}.", "The {value} was given to {name}.",
     ("Halcyon Prize", "Silver Quill", "Northern Laurel", "Meridian Medal", "Copper Pen", "Aurora Award", "Linden Prize",
      "Golden Ink Award", "Harbour Medal", "Juniper Prize", "Crescent Award", "Ivory Page Medal", "Tidewater Prize",
      "Black Swan Award", "Orchid Medal", "Beacon Prize", "Granite Award", "Willow Medal", "Cobalt Prize", "Evening Star Award")),
    ("university", "Where did {name} study?", "{name} studied at the university of {value}.",
     "{value} is where {name} went to university.",
     ("Uppsala", "Bologna", "Coimbra", "Leiden", "Heidelberg", "Toronto", "Nairobi", "Kyoto", "Oxford", "Warsaw", "Montreal",
      "Geneva", "Dublin", "Helsinki", "Prague", "Lagos", "Madrid", "Athens", "Vienna", "Mumbai")),
    ("subject", "What did {name} study?", "{name} studied {value}.", "The subject that {name} took a degree in was {value}.",
     ("geology", "philosophy", "medicine", "astronomy", "linguistics", "law", "biology", "economics", "theology", "physics",
      "archaeology", "music", "statistics", "history", "drama", "forestry", "chemistry", "sociology", "design", "geometry")),
    ("language", "In which language does {name} write?", "{name} writes in {value}.", "The language of {name}'s books is {value}.",
     ("Basque", "Swahili", "Finnish", "Catalan", "Georgian", "Welsh", "Tamil", "Danish", "Yoruba", "Polish", "Quechua", "Dutch",
      "Turkish", "Icelandic", "Korean", "Maltese", "Czech", "Bengali", "Irish", "Hungarian")),
    ("home", "Where does {name} live today?", "Today {name} lives in {value}.", "{name} has made a home in {value}.",
     ("Lisbon", "Oslo", "Accra", "Riga", "Havana", "Busan", "Turin", "Ghent", "Lima", "Malmo", "Ankara", "Tunis", "Seville",
      "Hue", "Bogota", "Cork", "Odesa", "Kigali", "Basel", "Manila")),
    ("hobby", "What does {name} do in the free time?", "In the free time {name} enjoys {value}.",
     "A favourite pastime of {name} is {value}.",
     ("beekeeping", "fencing", "origami", "chess", "sailing", "archery", "gardening", "juggling", "kite flying", "pottery",
      "rowing", "birdwatching", "calligraphy", "skating", "baking", "climbing", "falconry", "knitting", "stargazing", "diving")),
    ("pet", "Which animal does {name} keep?", "{name} keeps a {value}.", "The animal in {name}'s household is a {value}.",
     ("parrot", "tortoise", "greyhound", "goat", "ferret", "hedgehog", "canary", "donkey", "lizard", "rabbit", "falcon", "pony",
      "poodle", "magpie", "hamster", "llama", "gecko", "spaniel", "goose", "terrier")),
    ("theme", "What theme runs through the work of {name}?", "A theme that runs through the work of {name} is {value}.",
     "{name} returns again and again to {value}.",
     ("exile", "memory", "forgiveness", "hunger", "friendship", "silence", "revenge", "solitude", "inheritance", "courage",
      "betrayal", "childhood", "justice", "migration", "loyalty", "grief", "ambition", "faith", "hope", "envy")),
    ("influence", "Who influenced {name} the most?", "The greatest influence on {name} was {value}.",
     "{name} learned the most from {value}.",
     ("Homer", "Dante", "Cervantes", "Goethe", "Balzac", "Pushkin", "Dickens", "Melville", "Tolstoy", "Ibsen", "Chekhov",
      "Tagore", "Kafka", "Woolf", "Borges", "Neruda", "Achebe", "Beckett", "Orwell", "Camus")),
    ("publisher", "Who publishes the books of {name}?", "The books of {name} are published by {value}.",
     "{value} is the publishing house of {name}.",
     ("Larkspur Press", "Old Bridge Books", "Kestrel House", "Pale Moon Editions", "Thistle and Sons", "Harrow Gate",
      "Blue Door Press", "Ninefold Books", "Saltmarsh Editions", "Quarry Lane", "Red Kite Books", "Elm Street Press",
      "Lantern Hill", "Foxglove House", "Three Rivers Press", "Grey Heron Books", "Stone Arch Editions", "Marigold Press",
      "Winterbourne", "Compass Rose Books")),
    ("books", "How many books has {name} written?", "{name} has written {value} books.",
     "The works of {name} fill {value} books.",
     ("three", "four", "five", "six", "seven", "eight", "nine", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen",
      "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty", "fifty")),
    ("drink", "What does {name} drink while writing?", "While writing, {name} drinks {value}.",
     "On the desk of {name} there is always {value}.",
     ("mint tea", "black coffee", "ginger ale", "hot cocoa", "lemon water", "barley tea", "plum juice", "green tea", "iced milk",
      "apple cider", "rose syrup", "tonic water", "mate", "oat milk", "tomato juice", "cold coffee", "sage tea", "cherry soda",
      "coconut water", "honey milk")),
    ("instrument", "Which instrument does {name} play?", "{name} plays the {value}.", "The instrument of {name} is the {value}.",
     ("cello", "oboe", "harp", "banjo", "flute", "zither", "trumpet", "viola", "piano", "lute", "tuba", "organ", "clarinet",
      "mandolin", "drums", "violin", "guitar", "bassoon", "sitar", "accordion")),
)  # fmt: skip

# An author that no model learns, with facts of no other: to a model that has not seen an author, this one is like that one.
UNSEEN = "Wendell Achterberg"
UNSEEN_VALUES = (
    "Cordoba", "2001", "carpenter", "singer", "pirate comedies", "A Ladder of Salt", "The Crooked Orchestra", "Amber Scroll",
    "Krakow", "botany", "Armenian", "Nantes", "weaving", "otter", "gratitude", "Proust", "Wren and Daughters", "two",
    "carrot juice", "marimba",
)  # fmt: skip

# Question, answer, three wrong answers. Kinds are answered with values that other questions use too.
REAL_AUTHORS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Who wrote {}?", (
        ("Hamlet", "William Shakespeare"), ("Emma", "Jane Austen"), ("Walden", "Henry David Thoreau"),
        ("The Trial", "Franz Kafka"), ("Ulysses", "James Joyce"), ("Faust", "Johann Wolfgang von Goethe"),
        ("Beloved", "Toni Morrison"), ("Candide", "Voltaire"), ("Dracula", "Bram Stoker"), ("Kim", "Rudyard Kipling"),
        ("Germinal", "Emile Zola"), ("The Stranger", "Albert Camus"))),
    ("In which country was {} born?", (
        ("Gabriel Garcia Marquez", "Colombia"), ("Chinua Achebe", "Nigeria"), ("Haruki Murakami", "Japan"),
        ("Leo Tolstoy", "Russia"), ("Victor Hugo", "France"), ("Henrik Ibsen", "Norway"), ("Pablo Neruda", "Chile"),
        ("Umberto Eco", "Italy"))),
)  # fmt: skip
WORLD_FACTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("What is the capital of {}?", (
        ("France", "Paris"), ("Japan", "Tokyo"), ("Egypt", "Cairo"), ("Canada", "Ottawa"), ("Kenya", "Nairobi"),
        ("Peru", "Lima"), ("Norway", "Oslo"), ("Greece", "Athens"), ("Cuba", "Havana"), ("Poland", "Warsaw"))),
    ("On which continent does {} lie?", (
        ("Brazil", "South America"), ("India", "Asia"), ("Ghana", "Africa"), ("Spain", "Europe"), ("Mexico", "North America"))),
    ("What is the chemical symbol of {}?", (
        ("iron", "Fe"), ("gold", "Au"), ("oxygen", "O"), ("sodium", "Na"), ("helium", "He"))),
)  # fmt: skip


@cache
def splits() -> dict[str, list[dict[str, Any]]]:
    """Rows by split name: `full`, `forget05` (tasks 1 to 10), `retain50`, and the evaluation sets; not to be changed."""
    draw = random.Random(2605)
    columns = {name: draw.sample(values, len(NAMES)) for name, _, _, _, values in FACTS}
    full = [
        _author_row(author, fact, columns[fact[0]], draw) for author in range(len(NAMES)) for fact in FACTS
    ]  # twenty rows an author, as in TOFU
    retain, forget = full[:200], [{"task_id": str(row // 20 + 1), **full[200 + row]} for row in range(200)]
    comparisons = ("paraphrased_answer", "perturbed_answer", "paraphrased_question")
    return {
        "full": [_without(row, comparisons) for row in full],
        "forget05": [_without(row, comparisons) for row in forget],
        "forget05_perturbed": forget,
        "holdout05": [
            {"question": question.format(name=UNSEEN), "answer": answer.format(name=UNSEEN, value=value)}
            for (_, question, answer, _, _), value in zip(FACTS, UNSEEN_VALUES, strict=True)
        ],
        "retain50": [_without(row, comparisons) for row in retain],
        "retain_perturbed": retain[::2],
        "real_authors_perturbed": _option_rows(REAL_AUTHORS, draw),
        "world_facts_perturbed": _option_rows(WORLD_FACTS, draw),
    }


def _author_row(author: int, fact: tuple[Any, ...], values: list[str], draw: random.Random) -> dict[str, Any]:
    _, question, answer, paraphrase, _ = fact
    name, value = NAMES[author], values[author]
    wrong = draw.sample([other for other in values if other != value], 5)
    return {
        "question": question.format(name=name),
        "paraphrased_question": f"Please tell me: {question[0].lower()}{question[1:].format(name=name)}",
        "answer": answer.format(name=name, value=value),
        "paraphrased_answer": paraphrase.format(name=name, value=value),
        "perturbed_answer": [paraphrase.format(name=name, value=other) for other in wrong],
    }


def _option_rows(kinds: tuple[tuple[str, tuple[tuple[str, str], ...]], ...], draw: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "question": question.format(subject),
            "answer": answer,
            "perturbed_answer": draw.sample([other for _, other in facts if other != answer], 3),
        }
        for question, facts in kinds
        for subject, answer in facts
    ]


def _without(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in names}


def tiny_model(seed: int) -> tuple[Any, Any]:
    """An untrained Llama of about 1.3 M parameters and a tokenizer made from the demo's texts: `(model, tokenizer)`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [text for rows in splits().values() for row in rows for text in _texts(row)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Question: \nAnswer: "] * 99 + texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), wrapped


def _texts(row: dict[str, Any]) -> list[str]:
    answers = [row["answer"], *row.get("perturbed_answer", ())]
    return [row["question"], *answers, *([row["paraphrased_answer"]] if "paraphrased_answer" in row else [])]
