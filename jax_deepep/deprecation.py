"""Old names of functions and arguments: they still work, with a DeprecationWarning."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_arguments(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that accepts keyword arguments by their old names too: `old="new"`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in new_names.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(f"{old}: expected no old name beside {new}, got both; pass {new} alone.")
                warnings.warn(f"{old} is now called {new}.", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed_function(old: str, function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` for those who call it by its old name."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        warnings.warn(f"{old} is now called {function.__name__}.", DeprecationWarning, stacklevel=2)
        return function(*args, **kwargs)

    return call
