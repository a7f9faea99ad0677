import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from selfgen_ds import hashing

N = 1_000_000
_WORD = 2**64


def _mix(bits: int) -> int:
    """Compute the finalizer of splitmix64 with Python integers."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % _WORD
    return bits ^ (bits >> 31)


def _unmix(bits: int) -> int:
    """Invert the hash, to find the key that has a given hash."""

    def unshift(shifted: int, count: int) -> int:
        return shifted ^ (shifted >> count) ^ (shifted >> 2 * count)

    bits = unshift(bits, 31) * pow(0x94D049BB133111EB, -1, _WORD) % _WORD
    bits = unshift(bits, 27) * pow(0xBF58476D1CE4E5B9, -1, _WORD) % _WORD
    return unshift(bits, 30)


def _reference(stream: int, *keys: int) -> Fraction:
    golden, state = 0x9E3779B97F4A7C15, stream
    for key in keys:
        state = _mix((state + golden) % _WORD ^ _mix((key + golden) % _WORD))
    return (Fraction(state >> 12) + Fraction(1, 2)) / 2**52


def _is_uniform(values: Tensor, bins: int = 1000) -> bool:
    """Return whether chi-square of a histogram is within 5 standard deviations of its mean."""
    counts = torch.histc(values, bins, 0.0, 1.0)
    expected = len(values) / bins
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return abs(chi_square - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))


def _correlation(a: Tensor, b: Tensor) -> float:
    """Return the correlation, in units of its standard deviation for independent values."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1]) * math.sqrt(len(a))


def test_the_reference_mixer_is_splitmix64() -> None:
    # the first outputs of splitmix64 seeded with 0, as published with xoshiro
    assert _mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    assert _mix(2 * 0x9E3779B97F4A7C15 % _WORD) == 0x6E789E6AA1B965F4


@pytest.mark.parametrize(
    "keys",
    [
        (hashing.REPLACE, 0),
        (hashing.REPLACE, 0, 0, 0, 0),
        (hashing.DRAW, 1234, 17, 7472, 1023),
        (hashing.DRAW, 2**63 - 1, 10**9, -1, 0),
    ],
)
def test_noise_is_the_hash_of_its_keys(keys: tuple[int, ...]) -> None:
    assert Fraction(float(hashing.uniform(*keys))) == _reference(*keys)


def test_noise_of_a_tensor_of_keys_is_the_hash_of_each() -> None:
    drawn = hashing.uniform(hashing.DRAW, 3, torch.tensor([[5], [6]]), torch.tensor([0, 1, 2]))
    expected = [[_reference(hashing.DRAW, 3, sample, position) for position in range(3)] for sample in (5, 6)]
    assert [[Fraction(value) for value in row] for row in drawn.tolist()] == expected


def test_noise_is_float64() -> None:
    assert hashing.uniform(hashing.DRAW, torch.arange(3)).dtype == torch.float64


@pytest.mark.parametrize(("state", "expected"), [(0, 2.0**-53), (_WORD - 1, 1 - 2.0**-53)])
def test_noise_of_the_most_extreme_hashes_is_strictly_between_0_and_1(state: int, expected: float) -> None:
    golden = 0x9E3779B97F4A7C15
    key = (_unmix(_unmix(state) ^ (hashing.DRAW + golden)) - golden) % _WORD
    assert float(hashing.uniform(hashing.DRAW, key - _WORD if key >= _WORD // 2 else key)) == expected


def test_noise_is_strictly_between_0_and_1() -> None:
    drawn = hashing.uniform(hashing.DRAW, 0, torch.arange(N))
    assert 0.0 < float(drawn.min()) < 2e-5
    assert 1.0 - 2e-5 < float(drawn.max()) < 1.0


def test_equal_keys_give_equal_noise_whatever_the_shape() -> None:
    samples, positions = torch.arange(40), torch.arange(50)
    grid = hashing.uniform(hashing.DRAW, 1, 2, samples[:, None], positions[None, :])
    flat = hashing.uniform(
        hashing.DRAW,
        torch.full((2000,), 1),
        2,
        samples.repeat_interleave(50),
        positions.repeat(40),
    )
    assert torch.equal(grid.flatten(), flat)


def test_equal_keys_give_equal_noise_in_any_order() -> None:
    order = torch.arange(1000).flip(0)
    assert torch.equal(
        hashing.uniform(hashing.DRAW, 1, order), hashing.uniform(hashing.DRAW, 1, torch.arange(1000)).flip(0)
    )


def test_equal_keys_give_equal_noise_one_by_one() -> None:
    together = hashing.uniform(hashing.DRAW, 1, torch.arange(20))
    assert together.tolist() == [float(hashing.uniform(hashing.DRAW, 1, key)) for key in range(20)]


@pytest.mark.parametrize("changed", range(5))
def test_noise_differs_where_any_one_key_differs(changed: int) -> None:
    keys: list[int | Tensor] = [hashing.DRAW, 11, 12, 13, 14]
    count = 1000 if changed else 100  # every stream is a call of its own
    keys[changed] = keys[changed] + torch.arange(count)
    stream, *others = keys
    if isinstance(stream, Tensor):
        drawn = torch.stack([hashing.uniform(int(s), *others) for s in stream])
    else:
        drawn = hashing.uniform(stream, *others)
    assert len(drawn.unique()) == count


def test_keys_are_not_interchangeable() -> None:
    assert float(hashing.uniform(hashing.DRAW, 1, 2)) != float(hashing.uniform(hashing.DRAW, 2, 1))


@pytest.mark.parametrize("key", ["seed", "step", "sample", "position"])
def test_noise_is_uniform_along_each_key(key: str) -> None:
    keys: dict[str, int | Tensor] = {"seed": 0, "step": 100, "sample": 5, "position": 30}
    keys[key] = torch.arange(N)
    assert _is_uniform(hashing.uniform(hashing.DRAW, *keys.values()))


def test_mean_and_variance_are_those_of_a_uniform() -> None:
    drawn = hashing.uniform(hashing.REPLACE, 0, 0, torch.arange(1000)[:, None], torch.arange(1000))
    assert float(drawn.mean()) == pytest.approx(1 / 2, abs=5 / math.sqrt(12 * N))
    assert float(drawn.var()) == pytest.approx(1 / 12, abs=5 / math.sqrt(180 * N))


def test_neighboring_positions_are_uncorrelated() -> None:
    drawn = hashing.uniform(hashing.DRAW, 0, 0, 7, torch.arange(N))
    assert abs(_correlation(drawn[:-1], drawn[1:])) < 5


def test_neighboring_samples_are_uncorrelated() -> None:
    drawn = hashing.uniform(hashing.DRAW, 0, 0, torch.arange(N), 7)
    assert abs(_correlation(drawn[:-1], drawn[1:])) < 5


def test_neighboring_steps_are_uncorrelated() -> None:
    drawn = hashing.uniform(hashing.DRAW, 0, torch.arange(N), 7, 7)
    assert abs(_correlation(drawn[:-1], drawn[1:])) < 5


def test_the_next_sample_is_not_this_one_moved_by_a_position() -> None:
    drawn = hashing.uniform(hashing.DRAW, 0, 0, torch.arange(1000)[:, None], torch.arange(1000))
    assert abs(_correlation(drawn[1:, :-1].flatten(), drawn[:-1, 1:].flatten())) < 5


def test_the_mask_and_the_draws_have_independent_noise() -> None:
    keys = (0, 0, torch.arange(N), 3)
    assert abs(_correlation(hashing.uniform(hashing.REPLACE, *keys), hashing.uniform(hashing.DRAW, *keys))) < 5


def test_neighboring_values_fill_the_square_evenly() -> None:
    drawn = hashing.uniform(hashing.DRAW, 0, 0, 7, torch.arange(2 * N)).reshape(N, 2)
    cells = (drawn * 32).floor()
    assert _is_uniform((cells[:, 0] * 32 + cells[:, 1] + 0.5) / 1024, bins=1024)


def test_every_stream_has_a_key_of_its_own_that_stays() -> None:
    # With other numbers, a resumed run would draw other contexts.
    assert [hashing.REPLACE, hashing.DRAW, hashing.ROUND_REPLACE, hashing.ROUND_DRAW] == [1, 2, 3, 4]
    assert [hashing.ANSWER, hashing.SFT_SHARE] == [5, 6]
