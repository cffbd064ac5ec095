"""Activation checkpointing (arXiv 1604.06174): blocks keep their inputs only, and run again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from segcore.errors import UserError
from segcore.models.segmentor import Segmentor


def checkpoint_activations(model: Segmentor) -> int:
    """Checkpoint the activations of the model's `recomputed_blocks`; return how many there are.

    Losses, gradients, random draws and running statistics stay the same. Raises UserError for a model that names none.
    """
    blocks = model.recomputed_blocks()
    if not blocks:
        raise UserError(
            f"train.checkpoint_activations: {type(model).__name__} names no blocks; "
            "set it to False, or write the model's `recomputed_blocks`"
        )
    for block in blocks:
        block.forward = partial(_forward, block, block.forward)
    return len(blocks)


def _forward(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts = lambda: (contextlib.nullcontext(), _buffers_kept(block))  # noqa: E731
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextlib.contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    """Let the second pass update copies of the running statistics: the first pass has updated them already."""
    own = [(module, *item) for module in block.modules() for item in module.named_buffers(recurse=False)]
    for module, name, buffer in own:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in own:
            setattr(module, name, buffer)
