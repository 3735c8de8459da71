"""Constructor arguments that can be read, set and shown by name, in scikit-learn's manner."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class Estimator:
    """A class whose constructor stores its arguments as they are, under their names."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002, FBT001, FBT002 - scikit-learn's signature
        """The constructor's arguments by name; `deep` is scikit-learn's and changes nothing."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **parameters: Any) -> Self:
        """Set arguments of the constructor by name; they are checked in, and hold from, the next `fit`.

        Raises:
            ValueError: a name is none of them; nothing is set then.
        """
        known = self.get_params()
        for name in parameters:
            if name not in known:
                raise ValueError(f"{name} is no parameter of {type(self).__name__}; it has {', '.join(known)}")
        for name, value in parameters.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        """The arguments that are not the default."""
        parameters = inspect.signature(type(self)).parameters
        changed = (
            f"{name}={value!r:.80}"
            for name, value in self.get_params().items()
            if value is not parameters[name].default and not _equal(value, parameters[name].default)
        )
        return f"{type(self).__name__}({', '.join(changed)})"


def _equal(value: object, default: object) -> bool:
    return type(value) is type(default) and value == default
