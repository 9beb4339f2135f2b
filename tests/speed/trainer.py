"""What people use: the same objectives over the same rows in a plain `transformers.Trainer`, with a live reference model.

Texts are padded to the longest of a batch or to a fixed length, logits are computed everywhere and the loss is masked, both
answers of a row stand in one batch, and the reference is a second model. One fused AdamW serves both phases.

Jointly, a step takes a forget and a retain batch, both through the model before the sum of their losses goes back, and hands
the model its labels, so that it computes a cross-entropy of its own: as OpenUnlearning's GradDiff (GA+GD) and NPO classes do.
"""

import copy
import itertools
import math
import tempfile
from typing import Any

import torch
from contest import Turn, windows
from torch.nn.functional import cross_entropy, kl_div, log_softmax, pad, softplus
from transformers import Trainer, TrainerCallback, TrainingArguments

from dualoptim.models.launch import start_accelerator
from dualoptim.models.load import load_model

BETA = 0.1


def sequence_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log p of each row's scored tokens: [B]."""
    found = -cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return found.sum(-1)


class Plain(Trainer):
    """Computes the objectives of the phases whose texts a batch has."""

    objectives: dict[str, str]
    joint: bool
    reference: torch.nn.Module | None

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The sum over phases."""
        return sum(self._loss(model, self.objectives[phase], batch) for phase, batch in inputs.items())

    def _loss(self, model: Any, name: str, inputs: Any) -> Any:
        """The published formulas on padded logits."""
        labels = inputs["labels"][:, 1:]
        if not self.joint:
            del inputs["labels"]
        scored = labels != -100
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        reference = None
        if name in ("NPO", "DPO", "KL"):
            with torch.no_grad():
                reference = self.reference(**inputs, use_cache=False).logits[:, :-1]
        if name in ("GA", "GD", "IDK"):
            return (-1 if name == "GA" else 1) * cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)
        if name == "ME":
            return (logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1]))[scored].mean()
        if name == "KL":
            p, ref = log_softmax(logits, -1), log_softmax(reference, -1)
            return kl_div(p, ref, reduction="none", log_target=True).sum(-1)[scored].mean()
        ratio = sequence_log_probs(logits, labels)
        if reference is not None:
            ratio = ratio - sequence_log_probs(reference, labels)
        if name == "NPO":
            return (2 / BETA) * softplus(BETA * ratio).mean()
        margin, factor = ratio[0::2] - ratio[1::2], 1 / BETA
        if name == "DPO":
            margin, factor = -margin, 2 / BETA
        return factor * softplus(-BETA * margin).mean()


def train_plainly(args: Any, turn: Turn, pad_to: int | None = None, joint: bool = False) -> None:
    """The steps of `run(args)` in a Trainer, or of each two of them in one."""
    accelerator = start_accelerator(args)
    loaded = load_model(args, accelerator)
    rows, tokens = [], []
    for phase, objective, (texts,) in windows(args, loaded):
        together = len(objective.reads)
        rows += [(phase, texts[start : start + together]) for start in range(0, len(texts), together)]
        tokens.append((phase, sum(len(text.ids) for text in texts)))

    def padded(texts: list[Any]) -> dict[str, torch.Tensor]:
        length = pad_to or max(len(text.ids) for text in texts)

        def filled(values: list[int], filler: int) -> torch.Tensor:
            return pad(torch.tensor(values), (0, length - len(values)), value=filler)

        return {
            "input_ids": torch.stack([filled(text.ids, 0) for text in texts]),
            "attention_mask": torch.stack([filled([1] * len(text.ids), 0) for text in texts]),
            "labels": torch.stack([filled([-100] * text.start + text.ids[text.start :], -100) for text in texts]),
        }

    def collate(chosen: list[Any]) -> dict[str, dict[str, torch.Tensor]]:
        by_phase = itertools.groupby(chosen, key=lambda row: row[0])
        return {phase: padded([text for _, group in own for text in group]) for phase, own in by_phase}

    class Hold(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            taken = 2 if joint else 1
            for phase, count in tokens[(state.global_step - 1) * taken : state.global_step * taken]:
                turn.over(phase, count)

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            per_device_train_batch_size=args.batch_size * (2 if joint else 1),
            num_train_epochs=1,
            learning_rate=1e-6,
            optim="adamw_torch_fused",
            use_cpu=True,
            bf16=accelerator.mixed_precision == "bf16",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Plain(loaded.model, settings, collate, rows, callbacks=[Hold()])
        forget, retain = args.forget_losses[0].split("+")
        trainer.objectives = {"forget": forget, "retain": retain}
        live = {forget, retain} & {"NPO", "DPO", "KL"}
        trainer.joint, trainer.reference = joint, None
        if live:
            frozen = copy.deepcopy(loaded.model).eval().requires_grad_(False)
            trainer.reference = trainer.accelerator.prepare_model(frozen, evaluation_mode=True)
        trainer.train()
