"""Everything that computes does so on the device that it is given, and finds there what a CPU finds."""

from dataclasses import fields

import pytest
import torch
from support import answers, examples, plain_statistics, plain_targets, use_phase

from dualoptim import UnlearnArgs
from dualoptim.config.optimizers import kind_of
from dualoptim.data.batches import pack, pad
from dualoptim.evaluation.membership import gradient_norms
from dualoptim.method import kernels
from dualoptim.method.groups import decay_groups
from dualoptim.method.objectives import FORGET, RETAIN
from dualoptim.method.scores import Batch, score
from dualoptim.models.limits import keeps_apart
from dualoptim.models.load import load_model
from dualoptim.models.loaded import Layout
from dualoptim.models.reference import Frozen
from dualoptim.models.rounding import row_by_row

KINDS = {
    "dual-adamw": {},
    "dual-adamw-plus": {"optim": "dual-adamw-plus", "max_update": 1.0},
    "8 bits": {"optim_bits": 8},
}


def test_every_tensor_of_a_batch_is_there(device):
    for batch in (pack(examples()), pad(examples()), pack(answers(5, (3, 4), alike=2), share=True)):
        tensors = {one.name: getattr(batch, one.name) for one in fields(Batch)}
        assert sum(torch.is_tensor(value) for value in tensors.values()) > 6
        for name, value in vars(batch.to(device)).items():
            assert not torch.is_tensor(value) or value.device.type == device.type, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_and_targets_are_autograds(device, dtype):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 1111, generator=draw).to(device, dtype)
    column = torch.tensor([*range(300), 3, 268, 3], device=device)  # some rows predict several labels
    labels = torch.randint(1111, (303,), generator=draw).to(device)
    rows = torch.randn(300, 1111, generator=draw).to(device).__getitem__
    tolerances = {"atol": 1e-5, "rtol": 1e-2 if dtype == torch.bfloat16 else 1e-4}

    def gradient(values, z):
        return torch.autograd.grad(sum(value.sum() for value in values if value.requires_grad), z)[0]

    pairs = [
        (lambda z: kernels.Statistics.apply(z, labels, column), lambda z: plain_statistics(z, labels, column)),
        (lambda z: [kernels.AgainstTargets.apply(z, rows, True)], lambda z: [plain_targets(z, rows, True)]),
    ]
    for ours, plain in pairs:
        z = logits.clone().requires_grad_()
        for one, other in zip(ours(z), plain(z.float()), strict=True):
            assert torch.allclose(one.float(), other.float(), **tolerances)
        assert torch.allclose(gradient(ours(z), z).float(), gradient(plain(z.float()), z).float(), **tolerances)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_a_cpu(device, kind):
    """In bytes a value may take its neighbour's code where kernels round otherwise."""
    args, found = UnlearnArgs(**KINDS[kind]), []
    for place in (torch.device("cpu"), device):
        draw = torch.Generator().manual_seed(0)
        model = torch.nn.Linear(256, 128, bias=False, device=place)
        model.weight.data.copy_(torch.randn(128, 256, generator=draw))
        optimizer = kind_of(args).build(args)(decay_groups(model, args.weight_decay, args.state_bits, False))
        for step in range(12):
            use_phase(optimizer, "forget" if step % 3 == 0 else "retain", 1e-3)
            model.weight.grad = torch.randn(128, 256, generator=draw).to(place)
            optimizer.step()
        found.append(model.weight.detach().cpu())
    gaps = (found[1] - found[0]).abs()
    assert gaps.mean() < (1e-5 if kind == "8 bits" else 5e-7)  # weights of about 1, whose neighbours are 1e-7 apart
    assert gaps.max() < (2e-3 if kind == "8 bits" else 1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", pytest.param("flash_attention_2", marks=pytest.mark.gpu)])
def test_packed_texts_are_kept_apart_and_a_model_that_mixes_them_is_seen(device, on, kernel, tiny, monkeypatch):
    if kernel == "flash_attention_2":
        pytest.importorskip("flash_attn")
        if device.type == "cpu":
            pytest.skip("a CPU has no flash-attention")
    loaded = load_model(UnlearnArgs(model=str(tiny), attn_implementation=kernel), on("bf16"), "measure")
    assert loaded.layout.packed
    assert loaded.layout.shares == (kernel == "sdpa")
    forward = loaded.model.forward
    monkeypatch.setattr(
        loaded.model, "forward", lambda *given, **named: forward(*given, **named | {"position_ids": None}), raising=False
    )
    with torch.no_grad():
        assert not keeps_apart(loaded.model, 128, 60)


def test_packed_padded_and_shared_texts_have_the_same_scores(on, tiny):
    loaded = load_model(UnlearnArgs(model=str(tiny)), on())
    texts = answers(9, (3, 7, 5), alike=2) + answers(4, (6,), seed=1)
    layouts = [Layout(loaded.device, packed=True, shares=True), Layout(loaded.device, True), Layout(loaded.device, False)]
    with torch.no_grad():
        found = [score(loaded.model, layout(texts)).log_prob for layout in layouts]
    assert found[0].device.type == loaded.device.type
    for other in found[1:]:
        assert torch.allclose(found[0], other, atol=2e-5)


def test_the_reference_is_read_onto_the_device(on, tiny, tmp_path):
    loaded = load_model(UnlearnArgs(model=str(tiny)), on())
    objectives = [FORGET["NPO"], RETAIN["KL"]]
    frozen = Frozen(loaded, tmp_path / "reference", objectives, 4)
    texts = [example for example in examples() if len(example.ids) > 4]
    for objective in objectives:
        frozen.score(loaded, objective, texts)
    log_prob = frozen.reader(objectives[0])(texts, loaded.device).log_prob
    logits = frozen.reader(objectives[1])(texts, loaded.device).logits(slice(None))
    batch = loaded.batch(texts)
    with torch.no_grad():
        scores = score(loaded.model, batch)
    assert log_prob.device.type == logits.device.type == loaded.device.type
    assert torch.allclose(log_prob, scores.log_prob, atol=1e-4)
    assert torch.allclose(logits.log_softmax(-1).gather(-1, batch.labels[:, None])[:, 0], scores.log_prob, atol=1e-4)


def test_gradient_norms_do_not_depend_on_a_pass_before(on, tiny):
    """Under autocast, whose cache would hand on weights that were cast without gradients."""
    loaded, norms = load_model(UnlearnArgs(model=str(tiny)), on("bf16")), []
    for before in (False, True):
        with loaded.autocast():
            if before:
                with torch.no_grad():
                    score(loaded.model, loaded.batch(examples()))
            norms.append([float(norm) for norm in gradient_norms(loaded, examples()[:2])])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert min(norms[0]) > 0


@pytest.mark.gpu
def test_in_eight_bits_a_text_stands_by_itself_while_a_model_is_asked():
    """Beside a text with a large value LLM.int8() computes others otherwise, so that a model would seem to mix them up."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=6.0)
    model = torch.nn.Sequential(layer).to("cuda")
    text, other = torch.randn(2, 64, device="cuda", dtype=torch.float16).split(1)
    other[0, 3] = 50

    def apart() -> float:
        with torch.no_grad():
            return float((model(torch.cat([text, other]))[:1] - model(text)).abs().max())

    together = apart()
    with row_by_row(model):
        assert apart() < together
