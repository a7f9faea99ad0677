import random
from functools import cache
from itertools import islice

import pytest

from selfgen_ds.data.row_checks import TextPair
from selfgen_ds.data.tasks import TASKS, ForcedErrorText, forced_error_texts, generate, split_of, task_of

EVERY_TASK = pytest.mark.parametrize("task", [*TASKS])


@cache
def _test_set(task: str) -> list[TextPair]:
    return [TextPair(prompt=prompt, completion=completion) for prompt, completion in generate(task, "test")]


_errors = cache(forced_error_texts)


def _rows(task: str, split: str = "train", count: int = 100) -> list[TextPair]:
    pairs = islice(generate(task, split), count)
    return [TextPair(prompt=prompt, completion=completion) for prompt, completion in pairs]


def test_pointer_chase_answers_follow_the_pointers() -> None:
    for row in _rows("pointer_chase"):
        pairs, key = row.prompt[:16], row.prompt[16]
        following = dict(zip(pairs[::2], pairs[1::2], strict=True))
        answer = ""
        for _ in range(6):
            value = following[key]
            key = value.upper()
            answer += value + key
        assert row.completion == answer


def test_pointer_chase_prompts_are_eight_pairs_of_one_cycle_and_a_start() -> None:
    for row in _rows("pointer_chase"):
        assert (len(row.prompt), row.prompt[-1]) == (18, "=")
        following = dict(zip(row.prompt[:16:2], row.prompt[1:16:2], strict=True))
        visited, key = set(), row.prompt[16]
        for _ in range(8):
            key = following[key].upper()
            visited.add(key)
        assert visited == set("ABCDEFGH")


def test_running_sum_answers_are_the_sums_modulo_ten() -> None:
    for row in _rows("running_sum"):
        total, answer = 0, ""
        for operand in row.prompt.removesuffix("="):
            total += int(operand)
            answer += str(total)[-1]
        assert row.completion == answer
        assert len(answer) == 16


def test_sorted_letters_are_those_of_the_prompt_in_order() -> None:
    for row in _rows("sort"):
        assert list(row.completion) == sorted(row.prompt.removesuffix("="))
        assert len(row.completion) == 24


def test_the_first_key_of_random_start_is_any_and_the_rest_follows_the_pointers() -> None:
    starts = set()
    for row in _rows("random_start"):
        pairs, key = row.prompt.removesuffix("="), row.completion[0]
        following = dict(zip(pairs[::2], pairs[1::2], strict=True))
        answer = key
        for _ in range(6):
            value = following[key]
            key = value.upper()
            answer += value + key
        assert row.completion == answer
        starts.add(row.completion[0])
    assert starts == set("ABCDEFGH")


@pytest.mark.parametrize(
    ("task", "length", "alphabet"),
    [
        ("pointer_chase", 5, "abcdefgh"),
        ("running_sum", 3, "0123456789"),
        ("sort", 3, "abcdefghijklmnopqrstuvwxyz"),
        ("random_start", 6, "abcdefgh"),
    ],
)
def test_the_forced_error_is_the_third_result_and_nothing_else(task: str, length: int, alphabet: str) -> None:
    for pair, error in zip(_test_set(task), _errors(task), strict=True):
        assert len(error.start) == length
        assert error.start[:-1] == pair.completion[: length - 1]
        assert error.start[-1] != pair.completion[length - 1]
        assert error.start[-1] in alphabet


@EVERY_TASK
def test_the_rest_follows_the_forced_error(task: str) -> None:
    for pair, error in zip(_test_set(task), _errors(task), strict=True):
        assert error.rest == pair.completion[len(error.start) :]


@EVERY_TASK
def test_the_forced_error_takes_every_wrong_value(task: str) -> None:
    errors = {error.start[-1] for error in _errors(task)}
    assert len(errors) == {"running_sum": 10, "sort": 26}.get(task, 8)


@EVERY_TASK
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_set_has_the_same_rows_in_every_generation(task: str, split: str) -> None:
    assert _rows(task, split) == _rows(task, split)


@EVERY_TASK
def test_the_test_set_has_512_rows(task: str) -> None:
    assert len(_test_set(task)) == 512


@pytest.fixture
def tiny_task(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register a task with 1000 prompts: by chance alone, rows would repeat and the sets would overlap."""

    def example(rng: random.Random) -> tuple[str, str, ForcedErrorText]:
        return f"{rng.randrange(1000)}", "x", ForcedErrorText(start="y", rest="")

    monkeypatch.setitem(TASKS, "tiny", example)
    return "tiny"


@pytest.mark.parametrize(("split", "count"), [("train", 800), ("test", 50)])
def test_no_prompt_comes_twice(tiny_task: str, split: str, count: int) -> None:
    assert len({row.prompt for row in _rows(tiny_task, split, count)}) == count


def test_train_and_test_set_do_not_overlap(tiny_task: str) -> None:
    train, test = _rows(tiny_task, "train", 800), _rows(tiny_task, "test", 50)
    assert {row.prompt for row in train}.isdisjoint(row.prompt for row in test)


@EVERY_TASK
def test_train_and_test_set_of_a_built_in_task_do_not_overlap(task: str) -> None:
    train, test = _rows(task, "train", 600), _test_set(task)
    assert {row.prompt for row in train}.isdisjoint(row.prompt for row in test)


@EVERY_TASK
def test_the_dev_set_has_rows_and_errors_of_its_own(task: str) -> None:
    dev, test = _rows(task, "dev", 600), _test_set(task)
    assert len(dev) == 512
    prompts = {row.prompt for row in dev}
    assert prompts.isdisjoint(row.prompt for row in test)
    assert prompts.isdisjoint(row.prompt for row in _rows(task, "train", 600))
    for row, error in zip(dev, forced_error_texts(task, "dev"), strict=True):
        assert row.completion == error.start[:-1] + row.completion[len(error.start) - 1] + error.rest


def test_a_path_names_a_task_and_may_name_a_split() -> None:
    paths = ("builtin:sort", "builtin:sort/dev", "sort/dev")
    assert [task_of(path) for path in paths] == ["sort", "sort", None]
    assert [split_of(path, "train") for path in paths[:2]] == ["train", "dev"]
