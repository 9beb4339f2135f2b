"""What tests on a GPU share: a device, which is a CPU in plain runs, and a reason where there is no GPU."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from speed.gpu import Bench


def pytest_runtest_setup(item):
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for marker, needed in (("gpu", 1), ("multigpu", 2)):
        if item.get_closest_marker(marker) and gpus < needed:
            pytest.skip(f"needs {needed} GPU{'s' * (needed > 1)} that PyTorch sees, and there are {gpus}")


@pytest.fixture
def bench(tiny, tmp_path) -> Bench:
    """Launches on the GPU of the tiny model."""
    (tmp_path / "small").symlink_to(tiny)
    (tmp_path / "runs").mkdir()
    return Bench(tmp_path, "cuda", "demo")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """A CPU, or with `-m gpu` the first GPU."""
    return torch.device(request.param)


@pytest.fixture
def on(device, monkeypatch):
    """Start an accelerator on the device, in float32 or in bf16."""

    def start(precision: str = "no") -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        return Accelerator(cpu=device.type == "cpu")

    yield start
    AcceleratorState._reset_state(reset_partial_state=True)
