"""Runs with optimizer states in 8 bits: as close to those in 32 as said, and exact where they go on."""

import dataclasses

import pytest
import torch
from support import FOLDER, arguments, state_of, stop_and_resume

from dualoptim import run

BAND = 0.05


@pytest.mark.parametrize("optim", ["dual-adamw", "adamw-alternate", "adamw"])
def test_8_bit_stays_within_a_band_of_32_over_60_steps(small_args, tmp_path, optim):
    """The band: at every step |loss8 - loss32| <= 0.05 (1 + loss32)."""
    losses = {}
    for bits in (32, 8):
        args = dataclasses.replace(
            small_args, optim=optim, optim_bits=bits, max_steps=60, num_epochs=20, output_dir=str(tmp_path / str(bits))
        )
        losses[bits] = [record["loss"] for record in run(args).tasks[0].log]
    assert len(losses[8]) == 60
    assert losses[8] != losses[32]
    for ours, reference in zip(losses[8], losses[32], strict=True):
        assert abs(ours - reference) <= BAND * (1 + reference)


def test_8_bit_resume_is_exact(tiny, tmp_path):
    for optim in ("dual-adamw", "dual-adamw-plus", "adamw"):
        place = tmp_path / optim
        args = arguments(tiny, place / "whole", optim, optim_bits=8, save_every=3, max_steps=9)
        run(args)
        stop_and_resume(args, place, 4)
        first, second = state_of(place / "whole" / FOLDER / "model"), state_of(place / "parts" / FOLDER / "model")
        assert all(torch.equal(first[name], second[name]) for name in first), optim
