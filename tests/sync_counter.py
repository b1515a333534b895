"""Counts where a computation waits for the device or for the host. Needs no GPU: the device "meta" plays one.

Example::

    with DeviceTraffic() as traffic:
        loss = model(views)                 # model and views on the device "meta", or on "cuda"
        loss.backward()
    assert not traffic.blocking, traffic.blocking
"""
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = str(Path(__file__).resolve().parent.parent)
COPIES = ("_to_copy", "copy_", "_copy_from", "_copy_from_and_resize")
MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
# Their results have no size, or are no tensors, before the device has answered. `index` and `index_put_`
# belong to them with a bool mask only; torch.Tag knows the rest.
DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
ALSO_WAIT = ("_linalg_check_errors",)


class DeviceTraffic(TorchDispatchMode):
    """What passed between the host and the device inside the `with`; each entry names our line and the call.

      to_device   copies from the host for which the host waits: `.to(device)`, tensors made of Python numbers
                  or of numpy, lists and host tensors as an index
      queued      copies from the host with non_blocking=True: no wait (where the memory is pinned)
      to_host     copies back: `.cpu()`, `.tolist()`, `float(x)`, `if x:`, an index that is one device number
      waits       calls whose result depends on values: nonzero, masked_select, unique, equal, an index with
                  a bool mask, the error check of a solver
      blocking    to_device, to_host and waits together

    The device is any but the CPU. With "meta" nothing is computed: reading one value gives 1, or True, and a
    copy to the host gives zeros, so a whole training step runs. A call in `waits` raises after it is counted,
    as its result cannot be known. What a backward pass does is counted too, a CPU-only step counts nothing.
    """

    def __init__(self):
        super().__init__()
        self.to_device = []
        self.queued = []
        self.to_host = []
        self.waits = []
        self._hidden = _HiddenCopies(self)

    @property
    def blocking(self):
        return self.to_device + self.to_host + self.waits

    def __enter__(self):
        self._hidden.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._hidden.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        on_device = [x for x in _tensors((args, kwargs)) if x.device.type != "cpu"]
        if name in COPIES:
            source, target = _ends_of_copy(name, args, kwargs)
            if source.device.type == "cpu" and target.type != "cpu":
                is_queued = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
                (self.queued if is_queued else self.to_device).append(_where(name))
            elif source.device.type != "cpu" and target.type == "cpu":
                self.to_host.append(_where(name))
                if source.is_meta:
                    zeros = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
                    return args[0].copy_(zeros) if name == "copy_" else zeros
        elif not on_device:
            pass
        elif name == "_local_scalar_dense":
            self.to_host.append(_where(name))
            if on_device[0].is_meta:
                return torch.ones((), dtype=on_device[0].dtype).item()
        elif name.startswith(("index", "_index_put", "_unsafe_index")):
            indices = _tensors(args[1]) if isinstance(args[1], (list, tuple)) else []
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.waits.append(_where(f"{name} with a mask"))
            if any(index.device.type == "cpu" for index in indices):
                self.to_device.append(_where(f"{name} with an index on the host"))
        elif DATA_DEPENDENT & set(function.tags) or name in ALSO_WAIT:
            self.waits.append(_where(name))
        return function(*args, **kwargs)


class _HiddenCopies(TorchFunctionMode):
    """torch copies the numbers of a list by itself, where no dispatch mode sees it."""

    def __init__(self, traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = len(self.traffic.to_device)
        result = function(*args, **kwargs)
        if len(self.traffic.to_device) > before:  # the dispatch mode has seen it
            return result
        if function in MAKERS and result.device.type != "cpu":
            given = args[-1] if args else kwargs.get("data")
            if not (isinstance(given, torch.Tensor) and given.device == result.device):
                self.traffic.to_device.append(_where(function.__name__))
        elif function in INDEXING and args[0].device.type != "cpu":
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, (list, range)) or type(part).__module__ == "numpy" for part in parts):
                self.traffic.to_device.append(_where("a list as an index"))
        return result


def _tensors(values):
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def _ends_of_copy(name, args, kwargs):
    """The tensor that is copied, and the device that it is copied to."""
    if name == "_to_copy":
        return args[0], torch.device(kwargs.get("device") or args[0].device)
    return (args[1], args[0].device) if name == "copy_" else (args[0], args[1].device)


def _where(name):
    """The innermost line of ours, and the call."""
    frame = sys._getframe()
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and "site-packages" not in file and file != __file__:
            return f"{Path(file).name}:{frame.f_lineno} {name}"
        frame = frame.f_back
    return name
