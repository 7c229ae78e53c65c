"""A simulated accelerator: tensors of the CPU that report another device, can't be combined with others, and count."""

import collections
import contextlib
import sys
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

NAME = "simulated"
DEVICE = f"{NAME}:0"
_COPIES = {"_to_copy", "copy_"}
_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}
# Of these the host has to know the size of what they return.
_OF_UNKNOWN_SIZE = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim"}
# What launches nothing
_NO_KERNEL = {"detach", "alias", "lift_fresh", "lift", "_unsafe_view", "view", "_reshape_alias", "is_pinned"}
_NO_KERNEL |= {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense"}
_KERNELS = {"multinomial": 13, "equal": 2, "nonzero": 2}  # where it is not 1


class _Backend(backend_registration._DummyBackendModule):
    def device_count(self):
        return 1

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


class _Event:
    """Stands for a point in the work of the device, which the simulated one has always passed."""

    def __init__(self, **options):
        pass

    record = synchronize = __init__


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
torch.Event = _Event  # this process has no other device


class Counts:
    """
    Counts what happens on the device.

    Attributes:
        reads (`Counter`):
            By line of code: how often the host waits for the device, to read from it or to copy to it.
        launches (`int`):
            Number of kernels.
    """

    def __init__(self):
        self.reads, self.launches = collections.Counter(), 0

    def read(self, what):
        """Counts a read where this package, or else `generate`, has caused it."""
        frame, innermost = sys._getframe(1), None
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if "hf_genarm" in path.parts:
                place = (f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}", what, innermost)
                is_ours = path.name != "instance_patch.py" and frame.f_code.co_name not in ("_generate", "_prepare")
                self.reads[place if is_ours else ("generate", what, innermost)] += 1
                return
            if innermost is None and "transformers" in path.parts:
                innermost = f"{path.name}:{frame.f_lineno}"
            frame = frame.f_back
        self.reads["generate", what, innermost] += 1

    def __sub__(self, other):
        difference = Counts()
        difference.reads = self.reads.copy()
        difference.reads.subtract(other.reads)
        difference.launches = self.launches - other.launches
        return difference

    def ours(self):
        """The reads by this package, its models' passes included, by line of code."""
        return {key: n for key, n in self.reads.items() if key[0] != "generate"}


COUNTS: list[Counts] = []


@contextlib.contextmanager
def counting():
    """Inside of it, a [`Counts`] counts."""
    counts = Counts()
    COUNTS.append(counts)
    try:
        yield counts
    finally:
        COUNTS.remove(counts)


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated device; its numbers are in `values`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.size(), dtype=values.dtype, device=DEVICE, **layout)
        tensor.values_on_cpu = values.detach()
        return tensor

    def tolist(self):
        return self.cpu().tolist()

    def untyped_storage(self):
        return self.values_on_cpu.untyped_storage()

    def data_ptr(self):
        return self.values_on_cpu.data_ptr()

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), SimulatedTensor(self.values_on_cpu.clone()))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class SimulatedDevice(TorchDispatchMode):
    """Inside of it, `.to(DEVICE)` and `device=DEVICE` work."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=DEVICE)` makes a copy of one on the CPU
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def put(*models):
    """Moves models to the device in place; weights that they share stay shared, as those of adapters on a base."""
    made = {}
    for part in (part for model in models for part in model.modules()):
        for own in (part._parameters, part._buffers):
            for name, x in own.items():
                if x is not None and not isinstance(x, SimulatedTensor):
                    new = SimulatedTensor(x.data)
                    new = torch.nn.Parameter(new, requires_grad=False) if own is part._parameters else new
                    own[name] = made.setdefault(id(x), (new, x))[0]


def _run(func, args, kwargs):
    name = func._schema.name.split("::")[1]
    flat = tree_flatten((args, kwargs))[0]
    ours = [x for x in flat if isinstance(x, SimulatedTensor)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target).type
    if not ours and target != NAME:
        return func(*args, **kwargs)
    others = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, SimulatedTensor) and x.ndim > 0]
    if ours and others and name not in _COPIES | _INDEXING:
        raise RuntimeError(f"Expected all tensors to be on the same device, but `{name}` has {DEVICE} and cpu.")
    if COUNTS:
        what = _why_the_host_waits(name, args, kwargs, target, bool(others))
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        for counts in COUNTS:
            if what is not None:
                counts.read(what)
            if name not in _NO_KERNEL and not is_view and what != "copy":
                counts.launches += _KERNELS.get(name, 1)
    given = {id(x.values_on_cpu): x for x in ours}
    args, kwargs = tree_map(lambda x: x.values_on_cpu if isinstance(x, SimulatedTensor) else x, (args, kwargs))
    if target == NAME:
        kwargs["device"] = "cpu"
    output = func(*args, **kwargs)
    if name == "_to_copy" and target == "cpu":
        return output.clone()
    if name == "copy_" and id(output) not in given:
        return output

    def wrapped(x):
        return given.get(id(x), SimulatedTensor(x)) if type(x) is torch.Tensor else x

    return tree_map(wrapped, output)


def _why_the_host_waits(name, args, kwargs, target, has_others):
    """Why the host would wait for a CUDA device in this operation; `None` if it wouldn't."""
    if name == "_local_scalar_dense" or name in _OF_UNKNOWN_SIZE:
        return name
    if name == "equal":
        one, other = args
        is_same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
        return None if one.shape != other.shape or is_same else name
    if name in _INDEXING:
        indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
        is_scalar = name != "index" and isinstance(args[2], torch.Tensor) and args[2].numel() == 1
        if any(x.dtype == torch.bool for x in indices) and not is_scalar:
            return "indexing by a mask"
        return "indices on the CPU" if has_others else None
    if name not in _COPIES:
        return None
    source = args[0] if name == "_to_copy" else args[1]
    goes = target if name == "_to_copy" else (NAME if isinstance(args[0], SimulatedTensor) else "cpu")
    is_across = goes is not None and isinstance(source, SimulatedTensor) != (goes == NAME)
    is_waited_for = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    return "copy" if is_across and is_waited_for and source.numel() else None


_attention = torch.nn.functional.scaled_dot_product_attention


def _simulated_attention(query, key, value, attn_mask=None, **options):
    """One kernel, as on CUDA, and three more where a boolean mask is turned into numbers."""
    if not isinstance(query, SimulatedTensor):
        return _attention(query, key, value, attn_mask=attn_mask, **options)
    for counts in COUNTS:
        counts.launches += 1 if attn_mask is None else 4
    with _disable_current_modes():
        mask = None if attn_mask is None else attn_mask.values_on_cpu
        output = _attention(*(x.values_on_cpu for x in (query, key, value)), attn_mask=mask, **options)
    return SimulatedTensor(output.contiguous())


torch.nn.functional.scaled_dot_product_attention = _simulated_attention
