"""What a user can set: one dataclass per command, whose fields are the flags.

The docstring under a field is its `--help` text, and the `Flag` in its type says what it is about, what it changes and which
values it takes. Fields are never changed after construction; what follows from several of them is a property.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from dualoptim.config.checks import check
from dualoptim.config.flags import Flag
from dualoptim.config.optimizers import OPTIMIZERS

DEMO = "demo"
NEWEST = "newest"
HUB_DATA = "locuslab/TOFU"
DATE = "10 Apr 2025"
SPLITS = ("forget01", "forget05", "forget10", "forget")


SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Types in which weights can be saved; auto: that of the checkpoint that was loaded."""

Compared = Literal["rouge_1_recall", "rouge_1_f1", "rouge_l_f1", "rouge_l_f1_unstemmed", "exact_match", "ngram_entropy"]
"""Scores of a model's own answer that are computed where they are asked for."""


@dataclass(frozen=True)
class CommonArgs:
    """What every command needs to know: the model, the data, how they are joined, and where results go."""

    model: Annotated[str, Flag("model", path=True, shown=True)] = DEMO
    """Model to start from: a hub id, a local folder, or a .gguf file. `demo` trains a tiny model on the built-in data first
    (about a minute on two CPU cores)."""
    data: Annotated[str | None, Flag("data", path=True, shown=True)] = None
    """Rows to use: a folder of JSON Lines files in the layout of the published DualOptim data, a folder or hub id in the
    layout of locuslab/TOFU, or `demo`. Default: `demo` with the demo model, otherwise locuslab/TOFU."""
    benchmark: Annotated[str | None, Flag("data", path=True, shown=True)] = None
    """What is forgotten, kept and measured, and how, as a declaration says: lume, muse-news, muse-books or a .yaml file of your
    own (dualoptim/data/README.md). --data is the folder of its files."""
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
    output_dir: Annotated[str | None, Flag("output", "nothing", path=True)] = None
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

    split: Annotated[str, Flag("data", among=SPLITS, shown=True)] = "forget05"
    """Size of the forget tasks: forget01 (40 rows a task in TOFU), forget05 (200) or forget10 (400); or `forget` for data in
    the layout of the published real-world scenario, with neighbor.json as what is kept."""
    forget_file: Annotated[tuple[str, ...] | None, Flag("data", path=True, shown=True)] = None
    """Rows to forget from files of your own, in place of --data: JSON Lines, a JSON array, CSV or Parquet with a column of
    questions and one of answers, or of passages; a .txt file, which is one passage; each also as .gz; or a data set of the hub
    (ID or ID:CONFIGURATION:SPLIT). Passages are cut into pieces of --max-length
    tokens, of which the last one alone has an end token."""
    retain_file: Annotated[tuple[str, ...] | None, Flag("data", path=True, shown=True)] = None
    """Rows to keep from files of the same kinds. Without it give an objective with nothing to retain, such as NPO+none."""
    holdout_file: Annotated[tuple[str, ...] | None, Flag("evaluation", "measures", path=True)] = None
    """Rows that no model has seen, from files of the same kinds, for membership attacks. Default: the data's own (holdout01,
    holdout05, holdout10), if it has them."""
    question_column: Annotated[str, Flag("data")] = "question"
    """Name of the column of questions in your own files. Rows with neither a question nor an answer by these names may have
    `messages` of one user and one assistant, or `prompt` and `completion`."""
    answer_column: Annotated[str, Flag("data")] = "answer"
    """Name of the column of answers in your own files."""
    text_column: Annotated[str, Flag("data")] = "text"
    """Name of the column of passages in your own files; a file that has it and no questions is read as passages."""
    sentence_encoder: Annotated[str | None, Flag("evaluation", "measures", path=True)] = None
    """Sentence encoder for cosine_similarity: a folder or hub id. Published: sentence-transformers/paraphrase-MiniLM-L6-v2."""
    entailment_model: Annotated[str | None, Flag("evaluation", "measures", path=True)] = None
    """Classifier for entailment_score: a folder or hub id of a model with a label `entailment`. Published:
    sileod/deberta-v3-base-tasksource-nli."""
    idk_file: Annotated[str | None, Flag("objectives", path=True)] = None
    """Refusals for IDK and AP, and for targeted_forget_efficacy, one plain sentence a line. Default: the list that comes with
    the package."""
    retain_logs: Annotated[str | None, Flag("evaluation", "measures", path=True, shown=True)] = None
    """Evaluation of a model that never saw the forget set, for forget_quality and privleak: a folder of ours with a
    summary.json, TOFU's eval_log_aggregated.json, or OpenUnlearning's TOFU_EVAL.json."""
    mia_gradnorm: Annotated[bool, Flag("evaluation", "measures")] = False
    """Also attack by the norm of each row's gradient: a backward pass per row of the forget and hold-out sets."""
    lm_eval_tasks: Annotated[tuple[str, ...], Flag("evaluation", "measures")] = ()
    """Tasks of the package lm-eval (the extra lm-eval) that every evaluation also measures, for general ability."""
    lm_eval_path: Annotated[str | None, Flag("evaluation", "measures", path=True)] = None
    """Folder with task definitions (YAML) of your own for --lm-eval-tasks."""
    eval_rows: Annotated[int, Flag("evaluation", "measures", at_least=0, shown=True)] = 0
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
    def reads_own_files(self) -> bool:
        """Tell whether rows come from a file of the user's, whose columns have names of their own."""
        return self.forget_file is not None or self.holdout_file is not None


@dataclass(frozen=True)
class TrainArgs(CommonArgs):
    """What every command that trains needs on top."""

    seed: Annotated[int, Flag("steps", at_least=0, below=2**32, shown=True)] = 1001
    """Seed of the order of examples, the choice of refusals, and dropout. 1001 as published."""
    num_epochs: Annotated[int, Flag("steps", at_least=1, shown=True)] = 5
    """Passes over the forget set (fine-tuning: over all rows). 5 as published."""
    max_steps: Annotated[int, Flag("steps", "measures", at_least=0, shown=True)] = 0
    """Stop after so many optimizer steps of all phases; 0 runs all epochs. The rate still decays over all epochs' steps."""
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
    use_lora: Annotated[bool, Flag("memory", shown=True)] = False
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
    keep_checkpoints: Annotated[int, Flag("output", "nothing", at_least=1)] = 1
    """Checkpoints that a task keeps, or a fine-tuning, the newest ones."""
    resume: Annotated[str | None, Flag("output", "nothing", path=True, acts=True)] = None
    """Continue what an earlier run left in --output-dir: finished tasks are kept, an interrupted one goes on from its newest
    checkpoint, or from the one whose folder is given."""

    @property
    def state_bits(self) -> int:
        """Give 8 if any optimizer state is kept in bytes."""
        return self.optim_bits


@dataclass(frozen=True)
class UnlearnArgs(TrainArgs, MeasureArgs):
    """Make a language model forget one set of facts and keep another, with decoupled optimizer states (DualOptim).

    Without any flag the built-in demo runs.
    """

    forget_losses: Annotated[tuple[str, ...], Flag("objectives", shown=True)] = ("ME+GD",)
    """Objectives as FORGET+RETAIN; each pair is a run of its own. Forget: GA, ME, IDK, NPO, DPO, SimNPO, WGA, SatImp, UNDIAL,
    CE-U, PDU, RMU, LLMU. Retain: GD, AP, KL (over the answer), KLQ (over the question too), EMBED (for RMU), none.
    dualoptim/method/README.md has them in a table."""
    task_list: Annotated[tuple[int, ...], Flag("data", at_least=0, shown=True)] = (1,)
    """Forget tasks, unlearned one after another, each from the weights the last one left. For data in the layout of
    locuslab/TOFU, task 0 is the hub's own forget set and 1 to 10 are the published cuts of its full set."""
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
    max_update: Annotated[float, Flag("optimizer", at_least=0, shown=True)] = 0.0
    """With --optim dual-adamw-plus: bound of the change of one weight in one step, in rates; 0 is the published form, which has
    none (changes of more than 300 rates were measured; the log has the largest one of each step)."""
    quantize_delta: Annotated[bool, Flag("memory")] = False
    """With --optim dual-adamw-plus: keep each phase's own part in 8 bits. --optim-bits 8 sets this and --quantize-base."""
    quantize_base: Annotated[bool, Flag("memory")] = False
    """With --optim dual-adamw-plus: keep the shared base in 8 bits."""
    learning_rates: Annotated[tuple[float, ...], Flag("steps", above=0, shown=True)] = ()
    """Base rates; each is a run of its own. Default: 1e-5 as published, or 5e-4 for the demo's tiny model."""
    forget_lr: Annotated[float | None, Flag("steps", above=0, shown=True)] = None
    """Base rate of forget steps. Default: the run's learning rate. Not with --optim adamw, which has one rate."""
    forget_freq: Annotated[int, Flag("steps", at_least=1, shown=True)] = 1
    """Forget steps in a row before retain steps follow."""
    retain_freq: Annotated[int, Flag("steps", at_least=1, shown=True)] = 5
    """Retain steps in a row after the forget steps. 5 as published. With --optim adamw both frequencies have no effect."""
    forget_coeff: Annotated[float, Flag("objectives", above=0, shown=True)] = 1.0
    """Factor of the forget loss. 1.0 as in DualOptim's scripts; 0.1 is published for ME+GD."""
    regularization_coeff: Annotated[float, Flag("objectives", above=0, shown=True)] = 1.0
    """Factor of the retain loss."""
    forget_max_grad_norm: Annotated[float | None, Flag("steps", at_least=0)] = None
    """Clip the gradient of forget steps to this norm instead of --max-grad-norm; 0 switches it off."""
    beta: Annotated[float | None, Flag("objectives", above=0, shown=True)] = None
    """First constant of the objectives that have one. Default, as published: NPO, DPO and AP 0.1 (inverse temperature), SimNPO
    2.5, WGA 1 and SatImp 5 (exponent of p), UNDIAL 10 (lowers the label's logit), RMU 2 (length of the steering vector)."""
    gamma: Annotated[float | None, Flag("objectives", at_least=0, shown=True)] = None
    """Second constant: SimNPO's margin (default 0), SatImp's exponent of 1-p (default 1)."""
    layer: Annotated[int | None, Flag("objectives", at_least=0, shown=True)] = None
    """Decoder layer that RMU and EMBED read, from 0; not the last. Default: 7 as published, or half the depth of a smaller
    model."""
    reference_dir: Annotated[str | None, Flag("output", "nothing", path=True)] = None
    """Folder of stored references, which runs on the same weights and rows share. Default: reference/ of the output folder."""
    fix_ref_model: Annotated[bool, Flag("objectives")] = False
    """The reference of NPO, DPO, KL, UNDIAL and EMBED: the model before the first task (on), or before the current one (off, as
    published)."""
    mask: Annotated[bool, Flag("objectives", shown=True)] = True
    """Score only the answer in the forget loss; --no-mask scores the question too."""
    eval: Annotated[bool, Flag("evaluation", "measures")] = True
    """Evaluate before and after unlearning."""
    eval_every: Annotated[int, Flag("evaluation", "measures", at_least=0)] = 0
    """Also evaluate after every so many optimizer steps, without lm-eval, into steps/ of the task's folder; the report draws
    curves. Training goes on at the same bits; a signal that ends the run waits for it."""
    save_model_every: Annotated[int, Flag("output", "nothing", at_least=0)] = 0
    """Also save a model that loads after every so many optimizer steps, into steps/ of the task's folder."""
    keep_best: Annotated[float | None, Flag("evaluation", "measures", above=0, at_most=1)] = None
    """Keep the best model that was measured on the way in best/ of the task's folder; best.json says its step, or that the last
    is better. The best: of those whose forget probability is at most this number the one with the highest model utility (where
    that is not measured, retain probability); if there is none, the one with the lowest forget probability."""
    push_to_hub: Annotated[str | None, Flag("output", "nothing", acts=True)] = None
    """Repository on the Hugging Face hub, such as me/model, to which each task's model goes once it is evaluated. Several
    results get one each, with the pair, the rate and the task at the end of its name. Needs `hf auth login` or HF_TOKEN."""
    hub_public: Annotated[bool, Flag("output", "nothing", acts=True)] = False
    """Make the repository of --push-to-hub public; without it, it is private."""
    dry_run: Annotated[bool, Flag("output", "nothing", acts=True)] = False
    """Only print what the run would take in memory, by the model's configuration and its texts' length, and if that fits."""

    @property
    def state_bits(self) -> int:
        """Give 8 if any state is kept in bytes."""
        in_bytes = "adamw-8bit" in (self.forget_optimizer, self.retain_optimizer) or self.quantize_delta or self.quantize_base
        return 8 if in_bytes else self.optim_bits

    @property
    def rates(self) -> tuple[float, ...]:
        """Give the learning rates once the default is resolved."""
        return self.learning_rates or ((5e-4,) if self.model == DEMO else (1e-5,))


@dataclass(frozen=True)
class SweepArgs(UnlearnArgs):
    """Many runs in one call: all of --forget-losses x --learning-rates x --forget-lrs x --seeds, each in its own folder.

    A run that fails is reported and the others go on; a second call skips the finished ones.
    """

    forget_lrs: Annotated[tuple[float, ...], Flag("steps", above=0)] = ()
    """Base rates of forget steps. Default: --forget-lr alone."""
    seeds: Annotated[tuple[int, ...], Flag("steps", at_least=0, below=2**32)] = ()
    """Seeds. Default: --seed alone."""


@dataclass(frozen=True)
class FinetuneArgs(TrainArgs):
    """Teach a model the rows of some splits: target models, which know the forget set, and retain-only models."""

    splits: Annotated[tuple[str, ...], Flag("data", shown=True)] = ("full",)
    """Splits whose rows are learned, by their names in the data: full, retain90, forget01, ..."""
    tasks: Annotated[tuple[int, ...], Flag("data", shown=True)] = ()
    """Learn only these tasks of the forget splits that are named; none given takes all of them."""
    learning_rate: Annotated[float, Flag("steps", above=0, shown=True)] = 1e-5
    """Base rate. 1e-5 as in TOFU for 7B models; small models take more (5e-5 for 135M)."""
    target_loss: Annotated[float, Flag("steps", at_least=0)] = 0.0
    """Stop at the end of the first epoch whose mean loss per token is below this; 0 runs all epochs."""


@dataclass(frozen=True)
class EvalArgs(MeasureArgs):
    """Measure what a model still knows: of the forget task, the retain set, real authors and world facts."""

    task: Annotated[int, Flag("data", at_least=0, shown=True)] = 1
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
    relearn: Annotated[int, Flag("attacks", "measures", at_least=0, shown=True)] = 0
    """Attack: fine-tune for so many steps, and see how much of the forget set comes back."""
    relearn_rows: Annotated[str, Flag("attacks", "measures", path=True)] = "forget"
    """What is fine-tuned on: `forget` (a share of the forget set), `retain` (rows that are kept, none of it), or a file."""
    relearn_share: Annotated[float, Flag("attacks", "measures", above=0, at_most=1)] = 0.2
    """Share of the forget set that relearning sees, drawn once by a fixed seed."""
    relearn_lr: Annotated[float, Flag("attacks", "measures", above=0)] = 1e-5
    """Base rate of relearning; it decays linearly over the passes that the steps take."""
    relearn_batch_size: Annotated[int, Flag("attacks", "measures", at_least=1)] = 4
    """Examples per process and step of relearning."""
    relearn_every: Annotated[int, Flag("attacks", "measures", at_least=0)] = 0
    """Score after every so many steps of relearning, and after the last; 0 scores four times."""
    quantize: Annotated[tuple[int, ...], Flag("attacks", "measures")] = ()
    """Attack: round the weights to so many bits, 8 or 4 or both. bitsandbytes on CUDA; elsewhere simulated: linear layers but
    the output head, symmetric, to the nearest, a scale per output (8) or per 64 weights (4)."""
    paraphrase: Annotated[bool, Flag("attacks", "measures")] = False
    """Attack: ask the paraphrased questions that the data have."""
    sample: Annotated[int, Flag("attacks", "measures", at_least=0)] = 0
    """Attack: draw so many answers to every forget question and take the best."""
    sample_temperature: Annotated[float, Flag("attacks", "measures", above=0)] = 1.0
    """Temperature of those draws."""

    @property
    def reads_own_files(self) -> bool:
        """Tell the same, with the rows of relearning."""
        return super().reads_own_files or self.relearn_rows not in ("forget", "retain")


@dataclass(frozen=True)
class Relearning(FinetuneArgs, MeasureArgs):
    """Says how a model is fine-tuned that is measured on the way, so that its answers end where its positions do."""

    @property
    def reads_own_files(self) -> bool:
        """Tell that the rows of relearning may do so; the evaluation has checked the flags."""
        return True
