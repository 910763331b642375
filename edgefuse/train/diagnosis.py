"""Which layer made a loss that is no number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def culprit(network: nn.Module, again: Callable[[], object]) -> str:
    """The first layer whose answer is not finite though what it was given is; of the same pass once more, with hooks.

    Layers inside a layer answer before it, so that the innermost is named. Where all answers are finite, it is the layer whose
    gradient is not that stands nearest to the loss; where these are finite too, it is no layer.
    """
    found: list[str] = []
    order: list[str] = []
    handles = [module.register_forward_hook(_watch(name, found, order)) for name, module in network.named_modules() if name]
    with torch.enable_grad():  # as in the step: some losses keep what they compare only there
        again()
    _remove(handles)
    if found:
        return f"{_named(network, found[0])} made it, whose answer is not finite though what it was given is"
    for name in reversed(order):
        if any(not _finite(p.grad) for p in network.get_submodule(name).parameters(recurse=False)):
            return f"every layer's answer is finite, but not the gradient of {_named(network, name)}"
    return "every layer's answer is finite"


def _watch(name: str, found: list[str], order: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, inputs: object, output: object) -> None:
        order.append(name)
        if not found and _finite(inputs) and not _finite(output):
            found.append(name)

    return hook


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _named(network: nn.Module, name: str) -> str:
    module = network.get_submodule(name)
    broken = [each for each, tensor in module.named_parameters() if not _finite(tensor)]
    of_what = f", its {broken[0]} not finite either" if broken else ""
    return f"{name} ({type(module).__name__}{of_what})"


def _finite(values: object) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(values) if tensor.is_floating_point())


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
