"""Compute ROUGE-L of texts as the package `rouge` does, by which RWKU measures: of distinct words, sentence by sentence.

A sentence ends at every full stop, `3.5` is two; words are what stands between blanks, with case and punctuation.
"""

from collections.abc import Sequence


def distinct_rouge(answer: str, generated: str) -> tuple[float, float]:
    """Compute recall and F1 of `generated` against `answer`, both 0..1; 0 where a text has no sentence.

    Recall is the share of the answer's distinct words that are in the longest common subsequence of one of its sentences and
    one of the other text's. The package stops with an error at a text of nothing but full stops.
    """
    true, own = _sentences(answer), _sentences(generated)
    if not true or not own:
        return 0.0, 0.0
    common = {word for one in true for other in own for word in _common(one, other)}
    recall, precision = (len(common) / len({word for one in text for word in one}) for text in (true, own))
    return recall, 2 * recall * precision / (recall + precision + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    """Split a text into sentences of words; one of blanks alone has one empty word."""
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _common(one: Sequence[str], other: Sequence[str]) -> set[str]:
    """Find the words of the longest common subsequence, of several the one that takes the latest words of `one`."""
    lengths = [[0] * (len(other) + 1)]
    for word in one:
        before, row = lengths[-1], [0]
        for column, against in enumerate(other):
            row.append(before[column] + 1 if word == against else max(before[column + 1], row[column]))
        lengths.append(row)
    words, i, j = set[str](), len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            words.add(one[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
