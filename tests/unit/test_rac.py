import logging
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from selfgen_ds import hashing
from selfgen_ds.chat.conversation import Conversation
from selfgen_ds.chat.encoder import ChatEncoder
from selfgen_ds.config import SelfgenConfig
from selfgen_ds.data.batches import collate
from selfgen_ds.data.correction import TURN_CUE, correction
from selfgen_ds.data.encoding import Format
from selfgen_ds.data.row import TrainingRow
from selfgen_ds.data.row_checks import TextPair
from selfgen_ds.data.rows import Opened
from selfgen_ds.data.samples import Samples, load_samples, with_consecutive_ids
from selfgen_ds.data.tokenizer import byte_tokenizer
from selfgen_ds.errors import InputError
from selfgen_ds.methods.method import AnswerNoise, Policy
from selfgen_ds.methods.rac import Rac
from tests.batches import runs, samples_in
from tests.chat_tokenizers import EVERY_FAMILY, tokenizer
from tests.plans import plan

SEED = 5
BYTES = byte_tokenizer()
END = BYTES.eos_token_id
QUESTION, WRONG, RIGHT = "How many apples are left?", "There are four", "There are three"


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with samples_in(tmp_path_factory.mktemp("cache")):
        yield


class SayingPolicy(Policy):
    """Answers with given lists of ids in turn, whatever the prompt, and keeps the prompts."""

    def __init__(self, *answers: list[int]) -> None:
        self.answers = answers
        self.prompts: list[list[int]] = []
        self.asked_for: list[int] = []

    def complete(
        self, prompts: list[list[int]], max_new_tokens: int, noise: AnswerNoise | None = None
    ) -> list[list[int]]:
        assert noise is not None
        self.prompts += prompts
        self.asked_for.append(max_new_tokens)
        return [self.answers[i % len(self.answers)][:max_new_tokens] for i in range(len(prompts))]


class NoisePolicy(Policy):
    """Answers with letters that noise and prompt choose, and ends when the noise says so."""

    def complete(
        self, prompts: list[list[int]], max_new_tokens: int, noise: AnswerNoise | None = None
    ) -> list[list[int]]:
        assert noise is not None
        answers: list[list[int]] = [[] for _ in prompts]
        for number, prompt in reversed(list(enumerate(prompts))):  # in another order than that of the prompts
            for uniform in noise(torch.full((max_new_tokens,), number), torch.arange(max_new_tokens)).tolist():
                answers[number].append(END if uniform < 0.03 else 60 + (int(uniform * 1000) + sum(prompt)) % 26)
                if uniform < 0.03:
                    break
        return answers


def _ids(text: str) -> list[int]:
    return BYTES(text)["input_ids"]


def _load(
    rows: list[Any], max_length: int = 99, its_tokenizer: PreTrainedTokenizerFast = BYTES, turns: str = "all"
) -> Samples:
    opened = Opened(name="rows", fingerprint=[repr(rows)], rows=rows)
    return load_samples(opened, its_tokenizer, Format(max_length=max_length, assistant_turns=turns))


def _texts(*pairs: tuple[str, str], max_length: int = 99) -> Samples:
    return _load([TextPair(prompt=prompt, completion=completion) for prompt, completion in pairs], max_length)


def _rac(
    *samples: Samples,
    max_length: int = 99,
    its_tokenizer: PreTrainedTokenizerFast = BYTES,
    seed: int = SEED,
    **config: Any,
) -> Rac:
    given: dict[str, Any] = {"sft_share": 0.0, "cue": "|"} | config
    chosen = SelfgenConfig(method="rac", **given)
    asked = correction(samples, its_tokenizer, chosen.cue)
    method = Rac(chosen, plan(seed=seed, max_length=max_length, tokenizer=its_tokenizer, correction=asked))
    method.check(list(samples))
    return method


def _all(samples: Samples) -> list[TrainingRow]:
    return [samples[i] for i in range(len(samples))]


def _same(rows: list[TrainingRow], others: list[TrainingRow]) -> bool:
    names = ("context_ids", "target_ids", "loss_mask", "replaced_mask")
    return [(row.sample_id, row.answer_equal) for row in rows] == [(o.sample_id, o.answer_equal) for o in others] and (
        all(
            np.array_equal(getattr(row, name), getattr(other, name))
            for row, other in zip(rows, others, strict=True)
            for name in names
        )
    )


def _marked(row: TrainingRow, its_tokenizer: PreTrainedTokenizerFast = BYTES) -> dict[str, str]:
    """Return the text of a row, of its drawn tokens, and of its learned tokens."""
    return {
        "read": its_tokenizer.decode(row.context_ids),
        "drawn": its_tokenizer.decode(row.context_ids[row.replaced_mask]),
        "learned": its_tokenizer.decode(row.target_ids[row.loss_mask]),
    }


def _is_plain(row: TrainingRow, sample: TrainingRow) -> bool:
    return _same([row], [sample])


# --- the rows ---


def test_a_row_is_prompt_own_answer_cue_and_reference() -> None:
    samples = _texts(("1+1=", "two"))
    policy = SayingPolicy([*_ids("three"), END])
    ((row,), counts) = _rac(samples, cue="\nNo: ", max_new_tokens=9).rows(_all(samples), policy, 0)
    assert _marked(row) == {"read": "1+1=three\nNo: two</s>", "drawn": "three", "learned": "two</s>"}
    assert np.array_equal(row.context_ids, row.target_ids)
    assert policy.prompts == [_ids("1+1=")]
    assert counts == {
        "answers": 1,
        "unfinished_answers": 0,
        "rejected_answers": 0,
        "cut_answers": 0,
        "no_room": 0,
    }


def test_an_answer_that_did_not_end_is_taken_as_it_is() -> None:
    samples = _texts(("1+1=", "two"))
    ((row,), counts) = _rac(samples, max_new_tokens=3).rows(_all(samples), SayingPolicy(_ids("three")), 0)
    assert _marked(row) == {"read": "1+1=thr|two</s>", "drawn": "thr", "learned": "two</s>"}
    assert counts["unfinished_answers"] == 1


def test_an_answer_of_no_token_is_unfinished_and_any_end_token_ends_one() -> None:
    samples = _texts(("1+1=", "two"), ("2+2=", "four"))
    method = _rac(samples)
    method.plan.correction.end_tokens.append(99)
    counts = method.rows(_all(samples), SayingPolicy([], [*_ids("a"), 99]), 0)[1]
    assert counts["unfinished_answers"] == 1


def test_an_empty_answer_is_corrected_too() -> None:
    samples = _texts(("1+1=", "two"))
    ((row,), counts) = _rac(samples).rows(_all(samples), SayingPolicy([END]), 0)
    assert _marked(row) == {"read": "1+1=|two</s>", "drawn": "", "learned": "two</s>"}
    assert counts["answers"] == 1


def test_an_empty_cue_puts_the_reference_behind_the_answer() -> None:
    samples = _texts(("1+1=", "two"))
    ((row,), _) = _rac(samples, cue="", max_new_tokens=9).rows(_all(samples), SayingPolicy([*_ids("three"), END]), 0)
    assert _marked(row) == {"read": "1+1=threetwo</s>", "drawn": "three", "learned": "two</s>"}


def test_what_is_trained_on_is_the_reference_in_a_batch() -> None:
    samples = _texts(("1+1=", "two"))
    ((row,), _) = _rac(samples, max_new_tokens=9).rows(_all(samples), SayingPolicy([*_ids("three"), END]), 0)
    batch = collate([[row]])
    assert BYTES.decode(batch.target_ids[batch.loss_mask]) == "two</s>"
    assert BYTES.decode(batch.context_ids[batch.replaced_mask]) == "three"
    assert torch.equal(batch.context_ids, batch.target_ids)
    assert not batch.replaceable_mask[batch.replaced_mask].any()


def _conversation(*contents: str, **others: Any) -> Conversation:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return Conversation(messages=messages, **others)


@EVERY_FAMILY
@pytest.mark.parametrize("cue", [None, "Are you sure?\n\nThink."])
@pytest.mark.parametrize("before", [[], ["Hello", "Thank you!"]])
def test_a_conversation_reads_like_one_in_which_the_model_was_asked_to_correct_itself(
    family: str, cue: str | None, before: list[str]
) -> None:
    chat_tokenizer = tokenizer(family)
    samples = _load([_conversation(*before, QUESTION, RIGHT)], 999, chat_tokenizer)
    request = TURN_CUE if cue is None else cue
    conversation = _conversation(*before, QUESTION, WRONG, request, RIGHT)
    ((whole, turns),) = ChatEncoder(chat_tokenizer, "all").encode([conversation])
    (start, content_end, end), (last_start, _, last_end) = turns[-2:]
    header = samples[0].prompt_ids[start:].tolist()  # Qwen 3 writes an empty thought before the last answer only
    method = _rac(samples, max_length=999, its_tokenizer=chat_tokenizer, cue=cue, max_new_tokens=50)
    ((row,), _) = method.rows(_all(samples), SayingPolicy(whole[start:end]), 0)
    assert row.context_ids.tolist() == [*whole[:start], *header, *whole[start:last_end]]
    drawn = np.flatnonzero(row.replaced_mask)
    assert drawn.tolist() == list(range(start + len(header), content_end + len(header)))
    assert np.flatnonzero(row.loss_mask).tolist() == list(range(last_start + len(header), last_end + len(header)))


def test_of_several_turns_the_last_is_corrected_and_the_others_are_read() -> None:
    chat_tokenizer = tokenizer("chatml")
    samples = _load([_conversation("a", "b", "c", "d")], 999, chat_tokenizer)
    policy = SayingPolicy(chat_tokenizer("e<|im_end|>")["input_ids"])
    ((row,), _) = _rac(samples, max_length=999, its_tokenizer=chat_tokenizer, cue="Sure?").rows(
        _all(samples), policy, 0
    )
    marked = _marked(row, chat_tokenizer)
    assert (marked["drawn"], marked["learned"]) == ("e", "d<|im_end|>")
    assert "assistant\nb<|im_end|>" in marked["read"]


# --- which samples, which answers ---


@cache
def _many(count: int = 60) -> Samples:
    return _texts(*((f"{number}: ", "word" * (1 + number % 5)) for number in range(count)))


def _corrected(rows: list[TrainingRow], samples: Samples) -> list[bool]:
    return [not _is_plain(row, sample) for row, sample in zip(rows, _all(samples), strict=True)]


def test_a_share_of_0_corrects_every_sample_and_a_share_of_1_none() -> None:
    samples = _many()
    assert all(_corrected(_rac(samples, sft_share=0.0).rows(_all(samples), NoisePolicy(), 0)[0], samples))
    policy = SayingPolicy()
    rows, counts = _rac(samples, sft_share=1.0).rows(_all(samples), policy, 0)
    assert _same(rows, _all(samples))
    assert (policy.prompts, len(policy.asked_for)) == (
        [],
        1,
    )  # the policy is still called, because the other ranks call it
    assert set(counts.values()) == {0}


def test_a_share_between_is_met_and_a_function_of_seed_round_and_sample() -> None:
    samples = _many(150)
    chosen = {}
    for seed, number in ((5, 0), (5, 1), (6, 0)):
        rows, _ = _rac(samples, sft_share=0.3, seed=seed).rows(_all(samples), SayingPolicy([60]), number)
        chosen[seed, number] = _corrected(rows, samples)
        assert sum(chosen[seed, number]) == pytest.approx(0.7 * 150, abs=28)
        ids = torch.arange(150)
        assert chosen[seed, number] == (hashing.uniform(hashing.SFT_SHARE, seed, number, ids) >= 0.3).tolist()
    assert len(set(map(tuple, chosen.values()))) == 3


def test_a_sample_that_is_corrected_at_one_share_is_at_a_smaller_one() -> None:
    samples = _many(100)
    more, fewer = (
        _corrected(_rac(samples, sft_share=share).rows(_all(samples), SayingPolicy([60]), 0)[0], samples)
        for share in (0.3, 0.6)
    )
    assert all(a or not b for a, b in zip(more, fewer, strict=True))


def test_rows_do_not_depend_on_chunks_or_order() -> None:
    samples = _many(20)
    method = _rac(samples, sft_share=0.4, answers_per_prompt=2)
    expected, counts = method.rows(_all(samples), NoisePolicy(), 1)
    parts = [method.rows(_all(samples)[i : i + 3], NoisePolicy(), 1) for i in range(0, 20, 3)]
    assert _same([row for rows, _ in parts for row in rows], expected)
    assert counts == {name: sum(some[name] for _, some in parts) for name in counts}
    backwards, _ = method.rows(_all(samples)[::-1], NoisePolicy(), 1)
    assert _same(sorted(backwards, key=lambda row: row.sample_id), expected)


def test_answers_to_one_prompt_differ_and_so_do_those_of_another_round_or_seed() -> None:
    samples = _texts(("1+1=", "two, or three, or four"))
    drawn = [
        _marked(row)["drawn"]
        for seed, number in ((5, 0), (5, 1), (6, 0))
        for row in _rac(samples, answers_per_prompt=3, seed=seed).rows(_all(samples), NoisePolicy(), number)[0]
    ]
    assert len(drawn) == len(set(drawn)) == 9


def test_an_answers_noise_does_not_depend_on_how_many_are_asked_for() -> None:
    samples = _many(5)
    one, three = (
        _rac(samples, answers_per_prompt=answers).rows(_all(samples), NoisePolicy(), 0)[0] for answers in (1, 3)
    )
    assert _same(one, three[::3])


def test_every_answer_is_a_row_in_the_order_of_the_samples() -> None:
    samples = _many(6)
    rows, counts = _rac(samples, answers_per_prompt=3).rows(_all(samples), NoisePolicy(), 0)
    assert [row.sample_id for row in rows] == [i for i in range(6) for _ in range(3)]
    assert counts["answers"] == 18


def test_no_samples_are_no_rows_but_a_call() -> None:
    samples, policy = _many(3), SayingPolicy()
    assert _rac(samples).rows([], policy, 0)[0] == []
    assert policy.asked_for == [len("word" * 3) + 1]


def test_as_many_tokens_are_asked_for_as_the_longest_response_has_or_as_is_set() -> None:
    samples, policy = _texts(("a", "b" * 7), ("c", "d")), SayingPolicy([END])
    _rac(samples).rows(_all(samples), policy, 0)
    _rac(samples, max_new_tokens=3).rows(_all(samples), policy, 0)
    assert policy.asked_for == [8, 3]
    assert _rac(samples).longest == 1 + 8


# --- answers that are not taken ---


def test_a_rejected_answer_leaves_its_sample_plain() -> None:
    samples = _texts(("a", "b"), ("c", "d"))
    policy = SayingPolicy([*_ids("a bad one"), END], [*_ids("good"), END])
    rows, counts = _rac(samples, reject=["bad"], max_new_tokens=20).rows(_all(samples), policy, 0)
    assert _is_plain(rows[0], samples[0])
    assert _marked(rows[1])["drawn"] == "good"
    assert (counts["rejected_answers"], counts["answers"]) == (1, 2)


def test_of_several_answers_those_that_are_not_rejected_are_rows() -> None:
    samples = _texts(("a", "b"))
    for answers, expected in (
        (["bad", "one", "two"], ["one", "two"]),
        (["one", "bad", "bad"], ["one"]),
        (["bad", "bad", "bad"], [""]),
    ):
        policy = SayingPolicy(*([*_ids(answer), END] for answer in answers))
        rows, counts = _rac(samples, reject=["bad"], answers_per_prompt=3, max_new_tokens=9).rows(
            _all(samples), policy, 0
        )
        assert [_marked(row)["drawn"] for row in rows] == expected
        assert counts["rejected_answers"] == answers.count("bad")


def test_a_sample_without_room_for_an_answer_is_plain_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    samples = _texts(("p" * 8, "r" * 9), ("p" * 9, "r" * 9), ("q", "r"), max_length=20)  # 18, 19 and 3 tokens
    policy = SayingPolicy([*_ids("own"), END])
    with caplog.at_level(logging.WARNING, "selfgen_ds"):
        method = _rac(samples, max_length=20)
    assert "1 of 3 rows have no room for the model's answer" in caplog.text
    rows, counts = method.rows(_all(samples), policy, 0)
    assert policy.prompts == [_ids("p" * 8), _ids("q")]
    assert _is_plain(rows[1], samples[1])
    assert (counts["no_room"], counts["answers"]) == (1, 2)


def test_a_sample_that_would_be_plain_anyway_does_not_count_as_without_room() -> None:
    samples = _texts(("p" * 9, "r" * 9), ("q", "r"), max_length=20)
    assert _rac(samples, max_length=20, sft_share=1.0).rows(_all(samples), SayingPolicy(), 0)[1]["no_room"] == 0


def test_an_answer_is_cut_to_the_room_that_is_left() -> None:
    samples = _texts(("p" * 8, "r" * 7), ("q", "r"), max_length=20)  # 16 tokens: 3 and the cue fit
    rows, counts = _rac(samples, max_length=20).rows(_all(samples), SayingPolicy([*_ids("answer"), END]), 0)
    assert _marked(rows[0])["read"] == "p" * 8 + "ans|" + "r" * 7 + "</s>"
    assert [len(row.context_ids) for row in rows] == [20, 1 + 6 + 1 + 2]
    assert counts["cut_answers"] == 1


def test_an_answer_that_just_fits_is_not_cut() -> None:
    samples = _texts(("p" * 8, "r" * 7), ("q", "r"), max_length=20)  # 16 tokens: 3 and the cue fit
    rows, counts = _rac(samples, max_length=20).rows(_all(samples), SayingPolicy([*_ids("own"), END]), 0)
    assert _marked(rows[0])["read"] == "p" * 8 + "own|" + "r" * 7 + "</s>"
    assert counts["cut_answers"] == 0


def test_rows_whose_answers_are_cut_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    samples = _texts(("p" * 8, "r" * 7), ("q", "r"), max_length=20)
    with caplog.at_level(logging.WARNING, "selfgen_ds"):
        _rac(samples, max_length=20, max_new_tokens=4)
    assert "answers to 1 of 2 rows are cut before selfgen.max_new_tokens" in caplog.text


@pytest.mark.parametrize(
    ("answers", "epochs", "share", "warned"), [(2, 1, 0.5, True), (2, 2, 0.5, False), (2, 1, 1.0, False)]
)
def test_more_answers_than_a_round_reads_are_warned_of(
    caplog: pytest.LogCaptureFixture, answers: int, epochs: int, share: float, warned: bool
) -> None:
    with caplog.at_level(logging.WARNING, "selfgen_ds"):
        _rac(_many(3), answers_per_prompt=answers, epochs_per_round=epochs, sft_share=share)
    warning = f"a round of {epochs} epochs reads about {epochs} of the {answers} answers"
    assert (warning in caplog.text) == warned


def test_a_truncated_response_fills_its_row_and_stays_as_it_is() -> None:
    samples = _texts(("p", "r" * 40), ("q", "r"), max_length=20)
    assert samples.truncated == 1
    rows, counts = _rac(samples, max_length=20).rows(_all(samples), SayingPolicy([*_ids("own"), END]), 0)
    assert _is_plain(rows[0], samples[0])
    assert counts["no_room"] == 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # 20 tokens, 3 of prompt and reference, 1 of the cue
        (
            {"max_new_tokens": 17},
            "selfgen.max_new_tokens: an answer of 17 tokens fits into no row of data.max_length=20: ",
        ),
        ({"cue": "x" * 17}, "data.max_length: an answer of 1 tokens fits into no row"),
    ],
)
def test_answers_that_fit_into_no_row_are_refused(config: dict[str, Any], expected: str) -> None:
    samples = _texts(("q", "r"), ("p" * 9, "r" * 8), max_length=20)
    with pytest.raises(InputError) as caught:
        _rac(samples, max_length=20, **config)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)
    _rac(samples, max_length=20, sft_share=1.0, **config)  # no answer is drawn


def test_answers_that_just_fit_are_not_refused() -> None:
    samples = _texts(("q", "r"), ("p" * 9, "r" * 8), max_length=20)
    _rac(samples, max_length=20, max_new_tokens=16)
    _rac(samples, max_length=20, cue="x" * 16)


# --- answers that equal the reference ---


def test_an_answer_that_is_the_reference_is_marked() -> None:
    samples = _texts(*[("1+1=", "two")] * 1, ("2+2=", "two"), ("2+3=", "two"), ("4+4=", "two"))
    policy = SayingPolicy([*_ids("two"), END], [*_ids("twoo"), END], [END], _ids("tw"))
    rows, _ = _rac(samples).rows(_all(samples), policy, 0)
    assert [row.answer_equal for row in rows] == [True, False, False, False]


def test_of_an_answer_the_words_are_compared_and_not_the_tokens() -> None:
    chat_tokenizer = tokenizer("chatml")
    samples = _load([TextPair(prompt="a", completion="the answer")], 99, chat_tokenizer)
    letters = [token for letter in "the answer" for token in chat_tokenizer(letter)["input_ids"]]
    assert letters != samples[0].response_ids.tolist()[:-1]
    method = _rac(samples, its_tokenizer=chat_tokenizer, max_new_tokens=20)
    ((row,), _) = method.rows(_all(samples), SayingPolicy([*letters, chat_tokenizer.eos_token_id]), 0)
    assert row.answer_equal


def test_an_answer_whose_cut_start_is_the_reference_is_not_the_reference() -> None:
    samples = _texts(("p" * 8, "r" * 3), ("q", "r"), max_length=16)  # 12 tokens: 3 and the cue fit
    rows, counts = _rac(samples, max_length=16, max_new_tokens=9).rows(
        _all(samples), SayingPolicy([*_ids("rrrr"), END]), 0
    )
    assert counts["cut_answers"] == 1
    assert not rows[0].answer_equal


SHARES = [0.0, 0.03, 0.12, 0.3, 0.5, 0.7, 0.9, 1.0]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("others", [1, 7, 22, 88, 97])
def test_as_many_equal_answers_are_kept_as_the_share_allows(share: float, others: int) -> None:
    method = _rac(_many(3), max_equal_share=share)
    rng = np.random.default_rng(others)
    equal = rng.permutation(np.arange(others + 60) < 60)
    chosen = method.select(np.arange(len(equal)), equal, 0)
    kept = int(equal[chosen].sum())
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(np.flatnonzero(~equal)) <= set(chosen.tolist())

    def holds(count: int) -> bool:
        return count <= share * (count + others) + 1e-9

    assert kept == max(count for count in range(61) if holds(count))


def test_which_equal_answers_are_kept_is_a_function_of_seed_round_and_sample() -> None:
    ids, equal = np.arange(100, 300), np.arange(200) % 2 == 0
    kept = {}
    for seed, number in ((5, 0), (5, 1), (6, 0)):
        method = _rac(_many(3), seed=seed, max_equal_share=0.2)
        kept[seed, number] = ids[method.select(ids, equal, number)].tolist()
        assert ids[method.select(ids, equal, number)].tolist() == kept[seed, number]
        order = np.random.default_rng(0).permutation(200)
        assert sorted(ids[order][method.select(ids[order], equal[order], number)]) == kept[seed, number]
    assert len(set(map(tuple, kept.values()))) == 3


def test_which_equal_answers_are_kept_has_nothing_to_do_with_which_samples_are_corrected() -> None:
    ids = np.arange(4000)
    coins = hashing.uniform(hashing.SFT_SHARE, SEED, 0, torch.from_numpy(ids)).numpy()
    corrected = ids[coins >= 0.5]
    chosen = _rac(_many(3), max_equal_share=0.4).select(corrected, np.arange(len(corrected)) % 2 == 0, 0)
    kept = [number for number in chosen.tolist() if number % 2 == 0]
    assert len(kept) > 500
    assert abs(coins[corrected[kept]].mean() - 0.75) < 0.03  # for 667 rows, five standard deviations are 0.031


@pytest.mark.parametrize("share", SHARES)
def test_without_equal_answers_every_row_is_kept(share: float) -> None:
    method = _rac(_many(3), max_equal_share=share)
    assert method.select(np.arange(9), np.zeros(9, bool), 0).tolist() == list(range(9))


# --- whatever comes ---


@settings(deadline=None, max_examples=25)
@given(
    pairs=st.lists(st.tuples(st.integers(1, 25), st.integers(1, 25)), min_size=1, max_size=6),
    answers=st.lists(st.text("ab", max_size=30), min_size=1, max_size=5),
    max_length=st.integers(27, 60),
    cue=st.text("|:", max_size=3),
    answers_per_prompt=st.integers(1, 3),
    sft_share=st.floats(0, 1),
    reject=st.sampled_from([None, ["bb"], ["^a"]]),
    max_new_tokens=st.none() | st.integers(1, 30),
)
def test_nothing_is_longer_than_a_row_and_no_target_is_drawn(
    pairs: list[tuple[int, int]], answers: list[str], max_length: int, cue: str, **config: Any
) -> None:
    samples = _texts(*(("p" * prompt, "r" * completion) for prompt, completion in pairs), max_length=max_length)
    first = with_consecutive_ids([_texts(("x", "y")), samples])[1]
    try:
        method = _rac(first, max_length=max_length, cue=cue, **config)
    except InputError:  # no answer fits
        assume(False)
    policy = SayingPolicy(*([*_ids(answer), END] for answer in answers))
    rows, counts = method.rows(_all(first), policy, 2)
    assert {row.sample_id for row in rows} == {sample.sample_id for sample in _all(first)}
    by_id = {sample.sample_id: sample for sample in _all(first)}
    for row in rows:
        sample = by_id[row.sample_id]
        arrays = (row.context_ids, row.target_ids, row.loss_mask, row.replaced_mask)
        assert {array.shape for array in arrays} == {(len(row.context_ids),)}
        assert len(row.context_ids) <= max_length
        assert not (row.loss_mask & row.replaced_mask).any()
        assert row.target_ids[row.loss_mask].tolist() == sample.response_ids.tolist()
        assert row.context_ids[: len(sample.prompt_ids)].tolist() == sample.prompt_ids.tolist()
        assert not row.replaced_mask[: len(sample.prompt_ids)].any()
        assert row.response_ids.tolist() == sample.response_ids.tolist()
        assert len(runs(row.loss_mask)) == 1
        assert not row.replaceable_mask.any()
    assert counts["answers"] == len(policy.prompts)
    assert counts["answers"] - counts["rejected_answers"] <= len(rows)
