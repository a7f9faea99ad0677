import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfgen_ds import hashing
from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import TokenBatch, collate
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.methods.bash import Bash
from selfgen_ds.methods.method import Policy
from tests.batches import runs
from tests.plans import plan

SEED = 5
BYTES = byte_tokenizer()
_ONES = BYTES.decode([0, 1, 2, 3])  # the text of all ids that random samples hold
_TWICE = re.escape(_ONES[3]) * 2


def _next(prefix: Sequence[int], uniform: float) -> int:
    """Return the token that the model below draws after a prefix. Any change of the prefix changes the token."""
    return (sum((i + 1) * token for i, token in enumerate(prefix)) + int(uniform * 3)) % 4


class PrefixPolicy(Policy):
    """Draws `_next` of each sample's prefix and the noise, and counts its calls."""

    draws = 0

    def draw(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        self.draws += 1
        drawn = []
        for batch, mask, noises in zip(batches, masks, uniforms, strict=True):
            tokens = []
            for (row, column), uniform in zip(mask.nonzero().tolist(), noises.tolist(), strict=True):
                first = column - int(batch.position_ids[row, column])
                tokens.append(_next(batch.context_ids[row, first:column].tolist(), uniform))
            drawn.append(torch.tensor(tokens, dtype=torch.int64))
        return drawn


class WritingPolicy(Policy):
    """Draws given texts, whatever the prefix: the ids of a whole sample by sample id."""

    def __init__(self, texts: dict[int, list[int]]) -> None:
        self.texts = texts

    def draw(self, batches: list[TokenBatch], masks: list[Tensor], uniforms: list[Tensor]) -> list[Tensor]:
        return [
            torch.tensor(
                [
                    self.texts[sample_id][position]
                    for sample_id, position in zip(
                        batch.sample_ids[mask].tolist(), batch.position_ids[mask].tolist(), strict=True
                    )
                ],
                dtype=torch.int64,
            )
            for batch, mask in zip(batches, masks, strict=True)
        ]


def _bash(*, rounds: int = 3, micro_batch_size: int = 3, seed: int = SEED, **config: Any) -> Bash:
    told = plan(seed=seed, total_steps=2 * rounds, micro_batch_size=micro_batch_size)
    return Bash(SelfgenConfig(method="bash", **config), told)


def _random_samples(seed: int, count: int = 9, first_id: int = 40) -> list[TrainingRow]:
    """Return samples of one to three turns, random lengths and ids below 4; no last token is replaceable."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        turns, end = [], 0
        for _ in range(rng.integers(1, 4)):
            start = end + int(rng.integers(1, 5))
            content_end = start + int(rng.integers(0, 12))
            end = content_end + int(rng.integers(1, 3))
            turns.append([start, content_end, end])
        ids = rng.integers(0, 4, end)
        samples.append(TrainingRow.reference(first_id + 3 * number, ids, np.array(turns)))
    return samples


def _share(position: str, place: int, length: int) -> float:
    return {"even": 1.0, "early": 1 - place / length, "late": (place + 1) / length}[position]


def _plain(
    sample: TrainingRow,
    number: int,
    p: float,
    passes: int | Literal["exact"],
    position: str = "even",
    most_differing: float = 1.0,
) -> tuple[list[int], list[bool]]:
    """Draw one sample token by token; return its context, and whether each token is drawn."""

    reference = sample.target_ids.tolist()
    keys = (SEED, number, torch.tensor(sample.sample_id), torch.arange(len(reference)))
    coins, noise = (hashing.uniform(stream, *keys).tolist() for stream in (hashing.ROUND_REPLACE, hashing.ROUND_DRAW))
    masked = {
        place
        for start, end in runs(sample.replaceable_mask)
        for place in range(start, end)
        if coins[place] < p * _share(position, place - start, end - start)
    }
    context = list(reference)
    for _ in range(1 if passes == "exact" else passes):
        before = list(context)
        for place in sorted(masked):
            prefix = (context if passes == "exact" else before)[:place]
            context[place] = _next(prefix, noise[place])
    allowed = int(most_differing * sample.loss_mask.sum() + 1e-9)
    differing = [place for place in range(len(reference)) if context[place] != reference[place]]
    stop = differing[allowed] if len(differing) > allowed else len(reference)
    return context[:stop] + reference[stop:], [place in masked and place < stop for place in range(len(reference))]


def _same(rows: list[TrainingRow], others: list[TrainingRow]) -> bool:
    names = ("context_ids", "target_ids", "loss_mask", "replaced_mask")
    return [row.sample_id for row in rows] == [row.sample_id for row in others] and all(
        np.array_equal(getattr(row, name), getattr(other, name))
        for row, other in zip(rows, others, strict=True)
        for name in names
    )


def _check(rows: list[TrainingRow], samples: list[TrainingRow]) -> None:
    """Check everything that must be true of rows, whatever was drawn."""
    assert [row.sample_id for row in rows] == [sample.sample_id for sample in samples]
    for row, sample in zip(rows, samples, strict=True):
        for name in ("target_ids", "loss_mask", "replaceable_mask"):
            assert getattr(row, name).tolist() == getattr(sample, name).tolist()
        assert row.context_ids.shape == row.replaced_mask.shape == row.target_ids.shape
        assert row.context_ids[~row.replaced_mask].tolist() == row.target_ids[~row.replaced_mask].tolist()
        assert not (row.replaced_mask & ~row.replaceable_mask).any()


@pytest.mark.parametrize(
    ("passes", "p", "position", "most_differing"),
    [
        (1, 0.4, "even", 1.0),
        (2, 0.4, "even", 0.29),
        ("exact", 0.4, "even", 0.0),
        (1, 1.0, "even", 0.29),
        (2, 1.0, "even", 0.0),
        ("exact", 1.0, "even", 1.0),
        (1, 0.8, "early", 0.0),
        (2, 0.8, "early", 1.0),
        ("exact", 0.8, "early", 0.29),
        ("exact", 0.8, "late", 0.29),
        (2, 0.8, "late", 1.0),
    ],
)
def test_every_row_is_what_token_after_token_gives(
    passes: int | Literal["exact"], p: float, position: Any, most_differing: float
) -> None:
    differing = 0
    for number in (0, 1):
        samples = _random_samples(number, 10)
        method = _bash(
            passes=passes, replace_probability=p, position=position, max_differing_share=most_differing, rounds=2
        )
        rows, _ = method.rows(samples, PrefixPolicy(), number)
        _check(rows, samples)
        for row, sample in zip(rows, samples, strict=True):
            context, drawn = _plain(sample, number, p, passes, position, most_differing)
            assert row.context_ids.tolist() == context
            assert row.replaced_mask.tolist() == drawn
            differing += int((row.context_ids != row.target_ids).sum())
    assert (differing > 0) == (most_differing > 0)


def test_the_default_is_the_sequential_process() -> None:
    samples = _random_samples(1)
    rows = [_bash(**config).rows(samples, PrefixPolicy(), 0)[0] for config in ({}, {"passes": "exact"}, {"passes": 1})]
    assert _same(rows[0], rows[1])
    assert not _same(rows[0], rows[2])


def test_rows_do_not_depend_on_chunks_micro_batches_or_order() -> None:
    samples = _random_samples(2, 20)
    expected, _ = _bash(micro_batch_size=1).rows(samples, PrefixPolicy(), 1)
    for size, chunk in ((3, 20), (7, 6), (20, 1)):
        method = _bash(micro_batch_size=size)
        rows = [row for i in range(0, 20, chunk) for row in method.rows(samples[i : i + chunk], PrefixPolicy(), 1)[0]]
        assert _same(rows, expected)
    order = np.random.default_rng(0).permutation(20).tolist()
    shuffled, _ = _bash().rows([samples[i] for i in order], PrefixPolicy(), 1)
    assert _same(shuffled, [expected[i] for i in order])


def test_another_round_or_seed_draws_other_rows_and_the_same_one_the_same() -> None:
    samples = _random_samples(3)
    drawn = [
        _bash(seed=seed, replace_probability=0.5).rows(samples, PrefixPolicy(), number)[0]
        for seed, number in ((5, 0), (5, 0), (5, 1), (6, 0))
    ]
    assert _same(drawn[0], drawn[1])
    assert not _same(drawn[0], drawn[2])
    assert not _same(drawn[0], drawn[3])


def test_p_grows_over_the_rounds_from_the_first_to_the_peak_in_the_last() -> None:
    method = _bash(rounds=4, schedule="linear", schedule_share=1.0, replace_probability=0.8, passes=1)
    assert method.rounds == 4
    of_steps = [method.replace_probability(step) for step in range(8)]
    assert of_steps == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8])
    samples = _random_samples(4, 100)
    for number, p in enumerate((0.2, 0.4, 0.6, 0.8)):
        rows, _ = method.rows(samples, PrefixPolicy(), number)
        replaceable = sum(int(sample.replaceable_mask.sum()) for sample in samples)
        assert sum(int(row.replaced_mask.sum()) for row in rows) == pytest.approx(p * replaceable, rel=0.15)


@pytest.mark.parametrize(
    ("schedule", "rounds"), [("constant", 2), ("linear", 1), ("linear", 5), ("exponential", 5), ("inverse_sigmoid", 2)]
)
def test_the_last_round_has_reached_the_peak(schedule: Any, rounds: int) -> None:
    method = _bash(rounds=rounds, schedule=schedule, replace_probability=0.6, schedule_share=1.0)
    p = [method.replace_probability(method.first_step(number)) for number in range(rounds)]
    assert p == sorted(p)
    assert p[0] > 0
    assert p[-1] == pytest.approx(0.6, rel=0.011)


def test_a_probability_of_0_is_teacher_forcing_without_a_draw() -> None:
    samples, policy = _random_samples(5), PrefixPolicy()
    rows, counts = _bash(replace_probability=0.0).rows(samples, policy, 0)
    assert _same(rows, samples)
    assert policy.draws == counts["passes"] == 0


def test_a_probability_of_1_draws_all_that_may_be_replaced() -> None:
    samples = _random_samples(6)
    rows, _ = _bash(replace_probability=1.0).rows(samples, PrefixPolicy(), 0)
    for row, sample in zip(rows, samples, strict=True):
        assert row.replaced_mask.tolist() == collate([[sample]]).replaceable_mask[0].tolist()


class InStep(PrefixPolicy):
    """Acts as one of two ranks, of which the other makes a given number of passes."""

    def __init__(self, others: int) -> None:
        self.others = others

    def max_over_ranks(self, value: int) -> int:
        return max(value, int(self.draws < self.others))


def test_a_rank_without_samples_makes_the_draws_of_the_others() -> None:
    policy = InStep(5)
    assert _bash().rows([], policy, 0)[0] == []
    assert policy.draws == 5


def test_passes_are_counted() -> None:
    samples = _random_samples(7, 30)
    for passes, expected in ((1, 1), (2, 2)):
        policy = PrefixPolicy()
        assert _bash(passes=passes).rows(samples, policy, 0)[1]["passes"] == policy.draws == expected
    policy = PrefixPolicy()
    assert _bash().rows(samples, policy, 0)[1]["passes"] == policy.draws > 2


# --- rejected draws ---


def _text(row: TrainingRow) -> str:
    return BYTES.decode(row.context_ids)


def _written(
    reference: list[str], drawn: list[str], reject: list[str] | str | None, sample_id: int = 0
) -> tuple[str, dict[str, int]]:
    """Return the context and the counts for a model that draws given answers; each turn stands between `<` and `>`."""
    ids: list[int] = []
    written: list[int] = []
    turns = []
    opening, closing = BYTES("<>")["input_ids"]
    for right, own in zip(reference, drawn, strict=True):
        content, others = BYTES(right)["input_ids"], BYTES(own)["input_ids"]
        assert len(content) == len(others)
        start = len(ids) + 1
        ids += [opening, *content, closing]
        written += [opening, *others, closing]
        turns.append([start, start + len(content), len(ids)])
    sample = TrainingRow.reference(sample_id, np.array(ids), np.array(turns))
    method = _bash(replace_probability=1.0, reject=reject)
    (row,), counts = method.rows([sample], WritingPolicy({sample_id: written}), 0)
    _check([row], [sample])
    return _text(row), counts


def test_the_reference_is_back_from_the_first_rejected_token_on() -> None:
    text, counts = _written(["good day, sir"], ["gaad bad, sor"], ["bad"])
    assert text == "<gaad day, sir>"
    assert counts == {"rejected_tokens": 8, "rejected_rows": 1, "passes": 2}


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ("a bad way", "a bad way"),  # the reference matches too
        ("x bad day", "x bad day"),
        ("a bid day", "a bid day"),
        ("a bad bad", "a bad day"),  # the second match alone is drawn
        ("bad a bad", "a bad day"),
    ],
)
def test_what_the_reference_itself_says_is_not_rejected(drawn: str, expected: str) -> None:
    assert _written(["a bad day"], [drawn], ["bad"])[0] == f"<{expected}>"


def test_of_a_match_the_tokens_of_the_reference_stay() -> None:
    text, counts = _written(["is the bed ok"], ["as the bad oh"], ["bad"])
    assert text == "<as the bed ok>"
    assert counts["rejected_rows"] == 1


def test_nothing_is_rejected_without_a_match() -> None:
    text, counts = _written(["good day"], ["goad dry"], ["bad"])
    assert text == "<goad dry>"
    assert (counts["rejected_tokens"], counts["rejected_rows"]) == (0, 0)


def test_a_match_that_the_reference_completes_is_rejected_too() -> None:
    # after `zz` is taken back, the reference completes `ab c` with the tokens drawn before
    assert _written(["xx cd"], ["ab zz"], ["zz", "ab c"])[0] == "<xx cd>"
    assert _written(["xx cd"], ["ab zz"], ["zz"])[0] == "<ab cd>"


def test_a_function_rejects_like_an_expression() -> None:
    assert _written(["good day"], ["goad DAY"], "tests.unit.test_reject:capitals")[0] == "<goad day>"


@pytest.mark.parametrize(("right", "own"), [("né", "nè"), ("x😀", "x😁"), ("日本", "日木")])
def test_a_character_of_several_tokens_is_rejected_by_any_of_them(right: str, own: str) -> None:
    # reference and drawn character differ in their last byte only
    assert _written([f"{right} ok"], [f"{own} oh"], [own[-1]])[0] == f"<{right} ok>"
    assert _written([f"{right} ok"], [f"{own} oh"], ["oh"])[0] == f"<{own} ok>"


def test_the_draws_of_earlier_turns_stay_and_those_of_later_turns_go() -> None:
    right, own = ["one", "two", "six"], ["ore", "tao", "sex"]
    assert _written(right, own, ["tao"])[0] == "<ore><two><six>"
    assert _written(right, own, ["sex"])[0] == "<ore><tao><six>"
    assert _written(right, own, ["ore"])[0] == "<one><two><six>"


@pytest.mark.parametrize("pattern", ["(?s)r.*a", "e.+t", "[<>]", "e\\Wt"])
def test_no_match_reaches_from_one_turn_into_another_or_past_the_answer(pattern: str) -> None:
    assert _written(["one", "two"], ["ore", "tao"], [pattern])[0] == "<ore><tao>"


def test_an_expression_may_name_the_start_and_the_end_of_an_answer() -> None:
    right, own = ["one", "two"], ["ore", "twe"]
    assert _written(right, own, ["re$"])[0] == "<one><two>"
    assert _written(right, own, ["^twe$"])[0] == "<ore><two>"
    assert _written(right, own, ["^re"])[0] == "<ore><twe>"


def test_one_samples_rejection_leaves_the_others_alone() -> None:
    samples = _random_samples(8, 12)
    rejecting = _bash(replace_probability=1.0, reject=[_TWICE], micro_batch_size=12)
    expected, _ = _bash(replace_probability=1.0).rows(samples, PrefixPolicy(), 0)
    rows, counts = rejecting.rows(samples, PrefixPolicy(), 0)
    changed = [not _same([row], [other]) for row, other in zip(rows, expected, strict=True)]
    assert 1 < sum(changed) == counts["rejected_rows"] < 12
    alone = [rejecting.rows([sample], PrefixPolicy(), 0)[0][0] for sample in samples]
    assert _same(rows, alone)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    p=st.floats(0, 1),
    passes=st.sampled_from([1, 2, "exact"]),
    position=st.sampled_from(["even", "early", "late"]),
    most_differing=st.floats(0, 1),
    reject=st.sampled_from([None, [_TWICE], [f"{_ONES[1]}[^{_ONES[2]}]", f"{_ONES[0]}$"]]),
    number=st.integers(0, 2),
    micro_batch_size=st.integers(1, 9),
)
def test_whatever_is_drawn_the_targets_are_the_reference_and_so_is_every_token_that_was_not_drawn(
    seed: int, number: int, p: float, most_differing: float, **config: Any
) -> None:
    samples = _random_samples(seed, 6)
    method = _bash(replace_probability=p, max_differing_share=most_differing, **config)
    rows, counts = method.rows(samples, PrefixPolicy(), number)
    _check(rows, samples)
    for row, sample in zip(rows, samples, strict=True):
        batch, plain = collate([[row]]), collate([[sample]])
        assert torch.equal(batch.loss_mask, plain.loss_mask)
        assert torch.equal(batch.target_ids, plain.target_ids)
        response = int(row.loss_mask.sum())
        assert (row.context_ids != row.target_ids).sum() <= most_differing * response + 1e-6
    assert counts["rejected_rows"] <= counts["rejected_tokens"] <= sum(len(sample) for sample in samples)
