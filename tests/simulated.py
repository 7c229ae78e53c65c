"""A simulated accelerator: tensors of the CPU that report another device, and can't be combined with others."""

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "simulated"
DEVICE = f"{NAME}:0"
_COPIES = {"_to_copy", "copy_"}


class _Backend(backend_registration._DummyBackendModule):
    def device_count(self):
        return 1

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())


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


def _run(func, args, kwargs):
    name = func._schema.name.split("::")[1]
    flat = tree_flatten((args, kwargs))[0]
    ours = [x for x in flat if isinstance(x, SimulatedTensor)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target).type
    if not ours and target != NAME:
        return func(*args, **kwargs)
    others = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, SimulatedTensor) and x.ndim > 0]
    if ours and others and name not in _COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device, but `{name}` has {DEVICE} and cpu.")
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
