"""Load models that judge texts: a sentence encoder for cosine similarity, classifiers of entailment and of gibberish."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import compare_versions
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from dualoptim.config.args import MeasureArgs
from dualoptim.data.batches import in_length_order
from dualoptim.data.own import load_refusals
from dualoptim.errors import InputError, blamed
from dualoptim.models.hashing import weights_hash
from dualoptim.models.launch import say
from dualoptim.models.loaded import precision_of
from dualoptim.models.weights import check_loaded, no_load_report

_TEXTS_AT_ONCE = 32
_ENCODERS = "6"

ENTAILMENT_FLOOR = 0.1
"""ROUGE-L recall below which an answer counts as not entailed, whatever the model of entailment says."""


class SentenceEncoder:
    """Compares sentences by the cosine of their embeddings, with the package sentence-transformers."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Load an encoder from a folder or the hub.

        Raises:
            InputError: if that fails.
        """
        if compare_versions("sentence-transformers", "<", _ENCODERS):
            raise InputError(
                f"--sentence-encoder {name} needs sentence-transformers {_ENCODERS} or newer, because older ones run code that "
                f"lies beside a model; pip install 'sentence-transformers>={_ENCODERS}'"
            )
        from sentence_transformers import SentenceTransformer  # seconds, and only for this

        half: dict[str, Any] = {} if dtype == torch.float32 else {"dtype": dtype, "device_map": {"": device}}
        with blamed("--sentence-encoder", name, "give a folder or hub id of a sentence encoder"):
            self._model = SentenceTransformer(
                _path_or_id(name), device=str(device), model_kwargs=half or None, trust_remote_code=False
            )
            if half:
                self._model.to(dtype)  # layers that are sentence-transformers' own are stored apart
        self._device, self.weights = device, weights_hash(self._model)

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Compute the cosine of each pair of texts, 0 where it is negative, as published (arXiv 2410.08109)."""
        texts = [text for pair in pairs for text in pair]
        with torch.autocast(self._device.type, enabled=False):  # the launch's 16 bits are for the model that is judged
            vectors = self._model.encode(texts, batch_size=_TEXTS_AT_ONCE, convert_to_tensor=True, show_progress_bar=False)
        vectors = torch.nn.functional.normalize(vectors.float())
        cosines = (vectors[0::2] * vectors[1::2]).sum(-1)
        return cosines.clamp(0, 1).tolist()


class _Classifier:
    """Gives the logits of texts, or of pairs of them, by a sequence classifier one of whose labels counts."""

    flag = label = kind = ""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Load a classifier from a folder or the hub.

        Raises:
            InputError: if that fails, or the classifier has no such label.
        """
        source = _path_or_id(name)
        self._label = self._number_of_label(name, source)
        self._device = device
        with blamed(*self._blame(name)):
            self._tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            with no_load_report():
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    source, dtype=dtype, device_map={"": device}, output_loading_info=True, trust_remote_code=False
                )
            check_loaded(f"{self.flag} {name}", model, info)
            positions = getattr(model.config, "max_position_embeddings", None)
            if positions and self._tokenizer.model_max_length > positions:  # unset; some count from 2
                self._tokenizer.model_max_length = positions - 2
            self._model = model.eval()
        self.weights = weights_hash(self._model)

    @torch.no_grad()
    def _logits(self, texts: Sequence[tuple[str, ...]]) -> torch.Tensor:
        """Compute the logits [n, labels] of texts or pairs, long ones together."""
        found: list[Any] = [None] * len(texts)
        for chosen in in_length_order([sum(map(len, parts)) for parts in texts], _TEXTS_AT_ONCE):
            columns = [list(column) for column in zip(*(texts[index] for index in chosen), strict=True)]
            encoded = self._tokenizer(*columns, padding=True, truncation=True, return_tensors="pt").to(self._device)
            with torch.autocast(self._device.type, enabled=False):
                logits = self._model(**encoded).logits.float().cpu()
            for index, own in zip(chosen, logits, strict=True):
                found[index] = own
        return torch.stack(found)

    def _number_of_label(self, name: str, source: str) -> int:
        with blamed(*self._blame(name)):
            labels: dict[int, str] = AutoConfig.from_pretrained(source, trust_remote_code=False).id2label
        for number, label in labels.items():
            if label.lower() == self.label:
                return int(number)
        raise InputError(
            f"{self.flag} {name}: its labels are {', '.join(labels.values())}, none of them {self.label}; give {self.kind}"
        )

    def _blame(self, name: str) -> tuple[str, str, str]:
        return self.flag, name, "give a folder or hub id of a sequence classifier"


class EntailmentModel(_Classifier):
    """Tells whether a premise entails a hypothesis, with a sequence classifier that has a label `entailment`."""

    flag, label, kind = "--entailment-model", "entailment", "a model of natural language inference"

    def entails(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Tell whether `entailment` is the likeliest label of each pair (premise, hypothesis)."""
        return [label == self._label for label in self._logits(pairs).argmax(-1).tolist()] if pairs else []


class GibberishModel(_Classifier):
    """Tells how clean a text is, with a sequence classifier that has a label `clean` beside kinds of gibberish."""

    flag, label, kind = "--gibberish-model", "clean", "a classifier of gibberish"

    def clean(self, texts: Sequence[str]) -> list[float]:
        """Compute the probability of `clean` for each text, as OpenUnlearning does for answers to the forget set."""
        if not texts:
            return []
        found: list[float] = self._logits([(text,) for text in texts]).softmax(-1)[:, self._label].tolist()
        return found


@dataclass(frozen=True)
class Judges:
    """The models, each None where none was given, and the refusals that the forget set's answers are compared with."""

    encoder: SentenceEncoder | None = None
    entailment: EntailmentModel | None = None
    refusals: Sequence[str] = ()
    gibberish: GibberishModel | None = None


def load_judges(args: MeasureArgs, accelerator: Accelerator) -> Judges:
    """Load what `--idk-file` and the flags of models that compare texts name, in the precision of the launch.

    Raises:
        InputError: if one of them cannot be loaded or does not fit.
    """
    refusals = load_refusals(args.idk_file)
    place = accelerator.device, precision_of(accelerator)
    for name in filter(None, (args.sentence_encoder, args.entailment_model, args.gibberish_model)):
        say(accelerator, f"loading {name}")
    encoder = SentenceEncoder(args.sentence_encoder, *place) if args.sentence_encoder else None
    entailment = EntailmentModel(args.entailment_model, *place) if args.entailment_model else None
    gibberish = GibberishModel(args.gibberish_model, *place) if args.gibberish_model else None
    return Judges(encoder, entailment, refusals, gibberish)


def entailed(rouge: float, label_entails: bool) -> float:
    """Return 1 if one text entails the other, 0 if not, or if they share too little: ROUGE-L recall below 0.1 (2410.08109)."""
    return float(rouge >= ENTAILMENT_FLOOR and label_entails)


def _path_or_id(name: str) -> str:
    """Return the folder of that name, with ~ expanded, or the hub id."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name
