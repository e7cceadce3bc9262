"""The registry that all lists of names are."""

import pytest

from medmerge_jax.errors import UserError
from medmerge_jax.registry import Decorator, Registry, summary


@pytest.fixture
def fruits():
    return Registry("fruit")


@pytest.fixture
def fruit(fruits):
    return Decorator(fruits, lambda function, sweet=False: (function, sweet))


def test_a_decorator_with_and_without_facts(fruits, fruit):
    @fruit
    def apple():
        """Grows on trees.

        And elsewhere.
        """

    @fruit(sweet=True)
    def fig():
        pass

    assert dict(fruits) == {"apple": (apple, False), "fig": (fig, True)}
    assert list(fruits) == ["apple", "fig"]
    assert (summary(apple), summary(fig)) == ("Grows on trees.", "")


def test_what_is_not_there(fruits):
    fruits.add("apple", 1)
    with pytest.raises(UserError, match="there is no fruit 'aple'; did you mean 'apple'"):
        fruits["aple"]


def test_a_name_is_taken_unless_the_same_definition_runs_again(fruits, fruit):
    def define(size):
        @fruit
        def apple():
            return size

    define(1)
    define(2)
    assert fruits["apple"][0]() == 2

    def apple():
        pass

    with pytest.raises(ValueError, match="there is a fruit 'apple' already"):
        fruit(apple)
    with pytest.raises(ValueError, match="there is a fruit 'apple' already"):
        fruits.add("apple", 3)
