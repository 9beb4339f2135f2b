"""What a user can set: one dataclass per command, whose fields are the flags.

The docstring under a field is its `--help` text, and the `Flag` in its type says what it is about, what it changes and which
values it takes. Fields are never changed after construction; what follows from several of them is a property.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from dualoptim.config.checks import check
from dualoptim.config.flags import Flag, check_bounds
from dualoptim.config.optimizers import OPTIMIZERS
from dualoptim.config.values import field_value, settle
from dualoptim.errors import InputError
from dualoptim.method.objectives import split_objectives

DEMO = "demo"
NEWEST = "newest"
HUB_DATA = "locuslab/TOFU"
DATE = "10 Apr 2025"
SPLITS = ("forget01", "forget05", "forget10", "forget")


SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Types in which weights can be saved; auto: that of the checkpoint that was loaded."""

Compared = Literal[
    "rouge_1_recall",
    "rouge_1_f1",
    "rouge_l_f1",
    "rouge_l_f1_unstemmed",
    "exact_match",
    "ngram_entropy",
    "ngram_entropy_of_sentences",
    "distinct_rouge_l_recall",
    "bag_f1",
    "stated_answer",
]
"""Scores of a model's own answer that are computed where they are asked for."""

Rounding = Literal[8, 4, "nf4", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
"""What weights can be rounded to: so many bits, or what others store."""

LESSONS = ("forget", "half", "retain", "general")
"""What relearning can be on without a file."""


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@dataclass(frozen=True)
class CommonArgs:
    """What every command needs to know: the model, the data, how they are joined, and where results go."""

    model: Annotated[str, Flag("model", path=True, shown=True, aliases=("model_path",))] = DEMO
    """Model to start from: a hub id, or one at a branch, tag or commit (org/name@revision), a local folder, or a .gguf file.
    `demo` trains a tiny model on the built-in data first (about a minute on two CPU cores)."""
    data: Annotated[str | None, Flag("data", path=True, shown=True, aliases=("data_path",))] = None
    """Rows to use: a folder of JSON Lines files in the layout of the published DualOptim data, a folder or hub id in the
    layout of locuslab/TOFU, or `demo`. Default: `demo` with the demo model, otherwise locuslab/TOFU; none to learn."""
    forget_file: Annotated[tuple[str, ...] | None, Flag("data", path=True, shown=True)] = None
    """Rows to forget from files of your own, in place of --data: JSON Lines, a JSON array, CSV or Parquet with a column of
    questions and one of answers, or of passages; a .txt file, which is one passage; each also as .gz; or a data set of the hub
    (ID or ID:CONFIGURATION:SPLIT). Passages are cut into pieces of --max-length
    tokens, of which the last one alone has an end token."""
    retain_file: Annotated[tuple[str, ...] | None, Flag("data", path=True, shown=True)] = None
    """Rows to keep from files of the same kinds, also for a benchmark that has none. Unlearning rows of your own without it
    keeps what the model itself answers to general questions before it forgets; with an objective that keeps nothing, such as
    NPO+none, no rows are needed."""
    question_column: Annotated[str, Flag("data")] = "question"
    """Name of the column of questions in your own files. Rows with neither a question nor an answer by these names may have
    `messages` of one user and one assistant, or `prompt` and `completion`."""
    answer_column: Annotated[str, Flag("data")] = "answer"
    """Name of the column of answers in your own files."""
    text_column: Annotated[str, Flag("data")] = "text"
    """Name of the column of passages in your own files; a file that has it and no questions is read as passages."""
    benchmark: Annotated[str | None, Flag("data", path=True, shown=True)] = None
    """What is forgotten, kept and measured, and how, as a declaration says: lume, muse-news, muse-books, rwku, wmdp or a
    .yaml file of your own (dualoptim/data/README.md lists all). --data is the folder of its files."""
    benchmark_rows: Annotated[int, Flag("data", at_least=0, shown=True)] = 0
    """Take so many rows of each group of a benchmark's files (LUME: of each task and kind), drawn once by a fixed seed; 0 takes
    all."""
    template: Annotated[Literal["auto", "chat", "qa", "llama2", "llama3", "phi"], Flag("data", shown=True)] = "auto"
    """How question and answer become text. `auto` takes the first that fits: the tokenizer's own chat template; llama3 or phi
    if their tags are tokens of the vocabulary; llama2 if the model's name says so; qa (Question: / Answer:)."""
    question_start_tag: Annotated[str | None, Flag("data", may_be_empty=True)] = None
    """Text before the question, in place of the template's (\\n is a line break)."""
    question_end_tag: Annotated[str | None, Flag("data", may_be_empty=True)] = None
    """Text after the question, in place of the template's (\\n is a line break)."""
    answer_tag: Annotated[str | None, Flag("data", may_be_empty=True)] = None
    """Text before the answer, in place of the template's (\\n is a line break)."""
    date_string: Annotated[str | None, Flag("data")] = None
    """Date that a chat template writes which asks for today's. Default: what a model of ours was saved with, else 10 Apr 2025,
    as OpenUnlearning pins it."""
    system_prompt: Annotated[str | None, Flag("data")] = None
    """Text of a system message before the question, for a chat template. Default: what a model of ours was saved with."""
    max_length: Annotated[int, Flag("data", at_least=2)] = 500
    """Longest example in tokens, question, answer and end token together; longer ones are cut, with one warning. 500 as
    published; TOFU's longest is 137."""
    packing: Annotated[bool, Flag("memory", "speed")] = True
    """Lay the examples of a micro-batch end to end instead of padding them. Same numbers, less work; a model whose attention
    cannot tell them apart falls back to padding by itself."""
    attn_implementation: Annotated[Literal["auto", "sdpa", "eager", "flash_attention_2"], Flag("model")] = "auto"
    """Attention kernel. `auto`: flash-attention where CUDA, the package and 16-bit weights or autocast are there, else sdpa (on
    CPUs text by text), or eager for a model without sdpa."""
    output_dir: Annotated[str | None, Flag("output", "nothing", path=True, aliases=("save_root",))] = None
    """Folder for everything that is written. Default: runs/<date>-<time>."""
    overwrite: Annotated[bool, Flag("output", "nothing", acts=True)] = False
    """Replace results that an earlier run left in the output folder; without it such a folder is refused."""
    texts: Annotated[bool, Flag("output", "measures")] = True
    """Keep questions, answers and what the model answers in the files of evaluations and attacks; --no-texts keeps their scores
    alone, by the numbers of rows, and prints no examples."""
    threads: Annotated[int, Flag("memory", "speed", at_least=0, below=2**10)] = 0
    """CPU threads of each process; 0 shares the machine's cores among its processes. On a GPU for offloaded steps alone."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def reads_own_files(self) -> bool:
        """Tell whether rows come from a file of the user's, whose columns have names of their own."""
        return self.forget_file is not None or self.retain_file is not None

    @property
    def makes_rows(self) -> bool:
        """Tell whether the rows to keep are made: the model's own answers to general questions."""
        return False

    @property
    def missing(self) -> str | None:
        """Say what no default stands for and has not been given, and what to give; None if nothing is missing."""
        return None

    @property
    def has_tags(self) -> bool:
        """Tell whether any part of the template is given explicitly."""
        return any(tag is not None for tag in (self.question_start_tag, self.question_end_tag, self.answer_tag))

    @property
    def data_source(self) -> str:
        """Say where rows come from once the default is resolved; a benchmark may say it itself."""
        return self.data or self.benchmark or (DEMO if self.model == DEMO else HUB_DATA)


@dataclass(frozen=True)
class MeasureArgs(CommonArgs):
    """What every command that evaluates needs on top."""

    split: Annotated[tuple[str, ...], Flag("data", among=SPLITS, shown=True)] = ("forget05",)
    """Size of the forget tasks: forget01 (40 rows a task in TOFU), forget05 (200) or forget10 (400); or `forget` for data in
    the layout of the published real-world scenario, with neighbor.json as what is kept. Several: each of them from the first
    model, with a table over splits."""
    targets: Annotated[tuple[str, ...] | None, Flag("data", shown=True)] = None
    """Which of a benchmark's targets are forgotten, each from the first model, with a table over them: their names, a file with
    one name a line, or `all` (RWKU: people). Default: --task-list, by their numbers."""
    holdout_file: Annotated[tuple[str, ...] | None, Flag("evaluation", "measures", path=True)] = None
    """Rows that no model has seen, from files of the same kinds, for membership attacks. Default: the data's own (holdout01,
    holdout05, holdout10), if it has them."""
    retain_held_out: Annotated[float, Flag("data", at_least=0, shown=True)] = 0.0
    """Keep so many rows of the retain set from every step, or this share of them below 1, to see what is kept of rows that no
    step trains on: as the set retain_unseen. They are drawn by a fixed seed. Evaluations of the model take the same number."""
    refusal_column: Annotated[str | None, Flag("data")] = None
    """Name of a column in --forget-file with the refusal of each row, which IDK and DPO read in place of one of --idk-file; AP
    reads it in --retain-file."""
    group_column: Annotated[str | None, Flag("data", "measures")] = None
    """Name of a column in your own files by whose values rows have means of their own, as sets such as forget_GROUP."""
    sentence_encoder: Annotated[str | None, Flag("evaluation", "measures", path=True)] = None
    """Sentence encoder for cosine_similarity: a folder or hub id. Published: sentence-transformers/paraphrase-MiniLM-L6-v2."""
    entailment_model: Annotated[str | None, Flag("evaluation", "measures", path=True)] = None
    """Classifier for entailment_score: a folder or hub id of a model with a label `entailment`. Published:
    sileod/deberta-v3-base-tasksource-nli."""
    gibberish_model: Annotated[str | None, Flag("evaluation", "measures", path=True)] = None
    """Classifier for clean_probability: a folder or hub id of a model with a label `clean`. OpenUnlearning's:
    madhurjindal/autonlp-Gibberish-Detector-492513457."""
    idk_file: Annotated[str | None, Flag("objectives", path=True)] = None
    """Refusals for IDK, JensUn and AP, and for targeted_forget_efficacy, one plain sentence a line. Default: the list that
    comes with the package."""
    retain_logs: Annotated[str | None, Flag("evaluation", "measures", path=True, shown=True)] = None
    """Evaluation of a model that never saw the forget set, for forget_quality and privleak: a folder of ours with a
    summary.json, TOFU's eval_log_aggregated.json, or OpenUnlearning's TOFU_EVAL.json."""
    mia_gradnorm: Annotated[bool, Flag("evaluation", "measures")] = False
    """Also attack by the norm of each row's gradient: a backward pass per row of the forget and hold-out sets."""
    lm_eval_tasks: Annotated[tuple[str, ...], Flag("evaluation", "measures")] = ()
    """Tasks of the package lm-eval (the extra lm-eval) that every evaluation also measures, for general ability."""
    lm_eval_path: Annotated[str | None, Flag("evaluation", "measures", path=True)] = None
    """Folder with task definitions (YAML) of your own for --lm-eval-tasks."""
    lm_eval_data: Annotated[str | None, Flag("evaluation", "measures", path=True)] = None
    """Folder of data sets for --lm-eval-tasks, as owner/name/configuration/split.parquet (.json, .jsonl, .csv): cais/wmdp in
    FOLDER/cais/wmdp. Those that it lacks come from the hub. Default: the folder --data of a --benchmark."""
    eval_rows: Annotated[int, Flag("evaluation", "measures", at_least=0, shown=True, aliases=("ds_size",))] = 0
    """Rows per evaluation set, from its start; 0 takes all of them. The published code scores 300 (of forget10's 400)."""
    eval_batch_size: Annotated[int, Flag("evaluation", "speed", at_least=1)] = 16
    """Texts per forward pass of the evaluation, and answered at once; on CUDA up to 8 times as many are answered, as memory
    allows. It changes time and memory, not results."""
    max_new_tokens: Annotated[int, Flag("evaluation", "measures", at_least=1)] = 128
    """Longest generated answer in tokens. TOFU's longest answer has about 110."""
    metrics: Annotated[tuple[Compared, ...], Flag("evaluation", "measures")] = ()
    """Scores of every evaluation set beside the usual ones. A benchmark asks for its own."""
    evaluate_sharded: Annotated[Literal["auto", "yes", "no"], Flag("evaluation", "speed")] = "auto"
    """In ZeRO-3 and FSDP2 launches: measure a model divided among the processes, or whole on each of them. Same numbers; whole
    is far faster where it fits. `auto`: divided where the whole would take more than half of a device's memory."""

    @property
    def reads_retain(self) -> bool:
        """Tell whether steps read rows to keep; an evaluation, which knows no objectives, takes it that they did."""
        return True

    @property
    def reads_own_files(self) -> bool:
        """Tell the same, with the rows of membership attacks."""
        return super().reads_own_files or self.holdout_file is not None


@dataclass(frozen=True)
class TrainArgs(CommonArgs):
    """What every command that trains needs on top."""

    seed: Annotated[int, Flag("steps", at_least=0, below=2**32, shown=True)] = 1001
    """Seed of the order of examples, the choice of refusals, and dropout. 1001 as published."""
    num_epochs: Annotated[int, Flag("steps", at_least=1, shown=True)] = 5
    """Passes over the forget set (fine-tuning: over all rows). 5 as published."""
    max_steps: Annotated[int, Flag("steps", "measures", at_least=0, shown=True)] = 0
    """Take exactly so many optimizer steps of all phases, fewer or more than the epochs have, which then repeat; 0 takes those
    of all epochs. The rate decays over the larger of the two numbers."""
    batch_size: Annotated[int, Flag("steps", at_least=1, below=2**16, shown=True)] = 4
    """Examples per process and micro-batch."""
    gradient_accumulation_steps: Annotated[int, Flag("steps", at_least=1, below=2**16, shown=True)] = 1
    """Micro-batches per optimizer step; every one of a step belongs to the same phase."""
    trainable: Annotated[str | None, Flag("optimizer", shown=True)] = None
    """Weights that train, the others stay as they are: a regular expression that is found in their names, such as
    'layers.(5|6|7).mlp.down_proj', or last:2 for all of the last two layers. A tied output head and its embeddings are one
    weight under two names. The whole model is saved. Default: all of them."""
    weight_decay: Annotated[float, Flag("optimizer", at_least=0, shown=True)] = 0.01
    """Decoupled weight decay of weights (never of biases and norms). 0.01 as published."""
    adam_betas: Annotated[tuple[float, float], Flag("optimizer", at_least=0, below=1, shown=True)] = (0.9, 0.999)
    """Decay rates of Adam's two moments, each from 0 up to but not 1. torch's default, as published."""
    max_grad_norm: Annotated[float, Flag("steps", at_least=0, shown=True)] = 1.0
    """Clip the gradient of a step to this norm; 0 switches clipping off. 1.0 as in the published runs."""
    lr_schedule: Annotated[Literal["published", "linear", "constant", "cosine"], Flag("steps", shown=True)] = "published"
    """How the rate goes on after its linear warm-up, over the steps of all phases. published: a linear decay in which no step,
    of the warm-up neither, has rate zero. linear, constant, cosine (half a period): those of transformers, whose warm-up begins
    with a step of rate zero."""
    warmup_epochs: Annotated[float, Flag("steps", at_least=0)] = 1.0
    """Epochs of linear warm-up. 1 as published; 0 has none."""
    warmup_steps: Annotated[int | None, Flag("steps", at_least=0)] = None
    """Steps of linear warm-up, in place of epochs."""
    gradient_checkpointing: Annotated[bool, Flag("memory", "speed")] = False
    """Recompute activations in the backward pass: about a third more time for far less memory."""
    optim_bits: Annotated[Literal[32, 8], Flag("memory", shown=True)] = 32
    """Bits of the optimizer states. 8 (bitsandbytes) holds about a quarter; embeddings, norms, biases and tensors of fewer than
    4,096 elements stay in 32."""
    quantize_embeddings: Annotated[bool, Flag("memory")] = False
    """With --optim-bits 8, keep the states of embeddings in 8 bits as well. They are the least stable ones."""
    use_lora: Annotated[bool, Flag("memory", shown=True, aliases=("use_LoRA",))] = False
    """Train a low-rank adapter instead of the weights, and save it alone."""
    lora_rank: Annotated[int, Flag("memory", at_least=1, below=2**16, shown=True)] = 8
    """Rank of a new adapter. 8 as in TOFU."""
    lora_alpha: Annotated[int, Flag("memory", at_least=1, shown=True)] = 32
    """The adapter's output is scaled by this over the rank. 32 as in TOFU."""
    lora_dropout: Annotated[float, Flag("memory", at_least=0, below=1)] = 0.0
    """Dropout on the adapter's input, from 0 up to but not 1. 0, because dropout differs with the number of processes."""
    lora_target_modules: Annotated[tuple[str, ...], Flag("memory")] = ("all-linear",)
    """Modules that get an adapter, by name (q_proj v_proj ...). `all-linear`: every linear layer but the output head
    and routers."""
    load_in_4bit: Annotated[bool, Flag("memory")] = False
    """Hold the frozen weights in 4 bits (QLoRA). Needs CUDA, bitsandbytes and --use-lora."""
    log_with: Annotated[tuple[str, ...], Flag("output", "nothing")] = ()
    """Trackers that also get every step and score, through Accelerate: wandb, tensorboard, mlflow, comet_ml, aim, clearml,
    dvclive, swanlab, trackio. None by default: nothing leaves the machine unless you ask for it."""

    save_dtype: Annotated[SaveDtype, Flag("output")] = "auto"
    """Type of the weights that are saved, rounded from the float32 ones that were trained: auto takes the type of the
    checkpoint that was loaded, and float32 for an adapter. What is saved is what is measured."""
    save_every: Annotated[int, Flag("output", "nothing", at_least=0)] = 0
    """Write a checkpoint every so many optimizer steps; 0 writes one only where a signal ends the run."""
    save_model_every: Annotated[int, Flag("output", "nothing", at_least=0)] = 0
    """Also save a model that loads after every so many optimizer steps, into steps/ of the task's folder (fine-tuning: of the
    output folder)."""
    save_model_every_epochs: Annotated[int, Flag("output", "nothing", at_least=0)] = 0
    """The same after every so many epochs, in place of steps."""
    keep_checkpoints: Annotated[int, Flag("output", "nothing", at_least=1)] = 1
    """Checkpoints that a task keeps, or a fine-tuning, the newest ones."""
    resume: Annotated[str | None, Flag("output", "nothing", path=True, acts=True)] = None
    """Continue what an earlier run left in --output-dir: finished tasks are kept, an interrupted one goes on from its newest
    checkpoint, or from the one whose folder is given."""

    @property
    def state_bits(self) -> int:
        """Give 8 if any optimizer state is kept in bytes."""
        return self.optim_bits

    def saves_model_after(self, step: int, per_epoch: int) -> bool:
        """Tell whether a model that loads is saved after a step; an epoch has `per_epoch` of them."""
        return _is_due(step, self.save_model_every or self.save_model_every_epochs * per_epoch)


@dataclass(frozen=True)
class UnlearnArgs(TrainArgs, MeasureArgs):
    """Make a language model forget one set of facts and keep another, with decoupled optimizer states (DualOptim).

    Without any flag the built-in demo runs.
    """

    forget_losses: Annotated[tuple[str, ...], Flag("objectives", shown=True, aliases=("forget_loss",))] = ("ME+GD",)
    """Objectives as FORGET+RETAIN; each pair is a run of its own. Forget: GA, ME, ME-floor (ME as released), IDK, ALT, NPO,
    DPO, AltPO, SimNPO, WGA, SatImp, UNDIAL, CE-U, PDU, JensUn, IHL, RMU, RMUQ, ARMU, ARMU-once, CB, CBQ, CBQ-orth, LLMU.
    Retain: GD, AP, KL (over the answer), KLQ (over the question too), JSD (for JensUn), EMBED (for RMU), EMBEDQ (for RMUQ and
    ARMU), EMBEDQ-norm (for CBQ), none. dualoptim/method/README.md has a table."""
    retain_questions: Annotated[str | None, Flag("data", path=True)] = None
    """Questions of your own, one a line of a text file, that the model answers before it forgets beside those of the package,
    where rows to keep are made because there is no --retain-file."""
    alternative_column: Annotated[str | None, Flag("data")] = None
    """Name of a column in --forget-file with plausible other answers of each row, which AltPO and ALT teach: a text, or in JSON
    and Parquet a list, of which one is drawn at each visit."""
    task_list: Annotated[tuple[int, ...], Flag("data", at_least=0, shown=True, aliases=("task", "tasks", "task_id"))] = (1,)
    """Forget tasks, unlearned one after another, each from the weights the last one left. For data in the layout of
    locuslab/TOFU, task 0 is the hub's own forget set and 1 to 10 are the published cuts of its full set."""
    tasks_independent: Annotated[bool, Flag("data", shown=True)] = False
    """Unlearn each task of the list from the first model instead, as if it were a run of its own, and show the mean and the
    deviation over tasks, as the papers print."""
    optim: Annotated[str, Flag("optimizer", among=OPTIMIZERS, shown=True)] = "dual-adamw"
    """dual-adamw: one optimizer state per phase (DualOptim). dual-adamw-plus: a base state that the phases share, and how each
    differs from it (DualOptim+). adamw-alternate: the same phases over one shared state. adamw: both losses in every step, one
    state."""
    forget_optimizer: Annotated[str | None, Flag("optimizer", shown=True)] = None
    """With --optim dual-adamw: the optimizer of forget steps: adamw, adamw-8bit, sgd (momentum: the first of its betas),
    signsgd, or an import path such as torch.optim.RMSprop, whose state starts at zero. Default: adamw, or adamw-8bit with
    --optim-bits 8."""
    retain_optimizer: Annotated[str | None, Flag("optimizer", shown=True)] = None
    """The same for retain steps."""
    forget_adam_betas: Annotated[tuple[float, float] | None, Flag("optimizer", at_least=0, below=1)] = None
    """Decay rates of the forget optimizer's moments. Default: --adam-betas."""
    forget_weight_decay: Annotated[float | None, Flag("optimizer", at_least=0)] = None
    """Weight decay of forget steps. Default: --weight-decay."""
    decouple: Annotated[Literal["both", "m", "v", "none"], Flag("optimizer")] = "both"
    """With --optim dual-adamw: which of Adam's moments each phase has for itself; the other is shared (an ablation)."""
    base_betas: Annotated[tuple[float, float] | None, Flag("optimizer", at_least=0, below=1, shown=True)] = None
    """With --optim dual-adamw-plus: decay rates of the base's moments. Default: --adam-betas."""
    max_update: Annotated[float | None, Flag("optimizer", at_least=0, shown=True)] = None
    """Bound of the change of one weight in one step, in rates; 0: none, as published (changes of 300 rates were measured, with
    --decouple v of 250,000; the log has the largest one of each step). Default: 1 with --decouple m or v, which have a state
    that phases share, and 0 with --optim dual-adamw-plus."""
    quantize_delta: Annotated[bool, Flag("memory")] = False
    """With --optim dual-adamw-plus: keep each phase's own part in 8 bits. --optim-bits 8 sets this and --quantize-base."""
    quantize_base: Annotated[bool, Flag("memory")] = False
    """With --optim dual-adamw-plus: keep the shared base in 8 bits."""
    project_forget: Annotated[Literal["none", "global", "tensor"], Flag("optimizer", shown=True)] = "none"
    """With a retain state of its own: take out of each forget gradient what goes against that state's first moment, over all
    parameters together (global) or each alone (tensor)."""
    learning_rates: Annotated[tuple[float, ...], Flag("steps", above=0, shown=True, aliases=("learning_rate", "lr"))] = ()
    """Base rates; each is a run of its own. Default: 1e-5 as published, or 1.5e-4 for the demo's tiny model."""
    forget_lr: Annotated[float | None, Flag("steps", above=0, shown=True)] = None
    """Base rate of forget steps. Default: the learning rate times --forget-strength. Not with --optim adamw, which has one."""
    forget_strength: Annotated[float | None, Flag("steps", above=0)] = None
    """How strongly to forget, in place of --forget-lr: a factor of the rate of forget steps (of the learning rate, or of what a
    preset or a file says of forget steps). 2 forgets faster, 0.5 more gently. Default: 3 with --optim dual-adamw where each
    phase has both moments for itself, else 1; a preset has its own."""
    forget_freq: Annotated[int, Flag("steps", at_least=1, shown=True)] = 1
    """Forget steps in a row before retain steps follow."""
    retain_freq: Annotated[int, Flag("steps", at_least=1, shown=True)] = 5
    """Retain steps in a row after the forget steps. 5 as published. With --optim adamw both frequencies have no effect."""
    average_cycles: Annotated[float, Flag("steps", at_least=0, below=1, shown=True)] = 0.0
    """Save a moving mean of the weights at the ends of cycles, after their retain steps, and of the run, in place of the last
    ones: its decay (0.9: some ten cycles count). What is measured on the way is the weights that train. 0: off. Not under
    ZeRO."""
    sam_rho: Annotated[float, Flag("steps", at_least=0, shown=True)] = 0.0
    """Take forget steps by the gradient at weights that are moved this far (their norm) to where the forget loss is larger
    (SAM; 0.01 to 0.1 are published): a second pass of each forget step. 0: off. Not under ZeRO or FSDP."""
    forget_coeff: Annotated[float, Flag("objectives", above=0, shown=True)] = 1.0
    """Factor of the forget loss. 1.0 as in DualOptim's scripts; 0.1 is published for ME+GD with --optim adamw, where it weighs
    the two losses. Where forget steps have a state of their own it changes little, for AdamW divides it out (0.1 against 10
    moved a loss by 4 %): take --forget-strength, --forget-lr or --retain-freq there."""
    regularization_coeff: Annotated[float, Flag("objectives", above=0, shown=True)] = 1.0
    """Factor of the retain loss."""
    forget_max_grad_norm: Annotated[float | None, Flag("steps", at_least=0)] = None
    """Clip the gradient of forget steps to this norm instead of --max-grad-norm; 0 switches it off."""
    beta: Annotated[float | None, Flag("objectives", above=0, shown=True)] = None
    """First constant of the objectives that have one. Default, as published: NPO, DPO, AltPO and AP 0.1 (inverse temperature),
    SimNPO 2.5, WGA 1 and SatImp 5 (exponent of p), UNDIAL 10 (lowers the label's logit), RMU and RMUQ 2 (length of the steering
    vector), ARMU and ARMU-once 5 (the same in lengths of the layer's own states), CBQ-orth 1 (weight of how alike rows are). A
    benchmark's corpora may have their own."""
    gamma: Annotated[float | None, Flag("objectives", at_least=0, shown=True)] = None
    """Second constant: SimNPO's margin (default 0), SatImp's exponent of 1-p (default 1)."""
    layer: Annotated[int | None, Flag("objectives", at_least=0, shown=True)] = None
    """Decoder layer that RMU, CB, EMBED and their like read, from 0; not the last. Default: 7 as published for RMU, or half the
    depth of a smaller model."""
    reference_dir: Annotated[str | None, Flag("output", "nothing", path=True)] = None
    """Folder of stored references, which runs on the same weights and rows share. Default: reference/ of the output folder."""
    fix_ref_model: Annotated[bool, Flag("objectives")] = False
    """The reference of NPO, DPO, AltPO, KL, JSD, UNDIAL, ARMU, CB and EMBED: the model before the first task (on), or before
    the current one (off, as published)."""
    mask: Annotated[bool, Flag("objectives", shown=True)] = True
    """Score only the answer in the forget loss; --no-mask scores the question too."""
    eval: Annotated[bool, Flag("evaluation", "measures")] = True
    """Evaluate before and after unlearning."""
    eval_every: Annotated[int, Flag("evaluation", "measures", at_least=0)] = 0
    """Also evaluate after every so many optimizer steps, without lm-eval, into steps/ of the task's folder; the report draws
    curves. Training goes on at the same bits; a signal that ends the run waits for it."""
    eval_every_epochs: Annotated[int, Flag("evaluation", "measures", at_least=0)] = 0
    """The same after every so many epochs, in place of steps."""
    keep_best: Annotated[float | None, Flag("evaluation", "measures", above=0, at_most=1)] = None
    """Keep the best model that was measured on the way in best/ of the task's folder; best.json says its step, or that the last
    is better. The best: of those whose forget probability is at most this number the one with the highest model utility (where
    that is not measured, retain probability); if there is none, the one with the lowest forget probability."""
    keep_budget: Annotated[float | None, Flag("steps", above=0, below=1, shown=True)] = None
    """Stop, and keep the last good model, when what is kept has lost so much: the mean probability of the true answers of up to
    64 rows of the retain set, the same throughout, of those that no step trains on if there are any. It is measured up to 50
    times, at the end of cycles, and the model is saved each time. 0.02 is a loss that hardly anyone notices."""
    forget_until: Annotated[float | None, Flag("steps", above=0, below=1, shown=True)] = None
    """Stop when the mean probability of the true answers of up to 64 forget rows has come down to this, measured in the same
    way; a model that never saw them has about 0.01 to 0.2."""
    push_to_hub: Annotated[str | None, Flag("output", "nothing", acts=True)] = None
    """Repository on the Hugging Face hub, such as me/model, to which each task's model goes once it is evaluated. Several
    results get one each, with the pair, the rate and the task at the end of its name. Needs `hf auth login` or HF_TOKEN."""
    hub_public: Annotated[bool, Flag("output", "nothing", acts=True)] = False
    """Make the repository of --push-to-hub public; without it, it is private."""
    dry_run: Annotated[bool, Flag("output", "nothing", acts=True)] = False
    """Only print what the run would take in memory, by the model's configuration and its texts' length, and if that fits; of a
    sweep the runs that it begins with."""

    @property
    def makes_rows(self) -> bool:
        """Tell whether they are, because a pair of objectives reads rows to keep and there is no file of them."""
        return self.reads_retain and self.forget_file is not None and self.retain_file is None

    @property
    def reads_retain(self) -> bool:
        """Tell whether a pair of objectives does, in retain steps or for the answers of other questions."""
        pairs = map(split_objectives, self.forget_losses)
        return any(retain or "mismatch" in forget.texts for forget, retain in pairs)

    @property
    def measures_on_the_way(self) -> bool:
        """Tell whether the model is evaluated between steps."""
        return bool(self.eval_every or self.eval_every_epochs)

    def measures_after(self, step: int, per_epoch: int) -> bool:
        """Tell whether the model is evaluated after a step; an epoch has `per_epoch` of them."""
        return _is_due(step, self.eval_every or self.eval_every_epochs * per_epoch)

    @property
    def state_bits(self) -> int:
        """Give 8 if any state is kept in bytes."""
        in_bytes = "adamw-8bit" in (self.forget_optimizer, self.retain_optimizer) or self.quantize_delta or self.quantize_base
        return 8 if in_bytes else self.optim_bits

    @property
    def rates(self) -> tuple[float, ...]:
        """Give the learning rates once the default is resolved."""
        return self.learning_rates or ((1.5e-4,) if self.model == DEMO else (1e-5,))


@dataclass(frozen=True)
class SweepArgs(UnlearnArgs):
    """Many runs in one call: all of --forget-losses x --learning-rates x --forget-lrs x --seeds x --split x --vary.

    Each has a folder of its own. A run that fails is reported and the others go on; a second call skips the finished ones.
    """

    forget_lrs: Annotated[tuple[float, ...], Flag("steps", above=0)] = ()
    """Base rates of forget steps. Default: --forget-lr alone."""
    seeds: Annotated[tuple[int, ...], Flag("steps", at_least=0, below=2**32)] = ()
    """Seeds. Default: --seed alone."""
    vary: Annotated[tuple[tuple[str, ...], ...], Flag("steps")] = ()
    """Any other flag that changes what a run computes, with the values that it takes in turn: --vary forget_coeff 0.1 1. Given
    once for each flag; commas stand within a value of several parts: --vary task_list 1 2 1,2 --vary base_betas 0.9,0.95."""
    budget: Annotated[int | None, Flag("steps", "nothing", at_least=1)] = None
    """Search with at most so many runs in place of all: every setting with the first seed (of too many a draw), then the better
    half of each method's with the next seed, and so on. Better: what is kept where the forget set is forgotten, as the frontier
    says. The same command goes on; --dry-run lists the first round."""

    @property
    def missing(self) -> str | None:
        """Tell that there is no folder."""
        return None if self.output_dir else "a sweep needs a folder that a second call finds again; give --output-dir"


@dataclass(frozen=True)
class FinetuneArgs(TrainArgs):
    """Teach a model the rows of some splits: target models, which know the forget set, and retain-only models."""

    splits: Annotated[tuple[str, ...], Flag("data", shown=True)] = ("full",)
    """Splits whose rows are learned, by their names in the data: full, retain90, forget01, ...; of files of your own forget,
    retain, or full for both."""
    tasks: Annotated[tuple[int, ...], Flag("data", shown=True, aliases=("task", "task_list"))] = ()
    """Learn only these tasks of the forget splits that are named; none given takes all of them."""
    learning_rate: Annotated[float, Flag("steps", above=0, shown=True, aliases=("learning_rates", "lr"))] = 1e-5
    """Base rate. 1e-5 as in TOFU for 7B models; small models take more (5e-5 for 135M)."""
    target_loss: Annotated[float, Flag("steps", at_least=0)] = 0.0
    """Stop at the end of the first epoch whose mean loss per token is below this; 0 runs all epochs."""

    @property
    def missing(self) -> str | None:
        """Tell that nothing says what to learn."""
        if self.data or self.forget_file or self.benchmark:
            return None
        return (
            "nothing says what is to be learned; give --forget-file FILE, --data FOLDER (or locuslab/TOFU) or --benchmark NAME"
        )


@dataclass(frozen=True)
class EvalArgs(MeasureArgs):
    """Measure what a model still knows: of the forget task, the retain set, real authors and world facts."""

    task: Annotated[int, Flag("data", at_least=0, shown=True, aliases=("tasks", "task_list", "task_id"))] = 1
    """The forget task whose rows are the forget set."""
    retain_model: Annotated[str | None, Flag("evaluation", "measures", path=True, shown=True)] = None
    """A model that never saw the forget set, evaluated in the same way for forget_quality, privleak and relearning, in place of
    --retain-logs."""
    reference_model: Annotated[str | None, Flag("evaluation", "measures", path=True)] = None
    """A model whose losses the reference attack compares with; the retain-only model, for example."""
    generate_with: Annotated[Literal["transformers", "compiled", "vllm"], Flag("evaluation", "measures")] = "transformers"
    """What answers questions. `compiled`: transformers with a static cache and compiled steps, for models that can be compiled.
    `vllm`: that package, which gets the weights in a folder; draws and changed weights stay with transformers. These two need
    CUDA."""
    relearn: Annotated[tuple[int, ...], Flag("attacks", "measures", at_least=0, shown=True)] = ()
    """Attack: fine-tune for so many steps, and see how much of the forget set comes back. Of this flag and the rows, rates and
    ranks below, each may have several values: every combination is a relearning of its own, from the same weights."""
    relearn_rows: Annotated[tuple[str, ...], Flag("attacks", "measures", path=True)] = ("forget",)
    """What is fine-tuned on: `forget` (a share of the forget set) or `half` of it, drawn once by a fixed seed and measured by
    the others; `retain` (rows that are kept, none of it); `general` (unrelated: the package's questions with the model's own
    answers); or a file of rows or passages."""
    relearn_share: Annotated[float, Flag("attacks", "measures", above=0, at_most=1)] = 0.2
    """Share of the forget set that relearning on `forget` sees."""
    relearn_lr: Annotated[tuple[float, ...], Flag("attacks", "measures", above=0, aliases=("relearn_lrs",))] = (1e-5,)
    """Base rates of relearning; each decays linearly over the passes that the steps take."""
    relearn_lora: Annotated[tuple[int, ...], Flag("attacks", "measures", at_least=0, below=2**16)] = (0,)
    """Ranks of a low-rank adapter that relearning trains in place of the weights, which takes a higher rate; 0 trains all
    weights."""
    relearn_batch_size: Annotated[int, Flag("attacks", "measures", at_least=1)] = 4
    """Examples per process and step of relearning."""
    relearn_every: Annotated[int, Flag("attacks", "measures", at_least=0)] = 0
    """Score after every so many steps of relearning, and after the last; 0 scores four times."""
    quantize: Annotated[tuple[Rounding, ...], Flag("attacks", "measures")] = ()
    """Attack: round the weights. To 8 or 4 bits: by bitsandbytes on CUDA; elsewhere simulated: linear layers but the output
    head, symmetric, to the nearest, a scale per output (8) or per 64 weights (4). nf4: to what bitsandbytes stores, on any
    device. q8_0, q5_1, q5_0, q4_1, q4_0: to what llama.cpp stores, by the package gguf."""
    paraphrase: Annotated[bool, Flag("attacks", "measures")] = False
    """Attack: ask the paraphrased questions that the data have; of your own rows without any those that templates make."""
    few_shot: Annotated[int, Flag("attacks", "measures", at_least=0)] = 0
    """Attack: ask each forget question behind so many others with their true answers."""
    prefix_words: Annotated[int, Flag("attacks", "measures", at_least=0)] = 0
    """Attack: give so many first words of each forget row's true answer, and measure the rest."""
    sample: Annotated[int, Flag("attacks", "measures", at_least=0)] = 0
    """Attack: draw so many answers to every forget question and take the best."""
    sample_temperature: Annotated[float, Flag("attacks", "measures", above=0)] = 1.0
    """Temperature of those draws."""

    @property
    def missing(self) -> str | None:
        """Tell that the demo's model is none that could be measured."""
        if self.model != DEMO:
            return None
        return "--model demo has no weights on disk; give a folder, such as the model/ that a demo run wrote"

    @property
    def reads_own_files(self) -> bool:
        """Tell the same, with the rows of relearning."""
        return super().reads_own_files or any(rows not in LESSONS for rows in self.relearn_rows)


@dataclass(frozen=True)
class Relearning(FinetuneArgs, MeasureArgs):
    """Says how a model is fine-tuned that is measured on the way, so that its answers end where its positions do."""

    @property
    def reads_own_files(self) -> bool:
        """Tell that the rows of relearning may do so; the evaluation has checked the flags."""
        return True


@dataclass(frozen=True)
class ReportArgs:
    """Describe runs that are finished, or as far as they are: settings, scores before and after, plots, example answers.

    Several runs are compared as well. Writes report.md, report.html and the plots as report/*.png; an earlier report there is
    replaced.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, Flag("data", path=True)]
    """Output folders of dualoptim unlearn, sweep or eval, or single task folders."""
    output_dir: Annotated[str | None, Flag("output", "nothing", path=True)] = None
    """Folder that the report is written to. Default: the first RUN."""
    examples: Annotated[int, Flag("output", at_least=0)] = 3
    """Answers per evaluation set that are shown."""
    texts: Annotated[bool, Flag("output")] = True
    """Show them; --no-texts shows none, as --examples 0 does."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", field_value(ReportArgs, "runs", self.runs, "RUN"))
        if not self.runs:
            raise InputError("no RUN is given; name the output folder of a run, such as runs/demo")
        settle(self)
        check_bounds(self)


@dataclass(frozen=True)
class AskArgs:
    """Ask a model questions, and beside it the one that it was before unlearning or fine-tuning.

    Without a question it asks for them, one after another, or reads them from its input, one a line. Nothing is written.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN"), Flag("model", path=True)]
    """Output folder of a run, whose newest model is asked, and the one that it began with. Or a model alone: its folder, a hub
    id, or a .gguf file."""
    questions: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[QUESTION ...]"), Flag("data")] = ()
    """Questions, each in quotes."""
    questions_file: Annotated[str | None, Flag("data", path=True)] = None
    """Questions from a file: one a line of a .txt file, or the column `question` of JSON Lines, CSV or Parquet."""
    before: Annotated[str | None, Flag("model", path=True)] = None
    """Model whose answers stand first, in place of the one that the run began with."""
    max_new_tokens: Annotated[int, Flag("evaluation", at_least=1)] = 128
    """Longest answer in tokens."""
    max_length: Annotated[int | None, Flag("data", at_least=2)] = None
    """Longest question in tokens. Default: what the run had as longest example, or 500."""

    def __post_init__(self) -> None:
        _settle_run(self)
        if self.questions and self.questions_file:
            raise InputError(f"--questions-file {self.questions_file} and a question are given; give one of them")


@dataclass(frozen=True)
class ExportArgs:
    """Write a model in the form that others serve: with its adapter merged, or as one .gguf file for llama.cpp."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN"), Flag("model", path=True)]
    """Output folder of a run, whose newest model is taken, or a model: its folder or a hub id."""
    to: Annotated[Literal["merged", "gguf"], Flag("output")] = "merged"
    """`merged`: a folder for from_pretrained, its adapter merged into the weights. `gguf`: one file with weights and tokenizer,
    of Llama and Qwen2 models with a byte-level tokenizer, by the package gguf."""
    negate: Annotated[str | None, Flag("model", path=True)] = None
    """Take away what fine-tuning has added: that of a model which was fine-tuned from RUN on the rows to forget (the output
    folder of a fine-tuning, a folder or hub id). A weight w, there w', becomes w - alpha (w' - w)."""
    alpha: Annotated[float, Flag("optimizer", above=0)] = 1.0
    """How often --negate takes it away."""
    output_dir: Annotated[str | None, Flag("output", "nothing", path=True)] = None
    """Folder in which model/ or model.gguf is written."""
    save_dtype: Annotated[SaveDtype, Flag("output")] = "auto"
    """Type of the weights that are written. auto: the type that they have, with an adapter that of its base."""

    def __post_init__(self) -> None:
        _settle_run(self)
        if self.negate is None and self.alpha != 1:
            raise InputError(f"--alpha {self.alpha:g} has no effect without --negate; give the fine-tuned model")

    @property
    def missing(self) -> str | None:
        """Tell that there is no folder."""
        return None if self.output_dir else "an export needs a folder to write to; give --output-dir"


def _settle_run(args: AskArgs | ExportArgs) -> None:
    """Give every flag a value of its type, and make sure that numbers are within their bounds.

    Raises:
        InputError: naming the first that is not.
    """
    object.__setattr__(args, "run", field_value(type(args), "run", args.run, "RUN"))
    settle(args)
    check_bounds(args)
