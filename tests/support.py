"""What several tests call: tiny models, short runs, launches on the CPU, and comparisons of what they leave."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import unittest.mock
import uuid
from collections import Counter
from pathlib import Path
from subprocess import PIPE
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    modeling_flash_attention_utils,
)

import dualoptim
from dualoptim import UnlearnArgs
from dualoptim.data.prompts import Example
from dualoptim.models.checkpoint import list_checkpoints, read_log

ROOT = Path(__file__).resolve().parents[1]
WORKERS = ROOT / "tests" / "runs" / "workers"

STRATEGIES = {
    "one process": ("cpu", 1),
    "DDP": ("ddp", 2),
    "ZeRO-2": ("zero2", 2),
    "ZeRO-3": ("zero3", 2),
    "FSDP2": ("fsdp2", 2),
}
"""The shapes of launch that kills and signals are tried on: a file of accelerate_configs, and how many processes."""

# ------------------------------------------------------------------------------------------------- tiny models and texts

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 97}
GROUPED = SIZES | {"num_key_value_heads": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
}


class Bigram(torch.nn.Module):
    """logits = W[input_ids], with the calling convention of a transformers model."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(
        self,
        input_ids,
        position_ids=None,
        attention_mask=None,
        logits_to_keep=None,
        use_cache=False,
        output_hidden_states=False,
    ):
        return SimpleNamespace(logits=self.weight[input_ids][:, logits_to_keep], hidden_states=[self.weight[input_ids]] * 2)


def examples(count=8, seed=0):
    """Texts of unequal length, scored from somewhere within."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 23, (count,), generator=generator).tolist()
    return [
        Example(
            torch.randint(97, (length,), generator=generator).tolist(), int(torch.randint(1, length, (1,), generator=generator))
        )
        for length in lengths
    ]


def answers(shared, lengths, seed=0, alike=0):
    """Texts with `shared` tokens in common, and answers of these lengths, whose first `alike` tokens agree as well."""
    generator = torch.Generator().manual_seed(seed)
    question = torch.randint(97, (shared + alike,), generator=generator).tolist()
    return [Example([*question, n, *torch.randint(97, (n - 1,), generator=generator).tolist()], shared) for n in lengths]


def use_phase(optimizer, phase, lr):
    """What the engine does before a step: choose the phase and its rate."""
    if hasattr(optimizer, "use"):
        optimizer.use(phase, lr)
    else:
        for group in optimizer.param_groups:
            group["lr"] = lr


def plain_statistics(logits, labels, column):
    """What `method.kernels.Statistics` computes, by torch's own operations."""
    logits = logits[column]
    logsumexp = logits.logsumexp(-1)
    log_prob = logits.gather(-1, labels[:, None])[:, 0] - logsumexp
    return log_prob, logsumexp, logits.mean(-1), logits.argmax(-1) == labels


def plain_targets(logits, targets, divergence):
    """What `method.kernels.AgainstTargets` computes, by torch's own operations."""
    q = targets(slice(None)).softmax(-1)
    cross_entropy = torch.nn.functional.cross_entropy(logits, q, reduction="none")
    return cross_entropy - torch.special.entr(q).sum(-1) if divergence else cross_entropy


def flash_stand_in(monkeypatch):
    """Have torch's attention stand in for flash-attention's kernels on a CPU; gives a list of the longest texts they are told.

    These are ints where the kernel has been told, and tensors where transformers has asked the device.
    """
    told = []

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        told.append(max_seqlen_q)
        text = torch.searchsorted(cu_seqlens_q[1:].contiguous(), torch.arange(len(q), dtype=torch.int32), right=True)
        mask = (text[:, None] == text) & torch.ones(len(q), len(q), dtype=torch.bool).tril()
        heads = [one.transpose(0, 1)[None] for one in (q, k, v)]
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*heads, attn_mask=mask, scale=softmax_scale, enable_gqa=True)[0].transpose(0, 1)

    def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        heads = [one.transpose(1, 2) for one in (q, k, v)]
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*heads, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func = dense, varlen
    package.flash_attn_with_kvcache = lambda q, k_cache, v_cache: None
    padding.pad_input = padding.unpad_input = None
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None, raising=False)
    return told


class Asked(TorchDispatchMode):
    """Counts operations, but for views and allocations, and what a host would wait for its device for: `waits`, by name.

    On a CPU nothing waits, so calls are counted that would: reading numbers, and results whose size depends on values.
    """

    _READ = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive")

    def __init__(self):
        super().__init__()
        self.operations, self.waits, self._patches = Counter(), Counter(), contextlib.ExitStack()

    def __enter__(self):
        for name in ("tolist", "cpu", "numpy"):
            self._patches.enter_context(unittest.mock.patch.object(torch.Tensor, name, self._counting(name)))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    def _counting(self, name):
        own = getattr(torch.Tensor, name)

        def read(tensor, *given, **named):
            self.waits[name] += 1
            return own(tensor, *given, **named)

        return read

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self._READ or masked:
            self.waits[name] += 1
        views = any(value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns)
        if not (views or name.startswith(("empty", "new_empty"))):
            self.operations[name] += 1
        return function(*args, **(kwargs or {}))


# --------------------------------------------------------------------------------------------------- runs and launches

RATE = 1e-3
FOLDER = Path(f"ME+GD_lr{RATE:g}") / "task1"


def arguments(model, output, optim, **changes):
    """A run of 24 steps, all at one rate, that writes its model and evaluates nothing."""
    common = {
        "model": str(model),
        "data": "demo",
        "learning_rates": (RATE,),
        "optim": optim,
        "forget_strength": None if optim == "adamw" or "forget_lr" in changes else 1.0,
        "retain_freq": 2,
        "gradient_accumulation_steps": 2,
        "batch_size": 4,
        "max_steps": 24,
        "eval": False,
        "output_dir": str(output),
    }
    return UnlearnArgs(**{**common, **changes})


def check_same(task, other):
    """Compare two folders of a task: steps, weights and what was measured."""
    steps = [[{**record, "seconds": 0} for record in read_log(one / "log.jsonl")] for one in (task, other)]
    assert steps[0] == steps[1]
    one, two = (state_of(folder / "model") for folder in (task, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    for part in ("eval_before", "eval"):
        for path in sorted((task / part).glob("*.json*")):
            assert path.read_bytes() == (other / part / path.name).read_bytes()


def environment(config):
    """The variables of a launch on the CPU."""
    changes = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    if config in ("ddp", "fsdp2"):  # the launcher wants GPUs for them otherwise
        changes["ACCELERATE_USE_CPU"] = "true"
    return {**os.environ, **changes}


def command(config, spec, processes=2, script="distributed_worker.py", precision="no"):
    """The line that runs one of the workers, which gets `spec` as JSON, under one of the shipped configurations."""
    line = ["accelerate", "launch", "--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml")]
    line += ["--num_processes", str(processes), "--mixed_precision", precision]
    return [*line, str(WORKERS / script), json.dumps(spec)]


def launch(config, spec, processes=2, timeout=600, **options):
    """Run it on the CPU, to its end."""
    with Started(command(config, spec, processes, **options), environment(config), stdout=PIPE, stderr=PIPE) as started:
        stdout, stderr = started.process.communicate(timeout=timeout)
    assert started.process.returncode == 0, stdout[-3000:] + stderr[-6000:]
    return subprocess.CompletedProcess(started.process.args, 0, stdout, stderr)


class Started:
    """A command that runs, with every process that it starts; all of them are killed when its block ends.

    They are found by a variable that children inherit. Their groups do not tell: launchers give workers sessions of their own,
    so that killing the launcher's group leaves the workers at work.
    """

    def __init__(self, line, variables, **options):
        mark = uuid.uuid4().hex
        self._variable = f"DUALOPTIM_TEST={mark}".encode()
        self.process = subprocess.Popen(line, env={**variables, "DUALOPTIM_TEST": mark}, text=True, **options)

    def alive(self):
        """The ids of all processes that it has started and that have not ended, the first one's before its children's."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has ended meanwhile, or is not ours
                if self._variable in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return sorted(found)

    def kill(self):
        """Kill all of them, and make sure that none is left; returns how many there were."""
        first, deadline = self.alive(), time.monotonic() + 30
        left = first
        while left:
            for one in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
            assert time.monotonic() < deadline, f"processes {left} do not die"
            time.sleep(0.01)
            left = self.alive()
        self.process.wait()
        return len(first)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


def stop_and_resume(args, tmp_path, stop):
    """The first `stop` steps, then the rest in another call."""
    first = dataclasses.replace(args, output_dir=str(tmp_path / "parts"), max_steps=stop)
    dualoptim.run(first)
    (tmp_path / "parts" / FOLDER / "trained.json").unlink()  # as if it had been interrupted there
    return dualoptim.run(dataclasses.replace(args, output_dir=str(tmp_path / "parts"), resume="newest"))


# ---------------------------------------------------------------------------------------------------------- comparisons


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a saved model, or of an adapter."""
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def difference(ours, reference):
    """The largest and the mean difference of two models' weights."""
    assert ours.keys() == reference.keys()
    gaps = [(ours[name].double() - reference[name].double()).abs() for name in reference]
    return max(float(gap.max()) for gap in gaps), float(torch.cat([gap.flatten() for gap in gaps]).mean())


def records(folder):
    """What the log of a run says of each step, but how long it took."""
    return [
        {name: value for name, value in one.items() if name != "seconds"} for one in read_log(folder / FOLDER / "log.jsonl")
    ]


def banks(folder):
    """Every tensor of the newest checkpoint, by file and name."""
    newest = list_checkpoints(folder / FOLDER / "checkpoint")[-1]
    return {f"{path.name}/{name}": value for path in newest.glob("*.safetensors") for name, value in load_file(path).items()}


def same_end(whole, resumed):
    """Make sure that two runs have the same weights, log and newest checkpoint, bit for bit."""
    first, second = state_of(whole / FOLDER / "model"), state_of(resumed / FOLDER / "model")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert records(whole) == records(resumed)
    one, two = banks(whole), banks(resumed)
    assert one.keys() == two.keys()
    assert sum("/weight@" not in name for name in one) > 3
    assert all(torch.equal(one[name], two[name]) for name in one)


def rows_of(folder, name, part="eval"):
    """The rows of one set that an evaluation has written."""
    return [json.loads(line) for line in (folder / part / f"{name}.jsonl").read_text().splitlines()]


def result_line(forget, unseen, rate=1e-4, **more):
    """A line of results.csv, as its file has it."""
    own = {"losses": "ME+GD", "optim": "dual-adamw", "learning_rate": f"{rate:g}", "forget_lr": f"{rate:g}", "seed": "1"}
    scores = {"forget_probability": str(forget), "retain_unseen_probability": str(unseen), "retain_probability": "0.95"}
    scores |= {"before_retain_unseen_probability": "1.0", "before_retain_probability": "1.0"}
    own |= more
    return own | {"task": "1", "folder": f"x/{sorted(own.items())}/task1"} | scores | more
