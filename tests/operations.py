"""What a model makes PyTorch do: which operations run, and whether one of them makes the host wait for its device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Operations(TorchDispatchMode):
    """Collects the names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


class NoHostWaits(TorchDispatchMode):
    """Fails on operations that make a host wait for its device: reading values, sizes that depend on them, uploads."""

    aten = torch.ops.aten
    waiting = (
        aten._local_scalar_dense,
        aten.nonzero,
        aten.masked_select,
        aten._unique2,
        aten.is_nonzero,
        aten.equal,
        aten.repeat_interleave,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        assert packet not in self.waiting or not tensors, f"{func} waits"
        by_mask = packet in (self.aten.index, self.aten.index_put, self.aten.index_put_)
        assert not by_mask or all(tensor.dtype != torch.bool for tensor in tensors[1:]), f"{func} waits"
        result = func(*args, **kwargs)
        if packet in (self.aten._to_copy, self.aten.copy_):
            assert {tensor.device for tensor in tensors} == {result.device}, f"{func} moves data"
        return result


def refuse_uploads(monkeypatch):
    """Refuse tensors made of Python numbers: they reach a device by a copy that waits."""

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor made of Python numbers would be uploaded")

    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
        monkeypatch.setattr(owner, name, refuse)
