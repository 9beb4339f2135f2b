"""The noise of sampled answers: Gumbel's distribution, a number for each place, whatever else is drawn and wherever."""

import pytest
import torch
from scipy.stats import kstest

from dualoptim.evaluation.generation import Gumbel
from dualoptim.evaluation.noise import gumbel, mixed, seed_of

SEEDS = torch.tensor([seed_of("sample", row, draw) for row in range(3) for draw in range(2)])


def test_hashes_of_long_numbers_are_splitmix64():
    """As its authors write it, in Python's numbers without a bound."""
    mask = 2**64 - 1

    def splitmix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    numbers = [0, 1, -1, 2**62 + 5, -(2**63), *SEEDS.tolist()]
    assert [value & mask for value in mixed(torch.tensor(numbers)).tolist()] == [splitmix(number & mask) for number in numbers]


def test_noise_is_gumbels_and_independent_between_places():
    noise = torch.cat([gumbel(SEEDS, torch.tensor(position), 20_000) for position in range(3)])
    assert kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 0.01
    uniform = (-(-noise).exp()).exp()
    together = torch.cat([uniform[:, :-1], uniform[:, 1:]])  # every place beside the next one in the vocabulary
    correlation = torch.corrcoef(together) - torch.eye(len(together))
    assert correlation.abs().max() < 5 / 20_000**0.5


def test_an_answers_noise_depends_on_its_seed_and_place_alone():
    alone = [gumbel(SEEDS[n : n + 1], torch.tensor([4 + n]), 50) for n in range(len(SEEDS))]
    assert torch.equal(gumbel(SEEDS, 4 + torch.arange(len(SEEDS)), 50), torch.cat(alone))
    assert torch.equal(gumbel(SEEDS, torch.tensor(4), 30), gumbel(SEEDS, torch.tensor(4), 50)[:, :30])
    assert len({row.tobytes() for row in torch.cat(alone).numpy()}) == len(SEEDS)


def test_a_processor_counts_places_from_where_each_answer_begins():
    seeds, scores = SEEDS[:2].tolist(), torch.zeros(2, 40)
    ids = torch.zeros(2, 9, dtype=torch.long)
    together = Gumbel(seeds, [6, 8], 2.0)(ids, scores)
    assert torch.equal(together[:1], Gumbel(seeds[:1], 6, 2.0)(ids[:1], scores[:1]))
    assert torch.equal(together[1:], Gumbel(seeds[1:], 3, 2.0)(ids[:1, :4], scores[:1]))  # after one token, shorter before


def test_seeds_are_the_same_everywhere():
    """What was drawn once is drawn again: on another machine, and by a later version that does not say otherwise."""
    assert seed_of("sample", 0, 0) == SEEDS[0]
    first = gumbel(SEEDS[:1], torch.tensor(0), 3)[0].tolist()
    assert first == pytest.approx([0.5973417856863822, -0.7053734359257191, 0.19759160239357604])
