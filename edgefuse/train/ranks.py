"""Many processes that train one network, on one machine or on several: those that `torchrun` has started.

`torchrun` says in the environment how many there are and which of them this one is; without it there is one. They exchange
gradients with gloo on CPUs and with nccl on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor

from edgefuse.errors import EdgefuseError

PATIENCE = timedelta(days=2)  # while the first process computes features; torchrun itself ends all where one fails
LOST = "Connection closed by peer", "Connection reset by peer", "remote process exited"  # as gloo and nccl say it
TURNS = 3  # the first process of all, then the first of every machine, then the others


def rank() -> int:
    """Which process this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def say(line: str) -> None:
    """Print a line of progress, once and not in every process."""
    if is_first():
        print(line, flush=True)  # noqa: T201 - progress is what a function of this name is for


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes inside the block; behind it each is alone, and no collective can hang."""
    if world() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    except (RuntimeError, torch.distributed.DistError) as error:
        if any(sign in str(error) for sign in LOST):
            raise EdgefuseError(
                f"Process {rank()} of {world()} has lost another one.", hint="What ended it is told by that one, above or below."
            ) from error
        raise
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def in_turn() -> Iterator[None]:
    """Let the first process of all go through the block, then the first of every machine, then all others.

    What the first writes the others find; where machines share no disk, the first of each writes it once more.
    """
    turn = 0 if is_first() else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    for _ in range(turn):
        _wait()
    yield
    for _ in range(turn, TURNS - 1):
        _wait()


def summed(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def _wait() -> None:
    summed(torch.zeros(1))  # on CPUs, so that no GPU is kept busy for hours
