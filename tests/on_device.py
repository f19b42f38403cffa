"""Operators of a GPU under the operator cases, which hold CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class OnDevice:
    """The operator set ``ops`` for CPU tensors: storages go to the GPU, whole, with their red
    zones, and come back; a result is the tensor that was given for it, or a copy."""

    def __init__(self, ops: Any, device: str = "cuda") -> None:
        self.ops, self.device = ops, device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            moved: dict[int, tuple[Tensor, Tensor]] = {}

            def there(x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                storage = x.untyped_storage()
                if storage.data_ptr() not in moved:
                    whole = torch.empty(0, dtype=x.dtype).set_(storage)
                    moved[storage.data_ptr()] = whole, whole.to(self.device, copy=True)
                far = moved[storage.data_ptr()][1]
                return far.as_strided(x.shape, x.stride(), x.storage_offset())

            def back(x: Any) -> Any:
                if isinstance(x, tuple):
                    return tuple(map(back, x))
                if not isinstance(x, Tensor):
                    return x
                for near, far in moved.values():
                    if far.data_ptr() == x.untyped_storage().data_ptr():
                        return near.as_strided(x.shape, x.stride(), x.storage_offset())
                return x.cpu()

            result = getattr(self.ops, name)(
                *map(there, args), **{k: there(v) for k, v in kwargs.items()}
            )
            for near, far in moved.values():
                near.copy_(far)
            return back(result)

        return call
