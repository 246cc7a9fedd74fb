"""One process per device: the collectives of a mesh by raw calls of `torch.distributed` groups.

The job is started by the first mesh, never by an import. Every group has a name made from its
members, so that processes which hold different sub-meshes still agree on the names of the groups
that they share. Groups keep torch's order of members, by rank; positions over `axes` may run in
another order, and then the copy that is made anyway puts the blocks in place. Nothing is sent for
a group of one.

Gloo and NCCL know f64, f32, bf16, f16, i64, i32, i8 and u8. Every other dtype travels as bytes,
which is exact for all moves. A bool is summed as a maximum of bytes: True + True is True.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous
from torch.utils._python_dispatch import _disable_current_modes

from .errors import MeshError
from .simulated import SimulatedTransport
from .traced import watched
from .transport import Axes, Finish, ReduceOp, Shards, Transport
from .wire import Group as _Group
from .wire import described as _type
from .wire import join as _join
from .wire import reduce_op as _reduce_op
from .wire import stack as _stack
from .wire import summand as _summand
from .wire import wire as _wire

# All that torch calls private; tests/processes fails loudly when a release changes one of them.
_new_group: Callable[..., Any] = c10d._new_process_group_helper  # new_group, under our own name
_default_store: Callable[[], c10d.Store] = c10d._get_default_store
_group_ranks: dict[dist.ProcessGroup, dict[int, int]] = c10d._world.pg_group_ranks
_all_gather: Callable[..., Any] = dist.ProcessGroup._allgather_base
_reduce_scatter: Callable[..., Any] = dist.ProcessGroup._reduce_scatter_base
_watchers: Callable[[], int] = torch._C._len_torch_dispatch_stack

_TEXT_BYTES = 256  # size of the description that ranks exchange before a checked collective


@dataclass(frozen=True)
class Job:
    """This process's part in the job.

    Attributes:
        rank: number of this process in the job.
        size: number of processes.
        device: where this process keeps its shards.
        attempt: which start of the job this is; never the same twice in one process.
        backend: "gloo", "nccl", or what the user's own init_process_group named.
    """

    rank: int
    size: int
    device: torch.device
    attempt: str
    backend: str


class _Session(NamedTuple):
    job: Job
    world: object
    is_ours: bool  # not one that the user initialised


_session: _Session | None = None
_starts = itertools.count()
_held: list[dict[Axes, _Group | None]] = []  # the groups of every transport, for `shutdown`
_names: set[str] = set()  # by which graphs find groups


def job(device: str | torch.device | None = None) -> Job:
    """The `torch.distributed` job of this process, started by the first call.

    A job that the user has initialised is used as it is. Otherwise: NCCL on cuda:LOCAL_RANK if
    there is a GPU, else Gloo; a timeout of SHARDWISE_TIMEOUT seconds (600) on every group; loopback
    only, where all processes are on one machine; a store prefix per attempt, so that a restarted
    job never reads the keys of the one that died. The process then leaves the job at exit, and an
    exception that nobody caught ends it at once, which the others notice within a second.

    Args:
        device: where shards live; None takes the GPU if there is one. Only the first call chooses.

    Raises:
        MeshError: the process was not started by a launcher, or the job runs on another device.
    """
    global _session
    world = dist.group.WORLD if dist.is_initialized() else None
    if _session is None or _session.world is not world:
        _session = _start(device) if world is None else _adopt(device)
        atexit.unregister(shutdown)
        atexit.register(shutdown)
    found = _session.job
    if device is not None:
        want = torch.device(device)
        if want.type != found.device.type or want.index not in (None, found.device.index):
            raise MeshError(f"this job runs on {found.device}, not {want}; its first mesh chose")
    return found


def shutdown() -> None:
    """Leave the job, without a barrier; harmless where there is none. Runs by itself at exit.

    Meshes made before are dead. A job that the user initialised is the user's to destroy; then this
    only lets go of its groups.
    """
    global _session
    if _session is None:
        return
    is_ours, _session = _session.is_ours, None
    # A group joins its threads when its last reference goes. Later than this, Python is being torn
    # down, and a thread that then asks for the interpreter's lock aborts the process.
    _process_group.cache_clear()
    if dist.is_initialized():  # else torch has forgotten them already
        for name in _names:
            _unregister_process_group(name)  # pyright: ignore[reportArgumentType]
    _names.clear()
    for groups in _held:
        groups.clear()
    _held.clear()
    if is_ours and dist.is_initialized():
        dist.destroy_process_group()


def _timeout() -> timedelta:
    return timedelta(seconds=float(os.environ.get("SHARDWISE_TIMEOUT", "600")))


def _attempt() -> str:
    return f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.{next(_starts)}"


def _start(device: str | torch.device | None) -> _Session:
    env = os.environ
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise MeshError(
            "a distributed mesh needs one process per device: start this program with "
            'torchrun --nproc-per-node N, or say transport="simulated"'
        )
    where = _place(device, torch.cuda.is_available())
    if where.type == "cuda":
        index = where.index
        if index is None:
            index = int(env.get("LOCAL_RANK", int(env["RANK"]) % torch.cuda.device_count()))
        where = torch.device("cuda", index)
        torch.cuda.set_device(where)
    if _on_one_machine():
        env.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    attempt = _attempt()
    store, rank, size = _meet()
    store = c10d.PrefixStore(f"sw/{env.get('TORCHELASTIC_RUN_ID', 'none')}/{attempt}", store)
    backend = "nccl" if where.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_timeout())
    sys.excepthook = _ending(sys.excepthook)
    world = dist.group.WORLD
    assert world is not None
    _await_members(world, where)
    return _Session(Job(rank, size, where, attempt, backend), world, True)


def _await_members(group: dist.ProcessGroup, device: torch.device) -> None:
    """Return once all members have connected.

    Otherwise one that has nothing to do with the group, and ends, would break the others' start.
    NCCL connects at the first collective, so there is nothing to wait for.
    """
    if device.type == "cpu":
        with _disable_current_modes():  # the group may be first used by a trace
            group.allreduce([torch.zeros(1)]).wait()


@cache
def _meet() -> tuple[c10d.Store, int, int]:
    """The launcher's store, this rank, the number of ranks.

    Once per process: where rank 0 serves the store itself, a second one would need the port that
    the first still holds, and the others could reach either.
    """
    found = next(iter(rendezvous("env://", timeout=_timeout())))
    found[0].set_timeout(_timeout())
    return found


def _adopt(device: str | torch.device | None) -> _Session:
    where = _place(device, torch.cuda.is_available() and "nccl" in dist.get_backend_config())
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    found = Job(dist.get_rank(), dist.get_world_size(), where, _attempt(), dist.get_backend())
    return _Session(found, dist.group.WORLD, False)


def _place(device: str | torch.device | None, prefer_cuda: bool) -> torch.device:
    where = torch.device(device or ("cuda" if prefer_cuda else "cpu"))
    if where.type not in ("cpu", "cuda"):
        raise MeshError(f"a distributed mesh lives on cpu or cuda, not on {where}")
    return where


def _on_one_machine() -> bool:
    env = os.environ
    host = env["MASTER_ADDR"]
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    return loopback or env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]


def _ending(hook: Callable[..., Any]) -> Callable[..., Any]:
    """An excepthook that, inside a job, ends the process once `hook` has printed.

    An orderly exit would keep the peers waiting, and tearing down groups whose peers are still at
    work can abort; closed sockets tell them at once.
    """

    def end(*error: Any) -> None:
        hook(*error)
        if _session is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    return end


@cache
def _process_group(ranks: tuple[int, ...], attempt: str, device: torch.device) -> dist.ProcessGroup:
    """The one group of these ranks, ascending; only its members call this, all of them.

    `dist.new_group(use_local_synchronization=True)` would put into the name how many groups the
    process has, which differs between processes that hold different sub-meshes: they would wait
    for each other under different names. So the name is made from the members alone.
    """
    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == world.size():
        return world
    text = rank_text(ranks)
    name = f"sw/{attempt}/{hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()}"
    # A world bound to its device makes NCCL split it, which all ranks would have to join.
    bound, world.bound_device_id = world.bound_device_id, None
    try:
        group, _ = _new_group(
            len(ranks),
            ranks.index(world.rank()),
            list(ranks),
            dist.get_backend(),
            _default_store(),
            name,
            timeout=_timeout(),
            group_desc=f"ranks {text}",
        )
    finally:
        world.bound_device_id = bound
    _group_ranks[group] = {rank: i for i, rank in enumerate(ranks)}
    _await_members(group, device)
    return group


class DistributedTransport:
    """The shard of this process, of a mesh whose devices are processes of the job.

    Makes one group per axis of size > 1 at once, in axis order, and groups over several axes when
    they are first used; all processes of the mesh have to make it, and call it, in the same order.

    Args:
        axes: axis name to size, major to minor.
        ranks: job rank of each device of the mesh, in its order; this process is one of them.
        device: where the shards are.
        check: compare a description of every collective over the whole mesh before it runs, and
            raise MeshError on all of its processes if any differs. Over the mesh and not the group:
            processes that disagree on the axis do not meet in one group. Costs an all_gather of
            256 bytes per process, each time.
    """

    name: Literal["distributed"] = "distributed"

    def __init__(
        self, axes: Mapping[str, int], ranks: Sequence[int], device: torch.device, check: bool
    ) -> None:
        current = job()
        self.axes = dict(axes)
        self.ranks = tuple(ranks)
        self.device = device
        self.check = check
        self._attempt = current.attempt
        self._me = self.ranks.index(current.rank)
        self._grid = SimulatedTransport(axes)  # its arithmetic of groups
        self._groups: dict[Axes, _Group | None] = {}
        _held.append(self._groups)
        self._serial = 0
        names = ", ".join(f"{name}={size}" for name, size in self.axes.items())
        whole = self.ranks == tuple(range(current.size))
        self.key = names if whole else f"{names} on {','.join(map(str, self.ranks))}"
        for axis in self.axes:
            self._group((axis,))
        if check:
            self._group(tuple(self.axes))

    def process_group(self, axes: Axes) -> dist.ProcessGroup | None:
        """The torch group over `axes`, members by rank; None for a group of one."""
        group = self._group(axes)
        return group and group.pg

    def named_group(self, axes: Axes) -> str:
        """The name by which functional collectives find the group over `axes`.

        It says the axes and not the members or the attempt: the graphs of all ranks and of a
        restarted job are alike, and compiled code is found again.
        """
        group = self._group(axes)
        assert group is not None
        cut = [axis for axis, size in self.axes.items() if axis in axes and size > 1]
        name = f"{'/'.join(cut)} of {self.key}"
        if name not in _names:
            _register_process_group(name, group.pg)  # pyright: ignore[reportArgumentType]
            _names.add(name)
        return name

    def all_reduce(self, shards: Shards, axes: Axes, op: ReduceOp = "sum") -> list[Tensor]:
        if _watchers() and self._group(axes) is not None:
            return watched(self, self.key, "all_reduce", shards, axes, op)
        return self.start_all_reduce(shards, axes, op)()

    def start_all_reduce(self, shards: Shards, axes: Axes, op: ReduceOp = "sum") -> Finish:
        """`all_reduce`, begun."""
        (x,) = shards
        group = self._enter("all_reduce", x, axes, op)
        out = x.clone(memory_format=torch.contiguous_format)
        if group is None:
            return lambda: [out]
        wire, options = _summand(out), dist.AllreduceOptions()
        options.reduceOp = _reduce_op(x, op)
        work = group.pg.allreduce([wire], options)

        def finish() -> list[Tensor]:
            self._finish(work, "all_reduce", axes)
            return [out]

        return finish

    def all_gather(self, shards: Shards, axes: Axes, dim: int) -> list[Tensor]:
        if _watchers() and self._group(axes) is not None:
            return watched(self, self.key, "all_gather", shards, axes, dim)
        return self.start_all_gather(shards, axes, dim)()

    def start_all_gather(self, shards: Shards, axes: Axes, dim: int) -> Finish:
        """`all_gather`, begun."""
        (x,) = shards
        group = self._enter("all_gather", x, axes, f"dim={dim}")
        if group is None:
            return lambda: [x.clone()]
        stack, wire = x.new_empty((group.size, *x.shape)), _wire(x)
        work = _all_gather(group.pg, _wire(stack), wire)

        def finish(_sent: Tensor = wire) -> list[Tensor]:
            self._finish(work, "all_gather", axes)
            return [_join(stack, group, dim)]

        return finish

    def reduce_scatter(self, shards: Shards, axes: Axes, dim: int) -> list[Tensor]:
        if _watchers() and self._group(axes) is not None:
            return watched(self, self.key, "reduce_scatter", shards, axes, dim)
        return self.start_reduce_scatter(shards, axes, dim)()

    def start_reduce_scatter(self, shards: Shards, axes: Axes, dim: int) -> Finish:
        """`reduce_scatter`, begun."""
        (x,) = shards
        group = self._enter("reduce_scatter", x, axes, f"dim={dim}")
        if group is None:
            return lambda: [x.clone()]
        stack = _stack(x, group, dim)
        out = stack.new_empty(stack.shape[1:])
        options = dist.ReduceScatterOptions()
        options.reduceOp = _reduce_op(x, "sum")
        whole, part = _summand(stack).view(-1), _summand(out).view(-1)
        work = _reduce_scatter(group.pg, part, whole, options)

        def finish(_sent: Tensor = whole) -> list[Tensor]:
            self._finish(work, "reduce_scatter", axes)
            return [out]

        return finish

    def all_to_all(
        self, shards: Shards, axes: Axes, split_dim: int, concat_dim: int
    ) -> list[Tensor]:
        if _watchers() and self._group(axes) is not None:
            return watched(self, self.key, "all_to_all", shards, axes, split_dim, concat_dim)
        (x,) = shards
        group = self._enter("all_to_all", x, axes, f"split_dim={split_dim} concat_dim={concat_dim}")
        if group is None:
            return [x.clone()]
        sent = _stack(x, group, split_dim)
        stack = torch.empty_like(sent)
        self._finish(group.pg.alltoall_base(_wire(stack), _wire(sent), [], []), "all_to_all", axes)
        return [_join(stack, group, concat_dim)]

    def permute(self, shards: Shards, axes: Axes, pairs: Sequence[tuple[int, int]]) -> list[Tensor]:
        if _watchers() and self._group(axes) is not None:
            return watched(self, self.key, "permute", shards, axes, pairs)
        (x,) = shards
        source = {t: s for s, t in pairs}
        group = self._enter("permute", x, axes, " ".join(f"{s}>{t}" for s, t in pairs))
        if group is None:
            return [x.clone() if source else torch.zeros_like(x)]
        # One unequal all_to_all: on Gloo it is faster than send and recv, and on NCCL every member
        # takes part, so that one with nothing to send cannot leave the communicator half made.
        targets = [group.order[t] for t, s in source.items() if s == group.position]
        origin = source.get(group.position)
        out = x.new_zeros(x.shape) if origin is None else x.new_empty(x.shape)
        arriving, wire = _wire(out), _wire(x)
        sends, receives = [0] * group.size, [0] * group.size
        for target in targets:
            sends[target] = wire.numel()
        if origin is None:
            arriving = arriving[:0]
        else:
            receives[group.order[origin]] = wire.numel()
        leaving = wire if len(targets) == 1 else wire.repeat(len(targets))
        work = group.pg.alltoall_base(arriving, leaving, receives, sends)
        self._finish(work, "permute", axes)
        return [out]

    def broadcast(self, shards: Shards, axes: Axes, root: int = 0) -> list[Tensor]:
        if _watchers() and self._group(axes) is not None:
            return watched(self, self.key, "broadcast", shards, axes, root)
        (x,) = shards
        group = self._enter("broadcast", x, axes, f"root={root}")
        if group is None or group.position == root:
            out = x.clone(memory_format=torch.contiguous_format)
        else:
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if group is not None:
            options = dist.BroadcastOptions()
            options.rootRank = group.order[root]
            options.rootTensor = 0
            self._finish(group.pg.broadcast([_wire(out)], options), "broadcast", axes)
        return [out]

    def reduce(self, shards: Shards, axes: Axes, root: int = 0) -> list[Tensor]:
        if _watchers() and self._group(axes) is not None:
            return watched(self, self.key, "reduce", shards, axes, root)
        (x,) = shards
        group = self._enter("reduce", x, axes, f"root={root}")
        out = x.clone(memory_format=torch.contiguous_format)
        if group is not None:
            wire, options = _summand(out), dist.ReduceOptions()
            options.reduceOp = _reduce_op(x, "sum")
            options.rootRank = group.order[root]
            options.rootTensor = 0
            self._finish(group.pg.reduce([wire], options), "reduce", axes)
            if group.position != root:  # partial sums are left there
                out.zero_()
        return [out]

    def exchange(self, text: str) -> list[str]:
        """One text of at most 256 bytes from every process of the mesh, in order of its devices."""
        group = self._group(tuple(self.axes))
        if group is None:
            return [text]
        row = torch.tensor(list(_fixed(text)), dtype=torch.uint8).to(self.device)
        rows = row.new_empty(group.size * _TEXT_BYTES)
        self._finish(_all_gather(group.pg, rows, row), "comparison", tuple(self.axes))
        table = rows.view(group.size, _TEXT_BYTES).tolist()
        return [bytes(table[r]).decode(errors="replace").rstrip() for r in group.order]

    def _group(self, axes: Axes) -> _Group | None:
        if axes not in self._groups:
            self._groups[axes] = self._new_group(axes)
        return self._groups[axes]

    def _members(self, axes: Axes) -> list[int]:
        """Devices of this process's group over `axes`, in order of position."""
        return next(group for group in self._grid.groups(axes) if self._me in group)

    def _new_group(self, axes: Axes) -> _Group | None:
        devices = self._members(axes)
        if len(devices) == 1:
            return None
        ranks = [self.ranks[i] for i in devices]
        by_rank = sorted(ranks)
        order = tuple(by_rank.index(rank) for rank in ranks)
        pg = _process_group(tuple(by_rank), self._attempt, self.device)
        return _Group(pg, len(ranks), devices.index(self._me), order, by_rank == ranks)

    def _enter(self, kind: str, x: Tensor, axes: Axes, detail: str) -> _Group | None:
        group = self._group(axes)
        if self.check and group is not None:
            self._serial += 1
            call = f"{kind} {detail} over {'/'.join(axes)} of {_type(x)}"
            self._compare(f"#{self._serial} {call}")
        return group

    def _compare(self, text: str) -> None:
        texts = self.exchange(text)
        if len(set(texts)) > 1:
            raise MeshError(
                f"ranks of {self} disagree on their next collective: all must run the same ones, "
                f"in the same order\n{_by_rank(texts, self.ranks)}"
            )

    def _finish(self, work: Any, kind: str, axes: Axes) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            # The error names a port; which ranks it may be is known only here.
            members = rank_text([self.ranks[i] for i in self._members(axes)])
            where = f"{kind} over {'/'.join(axes)} of {self}"
            error.add_note(f"in {where}: one of {members} died, or came too late")
            raise

    def __repr__(self) -> str:
        return f"mesh({', '.join(f'{name}={size}' for name, size in self.axes.items())})"


def agree(transport: Transport, digest: bytes, what: str) -> None:
    """Raise MeshError on every process of a mesh unless all of them hold the same digest.

    Args:
        transport: the mesh's; only a distributed one has anything to compare.
        digest: 8 to 32 bytes of a hash that does not depend on the process (not Python's `hash`).
        what: what was hashed, for the error.
    """
    if not isinstance(transport, DistributedTransport):
        return
    texts = transport.exchange(f"{digest.hex()} {what}")
    if len(set(texts)) > 1:
        raise MeshError(
            f"{texts[0].partition(' ')[2]} differs between the ranks of {transport}; every process "
            f"must give the same\n{_by_rank(texts, transport.ranks)}"
        )


def rank_text(ranks: Sequence[int]) -> str:
    """Ranks for a reader: "rank 3", "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"ranks {text}" if len(ranks) > 1 else f"rank {text}"


def _by_rank(texts: Sequence[str], ranks: Sequence[int]) -> str:
    """One line for each different text, with the ranks that said it; the same on every rank."""
    said: dict[str, list[int]] = {}
    for rank, text in sorted(zip(ranks, texts, strict=True)):
        said.setdefault(text, []).append(rank)
    return "\n".join(f"  {rank_text(who)}: {text}" for text, who in said.items())


def _fixed(text: str) -> bytes:
    """The text in exactly 256 bytes; a longer one ends in a hash of what does not fit."""
    data = text.encode()
    if len(data) > _TEXT_BYTES:
        mark = f"... {hashlib.blake2b(data, digest_size=8).hexdigest()}".encode()
        data = data[: _TEXT_BYTES - len(mark)] + mark
    return data.ljust(_TEXT_BYTES)
