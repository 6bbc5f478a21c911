"""The text of an error, and the words that it must hold."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

import gradstat


def message_of(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, gradstat.GradstatError)
    return str(caught.value)


def assert_words_in_order(text: str, words: list[str]) -> None:
    assert re.search(".*".join(map(re.escape, words)), text), text
