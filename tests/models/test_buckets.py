"""What ZeRO-3 holds beside its shares: by the model where it is small, and DeepSpeed's own sizes where it is large."""

from types import SimpleNamespace

import pytest
import torch

from dualoptim.models.buckets import LEAST, settled, sized
from dualoptim.models.memory import Division


@pytest.mark.parametrize(
    ("total", "processes", "expected"),
    [
        (10**6, 2, (LEAST, LEAST, LEAST)),
        (400 * 10**6, 2, (50 * 10**6, 100 * 10**6, 25 * 10**6)),
        (7 * 10**9, 8, (500 * 10**6, 10**9, 7 * 10**9 // 64)),
        (70 * 10**9, 8, (500 * 10**6, 10**9, 10**9)),
    ],
)
def test_sizes_follow_the_model_up_to_deepspeeds_own(total, processes, expected):
    found = settled(Division(processes, deepspeed=True, stage=3), total, total)
    assert (found.bucket, found.live, found.sub_group) == expected


def test_what_the_launch_gives_stays_and_other_stages_have_deepspeeds_own():
    given = Division(2, deepspeed=True, stage=3, bucket=5, live=6, sub_group=7)
    assert settled(given, 10**9, 10**9) == given
    second = settled(Division(2, deepspeed=True, stage=2), 10**6, 10**6)
    assert (second.bucket, second.live) == (500_000_000, 1_000_000_000)


def test_deepspeed_is_told_while_a_model_is_prepared_and_the_next_one_has_its_own():
    zero = {"stage": 3, "sub_group_size": 12}
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=2)
    with torch.device("meta"):
        model = torch.nn.Linear(20_000, 20_000, bias=False)
    with sized(accelerator, model):
        assert zero == {
            "stage": 3,
            "sub_group_size": 12,
            "reduce_bucket_size": 50_000_000,
            "stage3_max_live_parameters": 100_000_000,
            "stage3_max_reuse_distance": 100_000_000,
        }
    assert zero == {"stage": 3, "sub_group_size": 12}
    with pytest.raises(RuntimeError, match="out of memory"), sized(accelerator, model):
        raise RuntimeError("out of memory")
    assert zero == {"stage": 3, "sub_group_size": 12}
    zero["stage"] = 2
    with sized(accelerator, model):
        assert zero == {"stage": 2, "sub_group_size": 12}
