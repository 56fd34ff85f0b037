"""What a stage asks of each node, as numbers that checks compare with what is there."""

from __future__ import annotations

from nemo_prolong.config.rules.attention import Platform
from nemo_prolong.config.schema import KernelBackend, RunConfig
from nemo_prolong.doctor.facts import Machine
from nemo_prolong.doctor.software import release
from nemo_prolong.plan.checkpoint_size import checkpoint_bytes

_ROW_TOKEN_BYTES = 28
"""Bytes of a row in shared memory by token: tokens, labels and positions in int64, the loss mask in fp32."""

_ROWS_OF_A_WORKER = 3
"""Two rows that a loader process has read ahead, which is torch's default, and one on its way."""

_NCCL_SHARED_BYTES = 64 * 2**20
"""What NCCL's transports of a rank take in shared memory at most. 2.x takes about 10 MB for a pair of neighbours."""

_FILES_OF_A_PROCESS = 1024
"""Libraries, shards that are mapped, logs and sockets of one process."""

_FILES_OF_A_PEER = 4
"""Sockets that rank 0 holds for each other rank: the store, and the bootstrap of NCCL's groups."""

_THREADS_OF_A_RANK = 256
"""Threads of CUDA, NCCL, the saves and the math libraries of one rank."""

_MEMORY_USED_BY_NOBODY_BYTES = 2 * 2**30
"""GPU memory below which nobody works there. A driver without programs holds up to 1 GiB."""


def needs_gpus(cfg: RunConfig) -> bool:
    """Return whether the stage is meant for GPUs: it asks for their kernels, or is planned for several ranks of them.

    A bf16 stage of one rank runs on a CPU too, which is how the miniature is tried in bf16.
    """
    if cfg.precision.compute == "fp32":
        return False
    asked = cfg.precision.backend is KernelBackend.TE or cfg.precision.compute.startswith("fp8")
    return asked or cfg.parallelism.planned_world_size > 1


def platform_of(machine: Machine) -> Platform:
    """Return the platform that the rules of the configuration judge, as the engine would find it when it starts."""
    capability = machine.gpus[0].compute_capability if machine.gpus else None
    torch = machine.torch
    return Platform(
        transformer_engine=release(machine.packages.get("transformer_engine")),
        compute_capability=capability,
        cudnn=torch.cudnn if torch else None,
        cuda=torch.cuda if torch else None,
        flash_attn=release(machine.packages.get("flash_attn")),
        flash_attn_3=release(machine.packages.get("flash_attn_3")),
    )


def shared_memory_bytes(cfg: RunConfig) -> int:
    """Return what the ranks of a node take of ``/dev/shm``: rows of the loader processes, and NCCL's buffers."""
    rows = cfg.data.num_workers * _ROWS_OF_A_WORKER * cfg.seq_length * _ROW_TOKEN_BYTES
    return cfg.parallelism.ranks_per_node * (rows + (_NCCL_SHARED_BYTES if needs_gpus(cfg) else 0))


def open_files(cfg: RunConfig) -> int:
    """Return the files and sockets that rank 0 may hold open."""
    return _FILES_OF_A_PROCESS + _FILES_OF_A_PEER * cfg.parallelism.planned_world_size


def processes(cfg: RunConfig) -> int:
    """Return the processes and threads of a node."""
    return cfg.parallelism.ranks_per_node * (1 + cfg.data.num_workers) * _THREADS_OF_A_RANK


def cpus(cfg: RunConfig) -> int:
    """Return the processors of a node that keep its ranks and their loader processes from waiting for each other."""
    return cfg.parallelism.ranks_per_node * (1 + cfg.data.num_workers)


def save_memory_bytes(cfg: RunConfig) -> int:
    """Return the host memory that a save in the background takes on a node: its share of the state."""
    in_background = needs_gpus(cfg) if cfg.checkpoint.async_save is None else cfg.checkpoint.async_save
    return checkpoint_bytes(cfg) // cfg.parallelism.num_nodes if in_background else 0


def is_busy(used_bytes: int) -> bool:
    """Return whether so much used memory of a GPU means that someone works there."""
    return used_bytes > _MEMORY_USED_BY_NOBODY_BYTES
