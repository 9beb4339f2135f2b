"""Draw the noise of sampled answers on the device that computes their logits, the same on each and in any batch.

A number is a hash of its place: of the answer's seed, the token's position in it, and its id in the vocabulary. So there is no
generator whose state depends on what was drawn before, and nothing is copied from the host.
"""

import hashlib

import torch
from torch import Tensor

_LONG_ROUNDS = ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1))  # shifts and factors


def seed_of(*parts: object) -> int:
    """Make a number in int64 of anything that is written alike everywhere."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big", signed=True)


def mixed(values: Tensor) -> Tensor:
    """Hash numbers in int64, whose products wrap around, one by one: splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    for shift, factor in _LONG_ROUNDS:
        values = (values ^ (values >> shift & 2 ** (64 - shift) - 1)) * factor
    return values


def gumbel(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Draw Gumbel noise [B, V] in float64 for tokens at `positions` ([B], or one) of answers with `seeds` [B], on their device.

    Ids are hashed in 32 bits, which processors do fastest (the constants are Chris Wellons' lowbias32), with both halves of a
    hash in 64 bits of seed and position.
    """
    one, other = mixed(mixed(seeds) + positions).view(torch.int32).view(-1, 2, 1).unbind(1)
    values = torch.arange(vocabulary, dtype=torch.int32, device=seeds.device) ^ one
    values.bitwise_xor_((values >> 16).bitwise_and_(2**16 - 1)).mul_(0x7FEB352D).add_(other)
    values.bitwise_xor_((values >> 15).bitwise_and_(2**17 - 1)).mul_(0x846CA68B - 2**32)
    values.bitwise_xor_((values >> 16).bitwise_and_(2**16 - 1))
    uniform = values.double().add_(2**31 + 0.5).mul_(2.0**-32)  # neither 0 nor 1
    return uniform.log_().neg_().log_().neg_()
