"""Checks of what is on a device, whose results are read one step late, so that the host need not wait for it."""

from collections.abc import Callable

import torch
from torch import Tensor

from .step_watch import StepWatch


class LateChecks:
    """
    Raises errors about values that only the device knows.

    On the CPU, and where nothing would notice the end of a text, they are raised at once. In `generate` on a device,
    they are raised at the next step, or when `generate` is about to return: before a wrong text is.

    Args:
        watch ([`StepWatch`], *optional*):
            The watch of the base.
    """

    def __init__(self, watch: StepWatch | None):
        self._watch = watch
        self._new: list[tuple[Tensor, Callable[[], None]]] = []
        self._sent: list[tuple[Tensor, torch.Event | None, list[Callable[[], None]]]] = []

    def add(self, is_wrong: Tensor, refuse: Callable[[], None]) -> None:
        """
        Adds a check.

        Args:
            is_wrong (`torch.BoolTensor` without dimensions):
                Whether there is an error.
            refuse (callable):
                Raises it.
        """
        if is_wrong.device.type != "cpu":
            self._new.append((is_wrong, refuse))
        elif is_wrong:
            refuse()

    def send(self) -> bool:
        """
        Starts to copy the results of a step to the host, and returns whether some are read later. Where nothing would
        notice the end of a text, all are read now.
        """
        new, self._new = self._new, []
        is_late = self._watch is not None and self._watch.is_generating
        for device in dict.fromkeys(is_wrong.device for is_wrong, _ in new):
            own = [(is_wrong, refuse) for is_wrong, refuse in new if is_wrong.device == device]
            results = torch.stack([is_wrong for is_wrong, _ in own]).to("cpu", non_blocking=is_late)
            copied = torch.Event(device=device) if is_late else None
            if copied is not None:
                copied.record()
            self._sent.append((results, copied, [refuse for _, refuse in own]))
        if not is_late:
            self.settle()
        return bool(new) and is_late

    def settle(self) -> None:
        """Raises the first error that was found, of the steps whose results were sent."""
        sent, self._sent = self._sent, []
        for results, copied, refusals in sent:
            if copied is not None:
                copied.synchronize()
            for is_wrong, refuse in zip(results.tolist(), refusals, strict=True):
                if is_wrong:
                    refuse()

    def forget(self) -> None:
        """Forgets the checks of a run that was broken off."""
        self._new, self._sent = [], []
