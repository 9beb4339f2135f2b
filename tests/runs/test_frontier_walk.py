"""The campaign of the frontier's table tries as many rates as it needs: on curves whose answer is known."""

import importlib.util
import math
from pathlib import Path

import pytest

from dualoptim import evaluation


@pytest.fixture(scope="module")
def campaign():
    path = Path(__file__).parents[1] / "speed" / "frontier.py"
    spec = importlib.util.spec_from_file_location("frontier_campaign", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)  # where a script finds what lies beside it
        spec.loader.exec_module(module)
    return module


def walked(campaign, forgets, lines, seed, keeps=lambda _: 0.9):
    """The places that a seed tries, in their order."""
    tried = []
    while True:
        known = {line["place"]: line for line in lines if line["seed"] == seed}
        place = campaign.next_place(known, campaign._earlier(lines, seed) or [0])
        if place is None:
            return tried
        tried.append(place)
        lines.append({"place": place, "seed": seed, "forget": forgets(place), "unseen": keeps(place)})


def test_rates_climb_and_fall_until_each_seed_comes_to_the_levels(campaign):
    lines = []
    assert walked(campaign, lambda place: math.exp(-4.5 * 1.3**place), lines, 1) == [0, -2, -4, 2, 1]
    known = {line["place"]: line for line in lines}
    assert (campaign.around(known, 0.1), campaign.around(known, 0.003)) == ((-4, -2), (0, 1))
    # another seed begins there, and needs one more where it forgets less
    assert walked(campaign, lambda place: math.exp(-4.5 * 1.3**place), lines, 2) == [-4, -2, 0, 1]
    assert walked(campaign, lambda place: math.exp(-4.0 * 1.3**place), lines, 3) == [-4, -2, 0, 1, 2]


def test_a_curve_that_never_comes_there_ends(campaign):
    assert walked(campaign, lambda _: 0.5, [], 1) == [0, 2, 4, 6, 8, 10]
    assert walked(campaign, lambda _: 0.5, [], 1, lambda place: 0.9 if place < 4 else 0.1) == [0, 2, 4]
    assert walked(campaign, lambda _: 0.0001, [], 1) == [0, -2, -4, -6, -8, -10]
    assert walked(campaign, lambda place: "" if place > 2 else 0.5, [], 1) == [0, 2, 4], "a loss that is not finite"


def test_what_is_read_at_a_level_lies_on_a_line_in_the_logarithm(campaign):
    lines = [{"seed": seed, "forget": 10.0**-n, "relearned": 1 - 0.2 * n + seed} for seed in (1, 2) for n in (1, 2, 3)]
    expected = [1 + 0.2 * math.log10(0.003) + seed for seed in (1, 2)]
    assert campaign.between(lines, "relearned", 0.003) == pytest.approx(expected)
    assert campaign.between([line for line in lines if line["forget"] > 0.005], "relearned", 0.003) == []


def test_tables_have_every_optimizer_that_was_measured_also_one_that_is_gone(campaign, tmp_path):
    path = Path(evaluation.__file__).parent / "frontier.csv"
    runs = campaign.Runs(path)
    text = "\n".join(campaign.tables(campaign.Task(tmp_path), runs, campaign.PARTS))
    known = {part.title for part in campaign.PARTS}
    measured = {line["optimizer"] for line in runs.lines if line["part"] in known}
    assert measured - {one.title for one in campaign.CONTENDERS} == {"dual-adamw, forget steps by Muon, retain rate 1/3"}
    assert all(f"| {name} " in text for name in measured)
