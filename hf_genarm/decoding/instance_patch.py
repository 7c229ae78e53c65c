"""Replacing a method on one model, with a handle that undoes it."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel


class InstancePatch:
    """
    Replaces a method of one model by an instance attribute, until [`~InstancePatch.remove`] restores it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        name (`str`):
            The name of the method.
        function (callable):
            What is called in its place, with the replaced method as its first argument.

    Attributes:
        before (callable, *optional*):
            What the instance itself had in this place.
    """

    def __init__(self, model: PreTrainedModel, name: str, function: Callable):
        self._model, self._name, self._function = model, name, function
        self.before = vars(model).get(name)
        self.__wrapped__ = getattr(model, name)  # `generate` inspects its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self.__wrapped__, *args, **kwargs)

    def __reduce__(self) -> tuple:
        return getattr, (self._model, self._name)  # a copy of the model has the method of the copy

    def install(self) -> None:
        """Puts the patch in place."""
        vars(self._model)[self._name] = self

    def remove(self) -> None:
        """Restores what was there before, unless something else has replaced the patch since."""
        if vars(self._model).get(self._name) is self:
            del vars(self._model)[self._name]
            if self.before is not None:
                vars(self._model)[self._name] = self.before

    def retire(self) -> None:
        """Removes the patch for good; a later patch that still calls this one reaches the method unchanged."""
        self.remove()
        self._function = lambda method, *args, **kwargs: method(*args, **kwargs)
