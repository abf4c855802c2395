from __future__ import annotations

import inspect
import re

import pytest

from cloven import errors
from cloven.errors import BadInput, ClovenError, RunError, SecurityError

CLASSES = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, ClovenError)}


def test_the_tree_at_the_top_of_the_file_is_the_truth() -> None:
    assert errors.__doc__ is not None
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│├└─ ]*)([A-Z]\w+)(\s|$)", line)
        if match:
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            parents[match[2]] = path[depth - 1] if depth else "Exception"
    assert parents == {name: cls.__bases__[0].__name__ for name, cls in CLASSES.items()}


@pytest.mark.parametrize(("base", "code"), [(BadInput, 2), (RunError, 1), (SecurityError, 3)])
def test_exit_codes(base: type[ClovenError], code: int) -> None:
    assert f"exit {code}" in next(line for line in str(errors.__doc__).splitlines() if base.__name__ in line)
    for cls in CLASSES.values():
        if issubclass(cls, base):
            assert cls.exit_code == code


def test_everything_is_documented_and_an_exception() -> None:
    for cls in CLASSES.values():
        assert cls.__doc__
        assert str(cls("what, where, what to do")) == "what, where, what to do"
