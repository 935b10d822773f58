"""Ranks: the only module beside ``backward`` that touches torch.distributed.

One process per rank, started by torchrun. With one process every function here is the identity.
"""

# N ranks, K rows, P columns

from __future__ import annotations

import datetime
import os
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor

Value = TypeVar("Value")
TIMEOUT_S = 600
SAME_WORDS_S = 5  # how long a failed rank waits for rank 0 to fail with the same message
_FAILURE = "mtl/failure"
_store: Any = None  # keys and values that all ranks see, from setup on


def launched() -> bool:
    """True under torchrun (also with a single rank)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Rank of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """Number of ranks; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Rank on this machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def attempt() -> int:
    """How often torchrun has restarted the group."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def setup(device: torch.device) -> None:
    """Join the group: NCCL on CUDA, gloo elsewhere.

    Every attempt has its own key prefix in the store: with the stock rendezvous a restarted group
    reads addresses of the dead attempt and fails to connect in about half of the restarts.
    """
    if world() == 1 or td.is_initialized():
        return
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world(),
        is_master=rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timeout,
    )
    global _store
    prefix = f"{os.environ.get('TORCHELASTIC_RUN_ID', 'mtl')}/{attempt()}"
    _store = torch.distributed.PrefixStore(prefix, store)  # type: ignore[attr-defined]
    td.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_store,
        rank=rank(),
        world_size=world(),
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )


def shutdown() -> None:
    """Leave the group together: without the barrier a slower rank aborts after its work is done."""
    if td.is_initialized():
        td.barrier()
        td.destroy_process_group()


def abandon() -> None:
    """Leave the group after a failure, without waiting for the others."""
    if td.is_initialized():
        td.destroy_process_group()


def said_elsewhere(failure: str) -> bool:
    """True if another rank reports the same failure, so that one line on the screen is enough.

    Before :func:`setup` it is the first rank of the machine, after it rank 0. A rank that fails
    alone waits a moment for rank 0, then says it.
    """
    if _store is None:
        return local_rank() > 0
    if rank() == 0:
        _store.set(_FAILURE, failure)
        return False
    try:
        _store.wait([_FAILURE], datetime.timedelta(seconds=SAME_WORDS_S))
        return bool(_store.get(_FAILURE).decode() == failure)
    except RuntimeError:  # rank 0 is well, or gone
        return False


def lost_peer(error: BaseException) -> bool:
    """True if a collective failed because another rank is gone."""
    text = str(error)
    signs = ("gloo", "NCCL", "Connection closed", "Connection reset", "connectFullMesh")
    return world() > 1 and isinstance(error, RuntimeError) and any(s in text for s in signs)


def group_name() -> str:
    """Names this launch of torchrun: equal for all its restarts, different for the next launch."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', 'none')}-{os.getppid()}"


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        td.barrier()


def sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if world() > 1:
        td.all_reduce(tensor)
    return tensor


def sum_on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """Sum of a CPU tensor over ranks, by way of ``device``; one rank touches no device at all."""
    return tensor if world() == 1 else sum_(tensor.to(device)).cpu()


def broadcast(value: Value) -> Value:
    """Return rank 0's value on every rank (plain Python values)."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def gather(value: Value) -> list[Value]:
    """Return the values of all ranks, in rank order, on every rank."""
    if world() == 1:
        return [value]
    box: list[Any] = [None] * world()
    td.all_gather_object(box, value)
    return box


def sum_lists_(tensors: list[Tensor], bucket_bytes: int = 32 << 20) -> None:
    """Sum many tensors over ranks in place, in flat buckets."""
    if world() == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= bucket_bytes:
            _sum_bucket_(bucket)
            bucket, size = [], 0
    if bucket:
        _sum_bucket_(bucket)


def _sum_bucket_(bucket: list[Tensor]) -> None:
    flat = torch.cat([t.flatten() for t in bucket])
    td.all_reduce(flat)
    pieces = torch.split(flat, [t.numel() for t in bucket])
    torch._foreach_copy_(bucket, [p.view_as(t) for p, t in zip(pieces, bucket, strict=True)])


def scatter_rows(rows: list[Tensor]) -> Tensor:
    """Sum K flat rows over ranks; every rank keeps its own slice of the columns.

    Args:
        rows: K tensors [P] of this rank.

    Returns:
        [K, ceil(P/N)], zero-padded at the end.
    """
    n = world()
    columns = rows[0].numel()
    width = -(-columns // n)
    padded = rows[0].new_zeros(n, len(rows), width)  # destination rank first
    for k, row in enumerate(rows):
        padded_row = torch.nn.functional.pad(row, (0, n * width - columns))
        padded[:, k] = padded_row.view(n, width)
    out = rows[0].new_empty(len(rows), width)
    td.reduce_scatter_tensor(out, padded.view(n * len(rows), width))
    return out


def gather_columns(piece: Tensor, columns: int) -> Tensor:
    """Concatenate the ranks' column slices [ceil(P/N)] to [P]."""
    out = piece.new_empty(world() * piece.numel())
    td.all_gather_into_tensor(out, piece.contiguous())
    return out[:columns]
