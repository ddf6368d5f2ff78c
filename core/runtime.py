"""Ranks, device, process group and seeds. Rank and world size are read here and nowhere else.

One process and many take the same path: a single process talks to `Solo`, which has the answers of a group of one.
"""

import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from core import ending
from core.pulse import Pulse

T = TypeVar("T")

LOST_PEER = re.compile(r"timed? ?out|clos(ed|ing)|reset by peer|refused|monitoredBarrier|clients joined", re.IGNORECASE)
"""What PyTorch's messages say when a rank ended or does not answer; other RuntimeErrors are bugs and keep their traceback."""
TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
LONGEST_S = 10**9  # thirty years; what is longer overflows
ENDING_S = 1.0  # the connections of a process that is killed break before it counts as ended
SILENCE_S = 10.0  # ranks reach a collective, and so give up waiting, at different moments


class Comm(Protocol):
    """What may be asked of any group of processes. A trailing underscore works in place; all tensors have one shape."""

    rank: int
    """Of this process within the group."""
    size: int

    def sum_(self, tensor: Tensor) -> Tensor: ...
    def max_(self, tensor: Tensor) -> Tensor: ...
    def broadcast_(self, tensor: Tensor) -> Tensor: ...
    def all_gather(self, tensor: Tensor) -> Tensor: ...


class WorldComm(Comm, Protocol):
    """What may be asked of all processes of the job together."""

    def barrier(self) -> None: ...
    def gather_objects(self, value: Any) -> list[Any]: ...
    def counter(self) -> Callable[[], int]: ...


class Solo:
    """A group of one."""

    rank, size = 0, 1

    def barrier(self) -> None:
        pass

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def counter(self) -> Callable[[], int]:
        return itertools.count().__next__


class Group:
    """Some processes of the job: NCCL for tensors on GPUs, gloo for tensors on CPU.

    A rank that ended or does not answer within the time-out is a ConnectionError on the others.
    """

    def __init__(self, timeout: timedelta, group: dist.ProcessGroup | None = None) -> None:
        self.timeout, self._group = timeout, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def sum_(self, tensor: Tensor) -> Tensor:
        with _lost_peer("a sum", self.timeout):
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self._group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        with _lost_peer("a maximum", self.timeout):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """From the group's rank 0."""
        with _lost_peer("a broadcast", self.timeout):
            dist.broadcast(tensor, group_src=0, group=self._group)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[size, ...]: the tensors of all ranks in order of rank."""
        every = list(tensor.new_empty(self.size, *tensor.shape))
        with _lost_peer("a gathering", self.timeout):
            dist.all_gather(every, tensor.contiguous(), group=self._group)
        return torch.stack(every)


class World(Group):
    """All processes of the job; objects and barriers go through gloo."""

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(timeout)
        self._counters = itertools.count()
        self._cpu = dist.new_group(backend="gloo", timeout=timeout)
        store = dist.distributed_c10d._get_default_store()
        self._pulse = Pulse(store, self.rank, self.size, timeout.total_seconds())
        ending.also_say = self._ended

    def _ended(self) -> str:
        """The ranks on this machine that ended, for the end of a message."""
        ended = self._pulse.ended_ranks()
        return f" (rank(s) {', '.join(map(str, ended))} ended, were killed or froze)" if ended else ""

    def leave(self, in_order: bool) -> None:
        """No signs of life from here on; `in_order` says that the others do not need this process any more."""
        ending.also_say = str
        self._pulse.stop(in_order)

    def barrier(self) -> None:
        with _lost_peer("a barrier", self.timeout):
            # On rank 0 the error lists all ranks that did not come.
            dist.monitored_barrier(self._cpu, timeout=self.timeout, wait_all_ranks=True)

    def gather_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with _lost_peer("gathering", self.timeout):
            dist.all_gather_object(values, value, group=self._cpu)
        return values

    def counter(self) -> Callable[[], int]:
        # The store behind the first meeting, of which PyTorch has no public name. Ranks open counters in the same order.
        store = dist.distributed_c10d._get_default_store()
        key = f"counter-{next(self._counters)}"

        def take() -> int:
            with _lost_peer("handing out work", self.timeout):
                return int(store.add(key, 1)) - 1

        return take


@contextmanager
def _lost_peer(what: str, timeout: timedelta) -> Iterator[None]:
    """Say in one line which collective failed, where the reason is a rank that ended or does not answer."""
    try:
        yield
    except RuntimeError as error:
        if not LOST_PEER.search(str(error)):
            raise
        reason = re.sub(r"\S*/gloo/\S+ ", "", str(error).splitlines()[0])
        seconds = timeout.total_seconds()
        until = time.monotonic() + ENDING_S
        while not (names := ending.also_say()) and time.monotonic() < until:
            time.sleep(0.1)
        if not names and TIMED_OUT.search(reason) and (silent := _silent_ranks(min(SILENCE_S, seconds))):
            names = f" (no sign of rank(s) {', '.join(map(str, silent))})"
        raise ConnectionError(
            f"{what} between the processes of this job failed: {reason}; a rank ended (see its own message) or did not answer "
            f"within --timeout-s {seconds:g}{names}"
        ) from error


def _silent_ranks(within: float) -> list[int]:
    """The ranks that do not say, `within` so many seconds, that they too have waited in vain: those that all wait for."""
    if not dist.is_initialized():  # the first meeting itself failed
        return []
    store, everyone = dist.distributed_c10d._get_default_store(), range(dist.get_world_size())
    store.set(f"waited in vain: {dist.get_rank()}", "")
    until = time.monotonic() + within
    while silent := [rank for rank in everyone if not store.check([f"waited in vain: {rank}"])]:
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    return silent


class Mesh(NamedTuple):
    """The ranks as a grid. Those of a `data` group hold the same latents and read different rows; those of a `latent` group,
    neighbours in rank, hold different latents and read the same rows.
    """

    data: Comm
    latent: Comm


@dataclass(frozen=True)
class Runtime:
    """Where this process stands: its rank among `world_size`, its device, and the group it talks to."""

    rank: int
    world_size: int
    device: torch.device
    comm: WorldComm
    _meshes: dict[int, Mesh] = field(default_factory=dict, compare=False, repr=False)

    def mesh(self, latent_size: int) -> Mesh:
        """The grid with `latent_size` ranks in a latent group; all ranks call it. ValueError where they do not fill it."""
        if latent_size not in self._meshes:
            self._meshes[latent_size] = self._new_mesh(latent_size)
        return self._meshes[latent_size]

    def _new_mesh(self, latent_size: int) -> Mesh:
        if latent_size < 1 or self.world_size % latent_size:
            raise ValueError(f"--latent-parallel must divide the number of processes, {self.world_size}; found {latent_size}")
        if not isinstance(self.comm, World):
            return Mesh(Solo(), Solo())
        shape = (self.world_size // latent_size, latent_size)
        grid = init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "latent"))
        groups = [grid.get_group(name) for name in ("data", "latent")]
        for group in groups:
            _set_pg_timeout(self.comm.timeout, group)
        return Mesh(*(Group(self.comm.timeout, group) for group in groups))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks; after the time-out, an error names those that did not come."""
        self.comm.barrier()

    def gather_objects(self, value: Any) -> list[Any]:
        """Each rank's `value`, in order of rank, on every rank."""
        return self.comm.gather_objects(value)

    def on_main(self, act: Callable[[], T]) -> T:
        """Run `act` on rank 0 alone. Every rank gets its result, or raises its ValueError or OSError: none is left waiting."""
        value: T | None = None
        failure: Exception | None = None
        if self.is_main:
            try:
                value = act()
            except (ValueError, OSError) as error:
                failure = error
        value, failure = self.gather_objects((value, failure))[0]
        if failure is not None:
            raise failure
        return cast(T, value)

    def share(self, n_items: int) -> range:
        """The items, of `n_items`, that fall to this rank: i belongs to rank i mod world size."""
        return range(self.rank, n_items, self.world_size)

    def hand_out(self, n_items: int) -> Iterator[int]:
        """The items, of `n_items`, that this rank takes: each goes to the rank that asks next, so a fast rank takes more.

        Every rank calls this at the same place; together they take every item once, each rank in rising order.
        """
        take = self.comm.counter()
        return itertools.takewhile(lambda item: item < n_items, iter(take, None))


def environment_rank() -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun sets them; (0, 0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name: str, local_rank: int, world_size: int = 1) -> torch.device:
    """`auto` is this rank's GPU where there is one, else the CPU. ValueError where a GPU is asked for and there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    asked = re.fullmatch(r"cuda(?::(\d+))?", name)
    if asked is None:
        raise ValueError(f"--device {name!r}: expected auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no GPU is visible to PyTorch; use --device cpu, or install a CUDA build of torch")
    if asked[1] and world_size > 1:
        raise ValueError(f"--device {name}: all {world_size} ranks would share one GPU; use --device cuda")
    index, visible = int(asked[1] or local_rank), torch.cuda.device_count()
    if index >= visible:
        remedy = "choose a lower number" if asked[1] else "lower --nproc_per_node"
        raise ValueError(f"--device {name}: GPU {index} is needed, but only {visible} are visible; {remedy}")
    return torch.device("cuda", index)


def unit_generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """Randomness for one unit of work, the same on whichever rank does it."""
    digest = xxhash.xxh3_64_intdigest(f"{purpose} {number}".encode(), seed=seed)
    return torch.Generator().manual_seed(digest >> 1)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def open_runtime(device: str = "auto", threads: int = 0, seed: int = 0, timeout_s: float = 600.0) -> Iterator[Runtime]:
    """Join the process group that torchrun announces (or none), pick the device, set threads and seeds; leave it at the end.

    `threads` 0 keeps PyTorch's own choice; `timeout_s` bounds every collective, in seconds.
    """
    if threads < 0:
        raise ValueError(f"--threads must be 0 (PyTorch's choice) or more; found {threads}")
    if not 0 < timeout_s <= LONGEST_S:
        raise ValueError(f"--timeout-s must be more than 0, at most {LONGEST_S:,}; found {timeout_s}")
    rank, local_rank, world_size = environment_rank()
    place = pick_device(device, local_rank, world_size)
    if threads:
        torch.set_num_threads(threads)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    seed_everything(seed)
    if world_size == 1:
        yield Runtime(0, 1, place, Solo())
        return
    timeout = timedelta(seconds=timeout_s)
    with _lost_peer("the first meeting", timeout):
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=timeout)
    world = World(timeout)
    try:
        yield Runtime(rank, world_size, place, world)
    except BaseException:
        world.leave(in_order=False)
        raise
    world.leave(in_order=True)
    # After an error this line is not reached: leaving politely would wait for peers that are inside a collective, whereas the
    # end of the process breaks their connection and ends them too.
    dist.destroy_process_group()
