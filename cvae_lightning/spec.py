"""Objects that remember how they were built: checkpoints hold plain data and load with ``weights_only=True``."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def to_plain(value: Any) -> Any:
    """Turn a value into nested dicts, lists and scalars; a ``HasSpec`` object becomes ``{class_path, init_args}``.

    Raises:
        TypeError: if a value cannot be written as plain data.
    """
    if isinstance(value, HasSpec):
        return value.spec()
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"hyperparameters must be plain data or components of the package, got {type(value).__name__}")


class HasSpec:
    """Mixin that records the arguments of the outermost ``__init__`` call."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            return
        original = cls.__init__
        signature = inspect.signature(original)

        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            if "_spec_args" not in self.__dict__:
                bound = signature.bind(self, *args, **kwargs)
                bound.apply_defaults()
                arguments = dict(list(bound.arguments.items())[1:])
                for name, parameter in signature.parameters.items():
                    if parameter.kind is parameter.VAR_KEYWORD:  # what the call gave by name, it is built with by name
                        arguments |= arguments.pop(name)
                    elif parameter.kind is parameter.VAR_POSITIONAL:
                        arguments |= dict(zip(_names_behind(cls), arguments.pop(name), strict=False))
                object.__setattr__(self, "_spec_args", arguments)
            original(self, *args, **kwargs)

        cls.__init__ = init  # type: ignore[method-assign]

    def spec(self) -> dict[str, Any]:
        """Return ``{class_path, init_args}`` in the form that jsonargparse instantiates."""
        cls = type(self)
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": to_plain(self._spec_args)}  # type: ignore[attr-defined]


def _names_behind(cls: type) -> list[str]:
    """Return what the parents of a class call the arguments that its ``__init__`` takes as ``*args`` and hands on."""
    names: list[str] = []
    for parent in cls.__mro__[1:]:
        if "__init__" in parent.__dict__:
            parameters = list(inspect.signature(parent.__init__).parameters.values())[1:]  # type: ignore[misc]
            names += [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
            if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
                break
    return names
