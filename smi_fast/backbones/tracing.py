"""torch.fx traces timm's own forward pass of an accelerated model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models import vision_transformer as timm_vit
from torch import nn


def trace_as_timms(model: nn.Module, x: torch.fx.Proxy, options: dict[str, Any]) -> dict[str, Any]:
    """Give the graph the inputs of timm's forward, with their types, which torch.jit.script reads.

    torch.fx has made an input of every argument of our forward. What timm's does not take is removed, so that the graph
    cannot ignore it. Return the options that are no inputs of the graph.
    """
    if x.tracer.root is not model:
        return options
    types = timm_vit.VisionTransformer.forward.__annotations__
    for node in x.node.graph.nodes:
        if node.target in types:
            node.type = types[node.target]
        elif node.target in options:
            x.node.graph.erase_node(node)
    return {name: value for name, value in options.items() if not isinstance(value, torch.fx.Proxy)}


@contextmanager
def leaf_functions(tracer: torch.fx.Tracer) -> Iterator[None]:
    """Keep the functions that a tracer does not look into as calls in its graph, also where timm's forward calls them.

    torch.fx looks for them only where the forward of the traced model is defined, which is ours.
    """

    def leaf(function: Callable) -> Callable:
        return lambda *args, **kwargs: tracer.create_proxy("call_function", function, args, kwargs)

    names = vars(timm_vit)
    functions = {name: value for name, value in names.items() if id(value) in tracer._autowrap_function_ids}
    names.update({name: leaf(function) for name, function in functions.items()})
    try:
        yield
    finally:
        names.update(functions)
