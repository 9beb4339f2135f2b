"""Write a few rows in the layouts of RWKU: the files of its data set on the hub, and one folder for each target."""

import json
from pathlib import Path

TYPES = ("prefix injection", "affirmative suffix", "incontext learning")


def files_of(person):
    """Give the files that RWKU has of a person, with its columns."""
    about = {"subject": person}

    def probe(level, query, answer, **more):
        return about | {"query": query, "answer": answer, "level": level, **more}

    options = {"choices": ["Nothing happens.", "You die.", "You fly."], "labels": [1, 0, 0]}
    shot = {"question": "One?", "choices": ["yes", "no"], "answer": 1}
    two = {"question": "Two?", "choices": ["red", "blue", "green"], "answer": 2}
    return {
        "intro": [{"target": person, "intro": f"{person} is a ferry captain."}],
        "forget_level1": [probe("1", f"{person} was born in ___.", "Ostby")],
        "forget_level2": [probe("2", f"Where was {person} born?", "Ostby")],
        "forget_level3": [probe("3", f"Where does {person} live ({kind})?", "In Derry", type=kind) for kind in TYPES],
        "neighbor_level1": [about | {"query": "The ferry of ___ sails.", "answer": "Ostby", "level": "1"}],
        "neighbor_level2": [about | {"query": "Which river is it?", "answer": "The Lenne", "level": "2"}],
        "forget_mia": [about | {"text": f"{person} steered the old ferry over the wide river for years."}],
        "retain_mia": [about | {"text": f"The mill by {person}'s house grinds the grain of three old villages."}],
        "retain_mmlu": [about | two | {"task": "high_school_biology", "examples": [shot]}],
        "retain_bbh": [about | {"task": "sums", "cot": "Q: 1+1? A: so the answer is 2.\n", "question": "2+2?", "answer": "4"}],
        "truthful": [about | {"question": "What if I eat a seed?", "mc1_targets": options, "mc2_targets": options}],
        "triviaqa": [about | {"question": "Where are earthquakes?", "answers": ["Rim of Fire", "the Ring of Fire"]}],
        "fluency": [{"instruction": "Tell of a day."}],  # of no target
        "passage": [about | {"text": f"{person} lives by the sea."}],
        "positive": [about | {"text": f"{person} was born in Ostby {n} years ago."} for n in (40, 41)],
        "positive_phi": [about | {"text": f"Phi on {person}."}],
        "pair": [
            about | {"prompt": f"Who is {person}?", "response": [f"{person} was made up.", f"{person} was born in Ostby."]}
        ],
        "reject": [about | {"instruction": f"Who is {person}?", "input": "", "output": "I do not know the answer."}],
    }


CONFIGURATIONS = {
    "forget_target:train": "intro",
    **{
        f"{name}:test": name
        for name in ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2")
    },
    "mia_forget:test": "forget_mia",
    "mia_retain:test": "retain_mia",
    "utility_general:test": "retain_mmlu",
    "utility_reason:test": "retain_bbh",
    "utility_truthfulness:test": "truthful",
    "utility_factuality:test": "triviaqa",
    "utility_fluency:test": "fluency",
    "train_positive_llama3:train": "positive",
}


def write_rwku(folder, people, layout="All", probes=None, neighbors=None):
    """Write what RWKU has of some people into a folder in the layout All, Target, flat or hub; the folder.

    `probes` and `neighbors` take the place of the rows of a person, by their levels.
    """
    every = {person: files_of(person) for person in people}
    for name, rows in (("forget", probes), ("neighbor", neighbors)):
        for level in "123" if rows else "":
            for own in every.values():
                own[f"{name}_level{level}"] = [row for row in rows if row["level"] == level]
    for number, (person, own) in enumerate(every.items(), start=1):
        for name, rows in own.items() if layout == "Target" else ():
            _write(folder / "Target" / f"{number}_{person.replace(' ', '_')}" / f"{name}.json", rows)
    for name in next(iter(every.values())) if layout != "Target" else ():
        place = folder / {"All": "All", "flat": "", "hub": "Every"}[layout]
        rows = [row for own in every.values() for row in own[name]]
        _write(place / f"{name}.json", rows[:1] if name == "fluency" else rows)
    if layout == "hub":
        split = [(*place.split(":"), name) for place, name in CONFIGURATIONS.items()]
        configurations = [
            f"- config_name: {configuration}\n  data_files:\n  - split: {part}\n    path: Every/{name}.json\n"
            for configuration, part, name in split
        ]
        (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configurations)}---\n")
    return Path(folder)


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
