"""Final answers: what a reference comes to, and when an answer comes to the same."""

import pytest

from selfgen_ds.evaluation.final_answers import final_answer, normalized, same_final_answer


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("So 3 + 4 = 7.\n#### 7", "7"),
        ("#### 1\nno, #### 2 apples\nend", "2 apples"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"first \boxed{1}, then \boxed{x^{2}}", "x^{2}"),
        ("-1,234.5", "-1,234.5"),
        ("$10", "$10"),
        ("The cat sat 3 times.", None),
        (r"an open \boxed{1", None),
        ("", None),
    ],
)
def test_a_reference_comes_to_what_it_marks_or_to_itself_if_it_is_a_number(
    reference: str, expected: str | None
) -> None:
    assert final_answer(reference) == expected


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("#### 1,234", "1234", True),
        ("It is $1,234.00 in all.", "1234", True),
        ("I think 71, no: 72", "72", True),
        ("#### 71, no 72", "72", False),
        ("#### 72 dollars", "72", True),
        ("#### 72kg of flour", "72", True),
        ("#### $1,072.00 m", "1072", True),
        ("#### 5 apples and 3 pears", "5", True),
        ("#### 72 dollars", "7", False),
        ("#### 1/2", "1", False),
        ("#### 2x", "2", False),
        ("#### 2 x 3", "2", False),
        ("#### 1e5", "1", False),
        (r"so \boxed{0.5}", r"\frac{1}{2}", True),
        ("The answer is 3/4", r"\frac{3}{4}", True),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", True),
        ("#### Paris.", "paris", True),
        ("London", "Paris", False),
        ("#### 5", "-5", False),
        ("#### 15", "1.5", False),
        ("", "4", False),
        ("", "A", False),
        ("The", "A", False),
        ("#### a", "A", True),
        ("#### 2014", "2020-01-05", False),
        ("#### 2020-01-05", "2020-01-05", True),
    ],
)
def test_two_final_answers_are_the_same_by_value_or_by_normalized_text(answer: str, expected: str, same: bool) -> None:
    assert same_final_answer(answer, expected) is same


def test_normalized_texts_have_no_case_punctuation_articles_or_repeated_space() -> None:
    assert normalized("The  Cat's,\n a dog!") == "cats dog"
