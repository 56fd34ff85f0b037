"""Meet the other ranks, add up a one of each, and fail once: run under torchrun with ``--max-restarts``."""

import os

import torch

from nemo_prolong.distributed.rendezvous import open_store


def main() -> None:
    """Be one rank."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", store=open_store(), rank=rank, world_size=world_size)
    total = torch.ones(())
    torch.distributed.all_reduce(total)
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    print(f"attempt {attempt}: rank {rank} of {total:g}\n", end="", flush=True)
    # Not an orderly end: the ranks of the first attempt leave their addresses in torchrun's store.
    os._exit(76 if attempt == "0" else 0)


if __name__ == "__main__":
    main()
