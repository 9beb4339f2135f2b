"""Models that compare two texts: a sentence encoder for cosine similarity, and a classifier for entailment."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from dualoptim.config.args import MeasureArgs
from dualoptim.models.checkpoint import weights_hash
from dualoptim.errors import InputError, reason

_TEXTS_AT_ONCE = 32


class SentenceEncoder:
    """Cosine similarity of sentence embeddings, by the package sentence-transformers."""

    def __init__(self, name: str, device: torch.device) -> None:
        """Load from a folder or the hub.

        Raises:
            InputError: if that fails.
        """
        from sentence_transformers import SentenceTransformer  # seconds, and only for this

        try:
            self._model = SentenceTransformer(_path_or_id(name), device=str(device))
        except Exception as error:  # OSError, ValueError, KeyError, by what is wrong
            raise InputError(
                f"--sentence-encoder {name}: cannot be loaded ({reason(error)}); give a folder or hub id of a sentence encoder"
            ) from None
        self._device, self.weights = device, weights_hash(self._model)

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The cosine of each pair of texts, 0 where it is negative, as published (arXiv 2410.08109)."""
        texts = [text for pair in pairs for text in pair]
        with torch.autocast(self._device.type, enabled=False):  # the launch's 16 bits are for the model that is judged
            vectors = self._model.encode(
                texts, batch_size=_TEXTS_AT_ONCE, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
            )
        cosines = (vectors[0::2] * vectors[1::2]).sum(-1)
        return cosines.clamp(0, 1).tolist()


class EntailmentModel:
    """Whether a premise entails a hypothesis, by a sequence classifier that has a label `entailment`."""

    def __init__(self, name: str, device: torch.device) -> None:
        """Load from a folder or the hub.

        Raises:
            InputError: if that fails, or the classifier has no such label.
        """
        source = _path_or_id(name)
        self._label = _entailment_label(name, source)
        self._device = device
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source)
            self._model = AutoModelForSequenceClassification.from_pretrained(source).float().to(device).eval()
        except Exception as error:
            raise InputError(_cannot_load(name, error)) from None
        self.weights = weights_hash(self._model)

    @torch.no_grad()
    def entails(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether `entailment` is the likeliest label of each pair (premise, hypothesis)."""
        found: list[bool] = []
        for start in range(0, len(pairs), _TEXTS_AT_ONCE):
            premises, hypotheses = zip(*pairs[start : start + _TEXTS_AT_ONCE], strict=True)
            encoded = self._tokenizer(list(premises), list(hypotheses), padding=True, truncation=True, return_tensors="pt").to(
                self._device
            )
            with torch.autocast(self._device.type, enabled=False):
                found += (self._model(**encoded).logits.argmax(-1) == self._label).tolist()
        return found


@dataclass(frozen=True)
class Judges:
    """The two models, each None where none was given."""

    encoder: SentenceEncoder | None = None
    entailment: EntailmentModel | None = None


def load_judges(args: MeasureArgs, device: torch.device) -> Judges:
    """What `--sentence-encoder` and `--entailment-model` name.

    Raises:
        InputError: if one of them cannot be loaded or does not fit.
    """
    return Judges(
        SentenceEncoder(args.sentence_encoder, device) if args.sentence_encoder else None,
        EntailmentModel(args.entailment_model, device) if args.entailment_model else None,
    )


def _path_or_id(name: str) -> str:
    """A folder of that name, with ~ expanded, or the hub id."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def _entailment_label(name: str, source: str) -> int:
    """The number of the label `entailment`."""
    try:
        labels: dict[int, str] = AutoConfig.from_pretrained(source).id2label
    except Exception as error:
        raise InputError(_cannot_load(name, error)) from None
    for number, label in labels.items():
        if label.lower() == "entailment":
            return int(number)
    raise InputError(
        f"--entailment-model {name}: its labels are {', '.join(labels.values())}, none of them entailment; give a model "
        "of natural language inference"
    )


def _cannot_load(name: str, error: Exception) -> str:
    return f"--entailment-model {name}: cannot be loaded ({reason(error)}); give a folder or hub id of a sequence classifier"
