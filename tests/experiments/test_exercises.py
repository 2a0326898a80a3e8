"""stem.experiments.exercises and notebook.exercise: a wrong answer is told what is wrong with it."""

import dataclasses
import re
from functools import partial

import pytest
import torch

from stem.experiments import notebook
from stem.experiments.exercises import difference

SQUARE = torch.arange(1.0, 26).view(5, 5) ** 1.5


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: int


def changed(x: torch.Tensor, where, value: float) -> torch.Tensor:
    x = x.clone()
    x[where] = value
    return x


DIAGONAL, FUTURE = torch.eye(5, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool).triu(1)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (SQUARE[:4], r"the shape is \[4, 5\], expected \[5, 5\]"),
        (0.125 * SQUARE, "every entry is 0.125 times the expected one"),
        (-SQUARE, "every entry is -1 times"),
        (SQUARE.T, "transposed"),
        (SQUARE.flip(0), "dimension 0 is reversed"),
        (SQUARE.roll(1, 1), "dimension 1 is shifted by one"),
        (changed(SQUARE, DIAGONAL, 0), "only the diagonal is wrong"),
        (changed(SQUARE, FUTURE, 0), "above the diagonal, which lie in the future"),
        (changed(SQUARE, 4, torch.nan), "5 of 25 entries are NaN.*at indices 4 to 4 of dimension 0"),
        (changed(SQUARE, (slice(None), 3), 7), r"5 of 25.*indices 3 to 3 of dimension 1.*first is \[0, 3\]: got 7"),
        (3.0, r"a tensor of shape \[5, 5\] is expected, got float"),
    ],
    ids=lambda x: "" if isinstance(x, torch.Tensor) else str(x)[:20],
)
def test_the_reason_names_the_mistake(found, told):
    assert difference(SQUARE.double(), SQUARE) is None
    assert re.search(told, difference(found, SQUARE))


def test_whole_numbers_are_exact_and_floats_are_not():
    assert difference(10**6 + 1, 10**6) and difference(torch.tensor([10**6 + 1]), torch.tensor([10**6]))
    assert difference(1e6 + 1, 1e6) is None and difference(1e6 + 200, 1e6)


def test_items_are_named():
    pair = Pair(torch.ones(2), 3)
    assert difference(Pair(torch.ones(2), 3), pair) is None
    assert difference(Pair(torch.ones(2), 4), pair) == "item 'second': got 4, expected 3"
    assert difference((1, 2), (1, 2, 3)) == "a tuple of 3 is expected, got tuple"
    assert difference({"a": 1}, {"b": 1}) == "the keys are ['a'], expected ['b']"
    assert difference([1, [2, 5]], [1, [2, 4]]) == "item 1: item 1: got 5, expected 4"
    assert difference("a", "b") == "got 'a', expected 'b'"


def test_a_wrong_answer_raises_and_a_known_mistake_is_named(capsys):
    def spec(x):
        return x.exp()

    for nothing in (None, torch.full((3,), torch.nan)):
        notebook.exercise(lambda x, nothing=nothing: nothing, against=spec, args=(torch.ones(3),))
    assert capsys.readouterr().out == "not attempted\n" * 2
    with pytest.raises(AssertionError, match="not yet: every entry is 2 times"):
        notebook.exercise(lambda x: 2 * x.exp(), against=spec, args=(torch.ones(3),))
    mistakes = {"the base is 2, not e": torch.exp2, "no exponential": lambda x: x}
    with pytest.raises(AssertionError, match="not yet: the base is 2, not e$"):
        notebook.exercise(torch.exp2, against=spec, args=(torch.randn(9),), mistakes=mistakes)


def test_several_calls_must_all_be_right(capsys):
    def count(n, k=1):
        return n * (n + 1) // 2 + k - 1

    calls = [(1,), (2,), (5, 3)]
    notebook.exercise(count, against=count, args=calls)
    notebook.exercise(lambda *call: None, against=count, args=calls)
    assert capsys.readouterr().out == "correct\nnot attempted\n"
    with pytest.raises(AssertionError, match=r"not yet: got 15, expected 17 \(arguments \(5, 3\)\)$"):
        notebook.exercise(lambda n, k=1: n * (n + 1) // 2, against=count, args=calls)
    with pytest.raises(AssertionError, match=r"call 2 of 2\)$"):
        notebook.exercise(lambda x: x.abs(), against=lambda x: x, args=[(torch.ones(30),), (-torch.ones(30),)])
    square = {"a square, not a triangle": lambda n, k=1: n * n}
    with pytest.raises(AssertionError, match="not yet: a square, not a triangle$"):
        notebook.exercise(lambda n, k=1: n**2, against=count, args=calls, mistakes=square)
    with pytest.raises(AssertionError, match="not yet: got 1, expected 3"):  # the mistake explains one call, not all
        notebook.exercise(lambda n, k=1: 1, against=count, args=calls, mistakes=square)


def test_an_answer_to_one_of_several_calls_is_an_attempt():
    with pytest.raises(AssertionError, match="not yet: got None, expected 3|NoneType"):
        notebook.exercise(lambda n: 1 if n == 1 else None, against=lambda n: n * (n + 1) // 2, args=[(1,), (2,)])


def test_a_solution_that_calls_the_answer_is_none():
    def applied(fn, x):
        return fn(x)

    def answer(x):
        return x + 1

    def shifted(x):
        return answer(x)

    for fn, against in ((shifted, answer), (partial(applied, shifted), partial(applied, answer))):
        with pytest.raises(AssertionError, match="not yet: write it without answer$"):
            notebook.exercise(fn, against=against, args=(torch.ones(2),))
    notebook.exercise(partial(applied, lambda x: 1 + x), against=partial(applied, answer), args=(torch.ones(2),))
