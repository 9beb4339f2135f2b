"""Moments in bytes: bit for bit what bitsandbytes itself stores."""

import pytest
import torch

from dualoptim.method.blocks import BLOCK, CELLS, _nearest, read, write

functional = pytest.importorskip("bitsandbytes.functional")


def on_edges(signed):
    """Values just below, at and just above the borders between cells of different bytes, 255 to a block that reaches to 1."""
    border = (_nearest(signed).int().diff() != 0).nonzero()[:, 0] + 0.5
    bits = (border.double() / (CELLS - 1) * 2 - 1).float().view(torch.int32)
    values = torch.cat([(bits + ulps).view(torch.float32) for ulps in range(-100, 101)])
    values = values[: len(values) // 255 * 255].view(-1, 255).nan_to_num().clamp(-1, 1)
    return torch.cat([torch.ones(len(values), 1), values], 1)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("factor", [1.0, 0.7, 1.3e-7, 1e30, 3e-40])
def test_bytes_are_those_of_bitsandbytes(signed, factor):
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(2000, BLOCK, generator=generator) * torch.randn(2000, BLOCK, generator=generator).mul_(4).exp_()
    for values in (on_edges(signed), spread, torch.zeros(3, BLOCK), spread.view(-1)[: 5 * BLOCK + 7], spread[0, :9]):
        moment = (values if signed else values.abs()).reshape(-1) * factor
        code = functional.create_dynamic_map(signed=signed)
        expected, state = functional.quantize_blockwise(moment, code=code, blocksize=BLOCK)
        found, scale = torch.full_like(expected, 77), torch.full_like(state.absmax, -1.0)
        write(moment, found, scale, signed)
        assert torch.equal(found, expected)
        assert torch.equal(scale, state.absmax)
        again = functional.dequantize_blockwise(expected, absmax=state.absmax, code=code, blocksize=BLOCK)
        assert torch.equal(read(found, scale, signed), again)


def test_what_is_infinite_stops_nothing():
    moment = torch.ones(2 * BLOCK).index_fill_(0, torch.tensor(3), torch.inf)
    found, scale = torch.empty(2 * BLOCK, dtype=torch.uint8), torch.empty(2)
    write(moment, found, scale)
    assert scale.tolist() == [torch.inf, 1.0]
    assert torch.equal(read(found, scale)[BLOCK:], moment[BLOCK:])
