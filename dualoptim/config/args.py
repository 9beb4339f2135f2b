"""What a user can set: dataclasses with their checks, the published presets, YAML in and out, and the command line.

The docstring under a field is its `--help` text. Fields are never changed after construction; what follows from several
of them is a property.
"""

import argparse
import dataclasses
import importlib.util
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import tyro
import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from dualoptim.errors import InputError, NonFiniteError
from dualoptim.method.objectives import FORGET, RETAIN, Objective
from dualoptim.config.presets import PRESETS, listing

DEMO = "demo"
NEWEST = "newest"
HUB_DATA = "locuslab/TOFU"
SPLITS = ("forget01", "forget05", "forget10", "forget")
TRACKERS = ("wandb", "tensorboard", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio")


@dataclass(frozen=True)
class CommonArgs:
    """What every command needs to know: the model, the data, how they are joined, and where results go."""

    model: str = DEMO
    """Model to start from: a hub id, a local folder, or a .gguf file. `demo` trains a tiny model on the built-in data first
    (about a minute on two CPU cores)."""
    data: str | None = None
    """Rows to use: a folder of JSON Lines files in the layout of the published DualOptim data, a folder or hub id in the
    layout of locuslab/TOFU, or `demo`. Default: `demo` with the demo model, otherwise locuslab/TOFU."""
    template: Literal["auto", "chat", "qa", "llama2", "llama3", "phi"] = "auto"
    """How question and answer become text. `auto` takes the first that fits: the tokenizer's own chat template; llama3 or phi
    if their tags are tokens of the vocabulary; llama2 if the model's name says so; qa (Question: / Answer:)."""
    question_start_tag: str | None = None
    """Text before the question, in place of the template's (\\n is a line break)."""
    question_end_tag: str | None = None
    """Text after the question, in place of the template's (\\n is a line break)."""
    answer_tag: str | None = None
    """Text before the answer, in place of the template's (\\n is a line break)."""
    max_length: int = 500
    """Longest example in tokens, question, answer and end token together; longer ones are cut, with one warning. 500 as
    published; TOFU's longest is 137."""
    packing: bool = True
    """Lay the examples of a micro-batch end to end instead of padding them. Same numbers, less work; a model whose attention
    cannot tell them apart falls back to padding by itself."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel. `auto`: flash-attention where CUDA, the package and 16-bit weights or autocast are there, else sdpa (on
    CPUs text by text)."""
    output_dir: str | None = None
    """Folder for everything that is written. Default: runs/<date>-<time>."""
    overwrite: bool = False
    """Replace results that an earlier run left in the output folder; without it such a folder is refused."""
    threads: int = 0
    """CPU threads of each process; 0 shares the machine's cores among its processes. Ignored on a GPU."""

    def __post_init__(self) -> None:
        check_range("--max-length", self.max_length, 2)
        check_range("--threads", self.threads, 0)
        if not self.model:
            raise InputError("--model is empty; give a hub id, a folder or a .gguf file")
        if self.model == DEMO and self.data not in (None, DEMO):
            raise InputError(
                f"--data {self.data} needs a model that can read it; give --model, because the demo's knows its own data"
            )
        if self.template == "chat" and self.has_tags:
            raise InputError("--template chat cannot take tags; drop the --*-tag flags or choose --template qa")

    @property
    def has_tags(self) -> bool:
        """Whether any part of the template is given explicitly."""
        return any(tag is not None for tag in (self.question_start_tag, self.question_end_tag, self.answer_tag))

    @property
    def data_source(self) -> str:
        """Where rows come from once the default is resolved."""
        return self.data or (DEMO if self.model == DEMO else HUB_DATA)


@dataclass(frozen=True)
class MeasureArgs(CommonArgs):
    """What every command that evaluates needs on top."""

    split: str = "forget05"
    """Size of the forget tasks: forget01 (40 rows a task in TOFU), forget05 (200) or forget10 (400); or `forget` for data in
    the layout of the published real-world scenario, with neighbor.json as what is kept."""
    forget_file: str | None = None
    """Rows to forget from a file of your own, in place of --data: JSON Lines, CSV or Parquet with a column of questions and one
    of answers, or of passages; or a .txt file, which is one passage. Passages are cut to --max-length tokens."""
    retain_file: str | None = None
    """Rows to keep from a file of the same kinds. Without it give an objective with nothing to retain, such as NPO+none."""
    holdout_file: str | None = None
    """Rows that no model has seen, from a file of the same kinds, for membership attacks. Default: the data's own (holdout01,
    holdout05, holdout10), if it has them."""
    question_column: str = "question"
    """Name of the column of questions in your own files."""
    answer_column: str = "answer"
    """Name of the column of answers in your own files."""
    text_column: str = "text"
    """Name of the column of passages in your own files; a file that has it and no questions is read as passages."""
    sentence_encoder: str | None = None
    """Sentence encoder for cosine_similarity: a folder or hub id. Published: sentence-transformers/paraphrase-MiniLM-L6-v2."""
    entailment_model: str | None = None
    """Classifier for entailment_score: a folder or hub id of a model with a label `entailment`. Published:
    sileod/deberta-v3-base-tasksource-nli."""
    idk_file: str | None = None
    """Refusals for IDK and AP, and for targeted_forget_efficacy, one plain sentence a line. Default: the list that comes with
    the package."""
    retain_logs: str | None = None
    """Evaluation of a model that never saw the forget set, for forget_quality and privleak: a folder of ours with a
    summary.json, TOFU's eval_log_aggregated.json, or OpenUnlearning's TOFU_EVAL.json."""
    mia_gradnorm: bool = False
    """Also attack by the norm of each row's gradient: a backward pass per row of the forget and hold-out sets."""
    lm_eval_tasks: tuple[str, ...] = ()
    """Tasks of the package lm-eval (the extra lm-eval) that every evaluation also measures, for general ability."""
    lm_eval_path: str | None = None
    """Folder with task definitions (YAML) of your own for --lm-eval-tasks."""
    eval_rows: int = 0
    """Rows per evaluation set, from its start; 0 takes all of them. The published code scores 300 (of forget10's 400)."""
    eval_batch_size: int = 16
    """Texts per forward pass of the evaluation and per call of generate. It changes time and memory, not results."""
    max_new_tokens: int = 128
    """Longest generated answer in tokens. TOFU's longest answer has about 110."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in SPLITS:
            raise InputError(f"--split {self.split!r} is unknown; choose from {', '.join(SPLITS)}")
        if self.retain_file is not None and self.forget_file is None:
            raise InputError(f"--retain-file {self.retain_file} needs --forget-file, the rows to forget")
        if self.forget_file is not None and self.data is not None:
            raise InputError(f"--forget-file {self.forget_file} takes the place of --data {self.data}; give one of them")
        if not self.reads_own_files:
            for name in ("question_column", "answer_column", "text_column"):
                if getattr(self, name) != getattr(MeasureArgs, name):
                    flag = f"--{name.replace('_', '-')}"
                    raise InputError(f"{flag} {getattr(self, name)} names a column of your own files; give --forget-file")
        if self.forget_file is not None and self.model == DEMO:
            raise InputError(f"--forget-file {self.forget_file} needs a model that knows it; give --model")
        if self.sentence_encoder is not None and importlib.util.find_spec("sentence_transformers") is None:
            raise InputError("--sentence-encoder needs the package sentence-transformers; pip install 'dualoptim[eval]'")
        check_unique("--lm-eval-tasks", self.lm_eval_tasks)
        if self.lm_eval_tasks and importlib.util.find_spec("lm_eval") is None:
            raise InputError("--lm-eval-tasks needs the package lm-eval; pip install 'dualoptim[lm-eval]'")
        if self.lm_eval_path is not None and not self.lm_eval_tasks:
            raise InputError(
                f"--lm-eval-path {self.lm_eval_path} has tasks that nothing asks for; name some with --lm-eval-tasks"
            )
        if self.lm_eval_path is not None and not Path(self.lm_eval_path).expanduser().is_dir():
            raise InputError(f"--lm-eval-path {self.lm_eval_path}: no such folder; give the one with your tasks' .yaml files")
        check_range("--eval-rows", self.eval_rows, 0)
        check_range("--eval-batch-size", self.eval_batch_size, 1)
        check_range("--max-new-tokens", self.max_new_tokens, 1)

    @property
    def reads_own_files(self) -> bool:
        """Whether rows come from a file of the user's, whose columns have names of their own."""
        return self.forget_file is not None or self.holdout_file is not None


@dataclass(frozen=True)
class TrainArgs(CommonArgs):
    """What every command that trains needs on top."""

    seed: int = 1001
    """Seed of the order of examples, the choice of refusals, and dropout. 1001 as published."""
    num_epochs: int = 5
    """Passes over the forget set (fine-tuning: over all rows). 5 as published."""
    max_steps: int = 0
    """Stop after so many optimizer steps of all phases; 0 runs all epochs. The rate still decays over all epochs' steps."""
    batch_size: int = 4
    """Examples per process and micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step; every one of a step belongs to the same phase."""
    weight_decay: float = 0.01
    """Decoupled weight decay of weights (never of biases and norms). 0.01 as published."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two moments, each from 0 up to but not 1. torch's default, as published."""
    max_grad_norm: float = 1.0
    """Clip the gradient of a step to this norm; 0 switches clipping off. 1.0 as in the published runs."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up before the linear decay. 1 as published."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time for far less memory."""
    optim_bits: Literal[32, 8] = 32
    """Bits of the optimizer states. 8 (bitsandbytes) holds about a quarter; embeddings, norms, biases and tensors of fewer than
    4,096 elements stay in 32."""
    quantize_embeddings: bool = False
    """With --optim-bits 8, keep the states of embeddings in 8 bits as well. They are the least stable ones."""
    use_lora: bool = False
    """Train a low-rank adapter instead of the weights, and save it alone."""
    lora_rank: int = 8
    """Rank of the adapter. 8 as in TOFU."""
    lora_alpha: int = 32
    """The adapter's output is scaled by this over the rank. 32 as in TOFU."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input, from 0 up to but not 1. 0, because dropout differs with the number of processes."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Modules that get an adapter, by name (q_proj v_proj ...). `all-linear`: every linear layer but the output head."""
    load_in_4bit: bool = False
    """Hold the frozen weights in 4 bits (QLoRA). Needs CUDA, bitsandbytes and --use-lora."""
    log_with: tuple[str, ...] = ()
    """Trackers that also get every step and score, through Accelerate: wandb, tensorboard, mlflow, comet_ml, aim, clearml,
    dvclive, swanlab, trackio. None by default: nothing leaves the machine unless you ask for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed} is out of range; give 0 or more, below 2**32")
        check_range("--num-epochs", self.num_epochs, 1)
        check_range("--max-steps", self.max_steps, 0)
        check_range("--batch-size", self.batch_size, 1)
        check_range("--gradient-accumulation-steps", self.gradient_accumulation_steps, 1)
        check_range("--weight-decay", self.weight_decay, 0)
        check_range("--max-grad-norm", self.max_grad_norm, 0)
        check_range("--warmup-epochs", self.warmup_epochs, 0)
        for beta in self.adam_betas:
            if not 0 <= beta < 1:
                raise InputError(f"--adam-betas {beta:g} is out of range; give two numbers from 0 up to but not 1")
        if self.state_bits == 8 and importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("--optim-bits 8 needs the package bitsandbytes; pip install 'dualoptim[bitsandbytes]'")
        if self.quantize_embeddings and self.state_bits != 8:
            raise InputError("--quantize-embeddings has no effect with --optim-bits 32; give --optim-bits 8")
        check_range("--lora-rank", self.lora_rank, 1)
        check_range("--lora-alpha", self.lora_alpha, 1)
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora-dropout {self.lora_dropout:g} is out of range; give a number from 0 up to but not 1")
        if not self.lora_target_modules:
            raise InputError("--lora-target-modules is empty; give all-linear or names of modules")
        if self.load_in_4bit and not self.use_lora:
            raise InputError("--load-in-4bit freezes the weights, so that only an adapter can learn; add --use-lora")
        check_unique("--log-with", self.log_with)
        for tracker in self.log_with:
            if tracker not in TRACKERS:
                raise InputError(f"--log-with {tracker} is unknown; choose from {', '.join(TRACKERS)}")
            if not _can_track(tracker):
                extra = " or 'dualoptim[track]'" if tracker in ("wandb", "tensorboard") else ""
                raise InputError(f"--log-with {tracker} needs its package; pip install {tracker}{extra}")

    @property
    def state_bits(self) -> int:
        """8 if any optimizer state is kept in bytes."""
        return self.optim_bits


@dataclass(frozen=True)
class UnlearnArgs(TrainArgs, MeasureArgs):
    """Make a language model forget one set of facts and keep another, with decoupled optimizer states (DualOptim).

    Without any flag the built-in demo runs.
    """

    forget_losses: tuple[str, ...] = ("ME+GD",)
    """Objectives as FORGET+RETAIN; each pair is a run of its own. Forget: GA, ME, IDK, NPO, DPO, SimNPO, WGA, SatImp, UNDIAL,
    CE-U, PDU, RMU, LLMU. Retain: GD, AP, KL (over the answer), KLQ (over the question too), EMBED (for RMU), none. README has
    them in a table."""
    task_list: tuple[int, ...] = (1,)
    """Forget tasks, unlearned one after another, each from the weights the last one left. For data in the layout of
    locuslab/TOFU, task 0 is the hub's own forget set and 1 to 10 are the published cuts of its full set."""
    optim: Literal["dual-adamw", "dual-adamw-plus", "adamw-alternate", "adamw"] = "dual-adamw"
    """dual-adamw: one optimizer state per phase (DualOptim). dual-adamw-plus: a base state that the phases share, and how each
    differs from it (DualOptim+). adamw-alternate: the same phases over one shared state. adamw: both losses in every step, one
    state."""
    forget_optimizer: str | None = None
    """With --optim dual-adamw: the optimizer of forget steps: adamw, adamw-8bit, sgd (momentum: the first of its betas),
    signsgd, or an import path such as torch.optim.RMSprop, whose state starts at zero. Default: adamw, or adamw-8bit with
    --optim-bits 8."""
    retain_optimizer: str | None = None
    """The same for retain steps."""
    forget_adam_betas: tuple[float, float] | None = None
    """Decay rates of the forget optimizer's moments. Default: --adam-betas."""
    forget_weight_decay: float | None = None
    """Weight decay of forget steps. Default: --weight-decay."""
    decouple: Literal["both", "m", "v", "none"] = "both"
    """With --optim dual-adamw: which of Adam's moments each phase has for itself; the other is shared (an ablation)."""
    base_betas: tuple[float, float] | None = None
    """With --optim dual-adamw-plus: decay rates of the base's moments. Default: --adam-betas."""
    max_update: float = 0.0
    """With --optim dual-adamw-plus: bound of the change of one weight in one step, in rates; 0 is the published form, which has
    none (changes of more than 300 rates were measured; the log has the largest one of each step)."""
    quantize_delta: bool = False
    """With --optim dual-adamw-plus: keep each phase's own part in 8 bits. --optim-bits 8 sets this and --quantize-base."""
    quantize_base: bool = False
    """With --optim dual-adamw-plus: keep the shared base in 8 bits."""
    learning_rates: tuple[float, ...] = ()
    """Base rates; each is a run of its own. Default: 1e-5 as published, or 5e-4 for the demo's tiny model."""
    forget_lr: float | None = None
    """Base rate of forget steps. Default: the run's learning rate. Not with --optim adamw, which has one rate."""
    forget_freq: int = 1
    """Forget steps in a row before retain steps follow."""
    retain_freq: int = 5
    """Retain steps in a row after the forget steps. 5 as published. With --optim adamw both frequencies have no effect."""
    forget_coeff: float = 1.0
    """Factor of the forget loss. 1.0 as in DualOptim's scripts; 0.1 is published for ME+GD."""
    regularization_coeff: float = 1.0
    """Factor of the retain loss."""
    forget_max_grad_norm: float | None = None
    """Clip the gradient of forget steps to this norm instead of --max-grad-norm; 0 switches it off."""
    beta: float | None = None
    """First constant of the objectives that have one. Default, as published: NPO, DPO and AP 0.1 (inverse temperature), SimNPO
    2.5, WGA 1 and SatImp 5 (exponent of p), UNDIAL 10 (lowers the label's logit), RMU 2 (length of the steering vector)."""
    gamma: float | None = None
    """Second constant: SimNPO's margin (default 0), SatImp's exponent of 1-p (default 1)."""
    layer: int | None = None
    """Decoder layer that RMU and EMBED read, from 0; not the last. Default: 7 as published, or half the depth of a smaller
    model."""
    reference_dir: str | None = None
    """Folder of stored references, which runs on the same weights and rows share. Default: reference/ of the output folder."""
    fix_ref_model: bool = False
    """The reference of NPO, DPO, KL, UNDIAL and EMBED: the model before the first task (on), or before the current one (off, as
    published)."""
    mask: bool = True
    """Score only the answer in the forget loss; --no-mask scores the question too."""
    eval: bool = True
    """Evaluate before and after unlearning."""
    save_every: int = 0
    """Write a checkpoint every so many optimizer steps; 0 writes none."""
    keep_checkpoints: int = 1
    """Checkpoints that a task keeps, the newest ones."""
    resume: str | None = None
    """Continue what an earlier run left in --output-dir: finished tasks are kept, an interrupted one goes on from its newest
    checkpoint, or from the one whose folder is given."""
    push_to_hub: str | None = None
    """Repository on the Hugging Face hub, such as me/model, to which each task's model goes once it is evaluated. Several
    results get one each, with the pair, the rate and the task at the end of its name. Needs `hf auth login` or HF_TOKEN."""
    hub_public: bool = False
    """Make the repository of --push-to-hub public; without it, it is private."""
    dry_run: bool = False
    """Only print what the run would take in memory, from the model's configuration, and whether that fits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.forget_losses:
            raise InputError("--forget-losses is empty; give at least one pair such as ME+GD")
        for pair in self.forget_losses:
            split_objectives(pair)
        if not self.task_list:
            raise InputError("--task-list is empty; give at least one task number")
        check_unique("--task-list", self.task_list)
        check_unique("--forget-losses", self.forget_losses)
        check_unique("--learning-rates", [f"{rate:g}" for rate in self.learning_rates])  # they name folders
        for task in self.task_list:
            check_range("--task-list", task, 0)
        for rate in self.learning_rates:
            check_range("--learning-rates", rate, 0, above=True)
        if self.forget_lr is not None:
            check_range("--forget-lr", self.forget_lr, 0, above=True)
        check_range("--forget-freq", self.forget_freq, 1)
        check_range("--retain-freq", self.retain_freq, 1)
        check_range("--forget-coeff", self.forget_coeff, 0, above=True)
        check_range("--regularization-coeff", self.regularization_coeff, 0, above=True)
        if self.forget_max_grad_norm is not None:
            check_range("--forget-max-grad-norm", self.forget_max_grad_norm, 0)
        for flag, value in (("--forget-lr", self.forget_lr), ("--forget-max-grad-norm", self.forget_max_grad_norm)):
            if self.optim == "adamw" and value is not None:
                raise InputError(
                    f"{flag} {value:g} has no effect with --optim adamw, whose steps take both losses; give {flag} None"
                )
        if self.beta is not None:
            check_range("--beta", self.beta, 0, above=True)
        if self.gamma is not None:
            check_range("--gamma", self.gamma, 0)
        if self.layer is not None:
            check_range("--layer", self.layer, 0)
        self._check_objectives()
        self._check_optimizers()
        if self.lm_eval_tasks and not self.eval:
            raise InputError("--lm-eval-tasks are a part of the evaluation, which --no-eval leaves out; drop one of them")
        check_range("--save-every", self.save_every, 0)
        check_range("--keep-checkpoints", self.keep_checkpoints, 1)
        if self.push_to_hub is not None:
            if self.dry_run:
                raise InputError(f"--push-to-hub {self.push_to_hub}: --dry-run makes no model to upload; give one of them")
            try:
                validate_repo_id(self.push_to_hub)
            except HFValidationError:
                raise InputError(
                    f"--push-to-hub {self.push_to_hub!r} is no repository's name; give one such as me/model, of letters, "
                    "digits, -, _ and ."
                ) from None
        elif self.hub_public:
            raise InputError("--hub-public makes the repository of --push-to-hub public; give that as well")
        if self.resume is not None:
            if self.output_dir is None:
                raise InputError("--resume needs the folder of the run to go on with; give --output-dir")
            if self.overwrite:
                raise InputError("--resume keeps what --overwrite would remove; give one of them")

    def _check_objectives(self) -> None:
        """Refuse constants of objectives that this run does not have."""
        for name in CONSTANTS:
            value = getattr(self, name)
            if value not in (None, False) and not any(name in constants_of(pair) for pair in self.forget_losses):
                shown = "" if value is True else f" {value:g}"
                raise InputError(
                    f"--{name.replace('_', '-')}{shown} has no effect with {' '.join(self.forget_losses)}; drop it, or choose "
                    "objectives that have it (README, Objectives)"
                )

    def of_pair(self, losses: str, rate: float) -> "UnlearnArgs":
        """The arguments of one pair of objectives and one rate, without constants that are another pair's."""
        others = {name: getattr(UnlearnArgs, name) for name in CONSTANTS if name not in constants_of(losses)}
        own_rate = None if self.optim == "adamw" else self.forget_lr or rate
        return dataclasses.replace(self, forget_losses=(losses,), learning_rates=(rate,), forget_lr=own_rate, **others)

    def _check_optimizers(self) -> None:
        """Refuse settings of an optimizer that this run does not have."""
        dual, plus = self.optim == "dual-adamw" and self.decouple == "both", self.optim == "dual-adamw-plus"
        for name, fits, needed in (
            ("forget_optimizer", dual, "dual-adamw with --decouple both"),
            ("retain_optimizer", dual, "dual-adamw with --decouple both"),
            ("forget_adam_betas", dual, "dual-adamw with --decouple both"),
            ("forget_weight_decay", dual, "dual-adamw with --decouple both"),
            ("decouple", self.optim == "dual-adamw", "dual-adamw"),
            ("base_betas", plus, "dual-adamw-plus"),
            ("max_update", plus, "dual-adamw-plus"),
            ("quantize_delta", plus, "dual-adamw-plus"),
            ("quantize_base", plus, "dual-adamw-plus"),
        ):
            value = getattr(self, name)
            if not fits and value != getattr(UnlearnArgs, name):
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise InputError(f"--{name.replace('_', '-')} {shown} has no effect here; it needs --optim {needed}")
        check_range("--max-update", self.max_update, 0)
        if self.forget_weight_decay is not None:
            check_range("--forget-weight-decay", self.forget_weight_decay, 0)
        for flag, betas in (("--forget-adam-betas", self.forget_adam_betas), ("--base-betas", self.base_betas)):
            for beta in betas or ():
                if not 0 <= beta < 1:
                    raise InputError(f"{flag} {beta:g} is out of range; give two numbers from 0 up to but not 1")
        if self.optim_bits == 8 and self.forget_optimizer and self.retain_optimizer:
            raise InputError(
                "--optim-bits 8 has no effect with --forget-optimizer and --retain-optimizer; name adamw-8bit there"
            )
        if self.decouple in ("m", "v") and self.optim_bits == 8:
            raise InputError(f"--decouple {self.decouple} has no 8-bit form; give --optim-bits 32")

    @property
    def state_bits(self) -> int:
        """8 if any state is kept in bytes."""
        in_bytes = "adamw-8bit" in (self.forget_optimizer, self.retain_optimizer) or self.quantize_delta or self.quantize_base
        return 8 if in_bytes else self.optim_bits

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates once the default is resolved."""
        return self.learning_rates or ((5e-4,) if self.model == DEMO else (1e-5,))


@dataclass(frozen=True)
class SweepArgs(UnlearnArgs):
    """Many runs in one call: all of --forget-losses x --learning-rates x --forget-lrs x --seeds, each in its own folder.

    A run that fails is reported and the others go on; a second call skips the finished ones.
    """

    forget_lrs: tuple[float, ...] = ()
    """Base rates of forget steps. Default: --forget-lr alone."""
    seeds: tuple[int, ...] = ()
    """Seeds. Default: --seed alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forget_lrs and self.forget_lr is not None:
            raise InputError(
                f"--forget-lr {self.forget_lr:g} and --forget-lrs both set the rate of forget steps; give one of them"
            )
        if self.forget_lrs and self.optim == "adamw":
            raise InputError("--forget-lrs has no effect with --optim adamw, whose steps take both losses; drop it")
        for name in ("resume", "dry_run"):
            if getattr(self, name):
                raise InputError(f"--{name.replace('_', '-')} is for one run; a sweep skips what is finished by itself")
        if self.push_to_hub is not None:
            raise InputError(f"--push-to-hub {self.push_to_hub} is for one run; upload a sweep's best model with `hf upload`")
        check_unique("--seeds", self.seeds)
        check_unique("--forget-lrs", [f"{rate:g}" for rate in self.forget_lrs])
        for rate in self.forget_lrs:
            check_range("--forget-lrs", rate, 0, above=True)
        for seed in self.seeds:
            check_range("--seeds", seed, 0)


@dataclass(frozen=True)
class FinetuneArgs(TrainArgs):
    """Teach a model the rows of some splits: target models, which know the forget set, and retain-only models."""

    splits: tuple[str, ...] = ("full",)
    """Splits whose rows are learned, by their names in the data: full, retain90, forget01, ..."""
    tasks: tuple[int, ...] = ()
    """Learn only these tasks of the forget splits that are named; none given takes all of them."""
    learning_rate: float = 1e-5
    """Base rate. 1e-5 as in TOFU for 7B models; small models take more (5e-5 for 135M)."""
    target_loss: float = 0.0
    """Stop at the end of the first epoch whose mean loss per token is below this; 0 runs all epochs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.splits:
            raise InputError("--splits is empty; give at least one split such as full")
        check_range("--learning-rate", self.learning_rate, 0, above=True)
        check_range("--target-loss", self.target_loss, 0)


@dataclass(frozen=True)
class EvalArgs(MeasureArgs):
    """Measure what a model still knows: of the forget task, the retain set, real authors and world facts."""

    task: int = 1
    """The forget task whose rows are the forget set."""
    retain_model: str | None = None
    """A model that never saw the forget set, evaluated in the same way for forget_quality, privleak and relearning, in place of
    --retain-logs."""
    reference_model: str | None = None
    """A model whose losses the reference attack compares with; the retain-only model, for example."""
    relearn: int = 0
    """Attack: fine-tune for so many steps, and see how much of the forget set comes back."""
    relearn_rows: str = "forget"
    """What is fine-tuned on: `forget` (a share of the forget set), `retain` (rows that are kept, none of it), or a file."""
    relearn_share: float = 0.2
    """Share of the forget set that relearning sees, drawn once by a fixed seed."""
    relearn_lr: float = 1e-5
    """Base rate of relearning; it decays linearly over the passes that the steps take."""
    relearn_batch_size: int = 4
    """Examples per process and step of relearning."""
    relearn_every: int = 0
    """Score after every so many steps of relearning, and after the last; 0 scores four times."""
    quantize: tuple[int, ...] = ()
    """Attack: round the weights to so many bits, 8 or 4 or both. bitsandbytes on CUDA; elsewhere simulated: linear layers but
    the output head, symmetric, to the nearest, a scale per output (8) or per 64 weights (4)."""
    paraphrase: bool = False
    """Attack: ask the paraphrased questions that the data have."""
    sample: int = 0
    """Attack: draw so many answers to every forget question and take the best."""
    sample_temperature: float = 1.0
    """Temperature of those draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--task", self.task, 0)
        if self.retain_model is not None and self.retain_logs is not None:
            raise InputError(
                f"--retain-model {self.retain_model} and --retain-logs {self.retain_logs} say the same; give one of them"
            )
        for name in ("relearn", "relearn_every", "sample"):
            check_range(f"--{name.replace('_', '-')}", getattr(self, name), 0)
        check_range("--relearn-batch-size", self.relearn_batch_size, 1)
        check_range("--relearn-lr", self.relearn_lr, 0, above=True)
        check_range("--sample-temperature", self.sample_temperature, 0, above=True)
        if not 0 < self.relearn_share <= 1:
            raise InputError(f"--relearn-share {self.relearn_share:g} is out of range; give a number above 0, up to 1")
        for attack, names in (
            ("relearn", ("relearn_rows", "relearn_share", "relearn_lr", "relearn_batch_size", "relearn_every")),
            ("sample", ("sample_temperature",)),
        ):
            for name in names:
                if not getattr(self, attack) and getattr(self, name) != getattr(EvalArgs, name):
                    flag = f"--{name.replace('_', '-')} {getattr(self, name)}"
                    raise InputError(f"{flag} has no effect without --{attack}; give the number of its steps or draws")
        if self.relearn_share != EvalArgs.relearn_share and self.relearn_rows != "forget":
            raise InputError(
                f"--relearn-share {self.relearn_share:g} is of the forget set; give --relearn-rows forget, or drop it"
            )
        check_unique("--quantize", self.quantize)
        for bits in self.quantize:
            if bits not in (4, 8):
                raise InputError(f"--quantize {bits} is not offered; give 8, 4 or both")

    @property
    def reads_own_files(self) -> bool:
        """The same, with the rows of relearning."""
        return super().reads_own_files or self.relearn_rows not in ("forget", "retain")


def check_range(flag: str, value: float, minimum: float, above: bool = False) -> None:
    """Refuse a value below `minimum` (or equal to it, with `above`), infinite or not a number."""
    if not (math.isfinite(value) and (value > minimum if above else value >= minimum)):
        bound = f"a number above {minimum:g}" if above else f"{minimum:g} or more"
        raise InputError(f"{flag} {value:g} is out of range; give {bound}")


def _can_track(name: str) -> bool:
    """Whether the package of a tracker is there; Accelerate leaves a missing one out without a word."""
    from accelerate.tracking import get_available_trackers

    return name in map(str, get_available_trackers())


def check_unique(flag: str, values: Sequence[object]) -> None:
    """Refuse a list that names something twice: two runs would share one folder."""
    for value in values:
        if values.count(value) > 1:
            raise InputError(f"{flag} names {value} twice; give each value once")


def split_objectives(pair: str) -> tuple[Objective, Objective | None]:
    """The two objectives of `"ME+GD"`; with `none` there is nothing to retain.

    Raises:
        InputError: if one of them is unknown.
    """
    forget, plus, retain = pair.partition("+")
    if not plus or forget not in FORGET or retain not in RETAIN:
        raise InputError(
            f"--forget-losses {pair!r} is not FORGET+RETAIN; forget is one of {', '.join(FORGET)}, "
            f"retain one of {', '.join(RETAIN)}, for example ME+GD"
        )
    return FORGET[forget], RETAIN[retain]


CONSTANTS = ("beta", "gamma", "layer", "fix_ref_model")
"""Flags that belong to some objectives."""


def constants_of(pair: str) -> set[str]:
    """Which of them have an effect on a pair."""
    objectives = [objective for objective in split_objectives(pair) if objective]
    fits = (
        any(not math.isnan(objective.beta) for objective in objectives),
        any(not math.isnan(objective.gamma) for objective in objectives),
        any(objective.needs_layer for objective in objectives),
        any(objective.reference for objective in objectives),
    )
    return {name for name, fit in zip(CONSTANTS, fits, strict=True) if fit}


# ---------------------------------------------------------------------------------------------------------- presets

A = TypeVar("A", bound=CommonArgs)
T = TypeVar("T")


def preset(*names: str, **overrides: Any) -> UnlearnArgs:
    """`UnlearnArgs` with the published settings of `names`, later ones over earlier ones, changed by `overrides`.

    Raises:
        InputError: if there is no such preset.
    """
    return UnlearnArgs(**{**_published(names), **overrides})


def _published(names: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in names:
        if name not in PRESETS:
            raise InputError(f"--preset {name!r} is unknown; --preset without a name lists them all")
        settings |= PRESETS[name].settings
    return settings


# ------------------------------------------------------------------------------------------------------------- YAML


def to_dict(args: CommonArgs) -> dict[str, Any]:
    """Every field as plain YAML and JSON types."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(args).items()}


def load_yaml(path: str | Path, kind: type[A]) -> A:
    """Arguments from a YAML file as `config.yaml` is written; keys under `environment` there are ignored.

    Raises:
        InputError: if the file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}; give a YAML file as written to config.yaml") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path} holds no `name: value` lines; give a YAML file as written to config.yaml")
    values.pop("environment", None)
    hints = typing.get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    for name in values:
        if name not in known:
            raise InputError(f"--config {path}: unknown key {name!r}; the keys are the flags of --help with _ for -")
    return kind(**{name: _convert(path, name, value, hints[name]) for name, value in values.items()})


def _convert(path: str | Path, name: str, value: Any, hint: Any) -> Any:
    """A YAML value as the field's type: YAML reads 1e-5 as a string and a tuple as a list."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    target = next(option for option in options if option is not type(None))
    origin, inner = typing.get_origin(target), typing.get_args(target)
    try:
        if origin is tuple and isinstance(value, list):
            if inner[-1] is not Ellipsis and len(inner) != len(value):
                raise ValueError
            return tuple(_convert(path, name, item, inner[0]) for item in value)
        if origin is Literal and value in inner:
            return value
        if target is float and not isinstance(value, bool):
            return float(value)
        if origin is None and type(value) is target:
            return value
        raise ValueError
    except (TypeError, ValueError):
        wanted = f"one of {', '.join(map(str, inner))}" if origin is Literal else getattr(target, "__name__", str(target))
        raise InputError(f"--config {path}: {name}: {value!r} has the wrong type; give {wanted}") from None


# ----------------------------------------------------------------------------------------------------- command line


def parse(kind: type[A], argv: Sequence[str] | None = None) -> A:
    """Arguments from the command line, over the defaults of `--config FILE` or (for unlearning) `--preset NAME ...`.

    Raises:
        InputError: as the dataclass does. Unknown flags and values that do not parse end the program with code 2.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    finder.add_argument("--preset", nargs="*")
    try:
        found, flags = finder.parse_known_args(sys.argv[1:] if argv is None else argv)
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name} needs a value") from None
    takes_presets = issubclass(kind, UnlearnArgs)
    if found.preset is not None and not takes_presets:
        raise InputError(f"--preset {' '.join(found.preset)} is for unlearning alone; drop it")
    if found.preset == []:
        print(listing())
        sys.exit(0)
    if found.config and found.preset:
        raise InputError("--config and --preset both set the defaults; give one of them")

    # `--resume` alone means the newest checkpoint
    bare = [i for i, flag in enumerate(flags) if flag == "--resume" and (flags[i + 1 :] or ["--"])[0].startswith("--")]
    for i in reversed(bare):
        flags.insert(i + 1, NEWEST)

    description = f"{inspect.getdoc(kind)}\n\n--config FILE takes the defaults from a config.yaml that a run wrote."
    if takes_presets:
        description += (
            "\n--preset NAME ... takes published settings as defaults, later ones over earlier ones; without a name it"
        )
        description += f" lists them: {', '.join(PRESETS)}."
    default = load_yaml(found.config, kind) if found.config else kind(**_published(found.preset or ()))
    return tyro.cli(kind, args=flags, default=default, description=description)


def _leave_process_group() -> None:
    """End a launch cleanly: a process that leaves while others still talk to it aborts them now and then."""
    from accelerate import PartialState

    if PartialState._shared_state:
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()


def main(kind: type[T], action: Callable[[T], object]) -> NoReturn:
    """Parse, act, and end: with one line on stderr and code 2 for a user's mistake, 1 for a run that left the numbers.

    Otherwise with the code that `action` returns, or 0.
    """
    try:
        outcome = action(parse(kind) if issubclass(kind, CommonArgs) else tyro.cli(kind))
        _leave_process_group()
    except (InputError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    sys.exit(outcome if isinstance(outcome, int) else 0)
