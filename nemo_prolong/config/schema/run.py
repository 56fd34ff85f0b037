"""The configuration of ``scripts/train.py``: one stage of the recipe."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from nemo_prolong.config.schema.base import (
    Count,
    CountOrNone,
    Fraction,
    Name,
    Parts,
    RowTokens,
    Section,
    Seed,
    Text,
    distinct,
)
from nemo_prolong.config.schema.data import DataConfig
from nemo_prolong.config.schema.launch import AbsolutePath, LaunchConfig, MountText, SbatchOption, VariableName
from nemo_prolong.config.schema.layout import ParallelismConfig, PrecisionConfig
from nemo_prolong.config.schema.model import ModelConfig
from nemo_prolong.config.schema.tracker import TrackerConfig

SlurmName = Annotated[Name, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:@+/=-]*$")]
"""A name of Slurm. sbatch splits a line at blanks and ends it at #, and a name that begins with - is an option."""


class Stage(StrEnum):
    """The stages of the recipe in their order."""

    BASE = "base"
    STAGE1 = "stage1"
    STAGE2 = "stage2"
    SFT = "sft"


class Transition(StrEnum):
    """What a stage takes from its parent."""

    SCRATCH = "scratch"
    WEIGHTS = "weights"
    WEIGHTS_AND_OPTIMIZER = "weights_and_optimizer"


class TrainConfig(Section):
    """Length and batch of the stage, and its rhythm."""

    train_iters: Count
    """Optimizer steps."""
    global_batch_size: Count
    """Packed rows per optimizer step, over all data-parallel ranks."""
    micro_batch_size: Count = 1
    """Packed rows per rank and forward pass; packing wants 1."""
    val_check_interval: CountOrNone = 0
    """Steps between validations; 0 never validates."""
    limit_val_batches: Count = 1
    """Global batches per validation."""
    log_every_n_steps: Count = 1
    """Steps between progress lines; every step is in ``metrics.jsonl`` regardless."""
    deterministic: bool = True
    """Ask torch for deterministic kernels where there is a choice."""
    loss_average: Literal["global", "per_device"] = "global"
    """global is the mean over the target tokens of the global batch; per_device is ProLong's mean of the means of the
    devices, for ablation."""


class OptimConfig(Section):
    """AdamW with linear warmup and cosine decay."""

    lr: Annotated[float, Field(gt=0.0, le=1.0)]
    """Peak learning rate. Adam moves each weight by about this much a step, and weights are smaller than 1."""
    min_lr: Annotated[float, Field(ge=0.0, le=1.0)]
    """Learning rate at the last step."""
    lr_warmup_iters: CountOrNone
    """Steps of linear warmup."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.1
    """Decay of matrices; norms and biases have none. Above 10 weights are gone before they are trained."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_eps: Annotated[float, Field(gt=0.0, le=1.0)] = 1e-8
    """Added to the root of the second moment. Above 1 it outweighs every gradient, and nothing is trained."""
    clip_grad: Annotated[float, Field(ge=0.0, le=1e6)] = 1.0
    """Largest global gradient norm; 0 never clips. Above 1e6 nothing is clipped either."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over the DP x CP ranks."""


class CheckpointConfig(Section):
    """When state is saved and how much is kept."""

    save_interval_steps: Count
    """Steps between checkpoints; the last step is always saved."""
    save_interval_minutes: Annotated[float, Field(ge=0.1, le=1e6)] | None = None
    """Most minutes between checkpoints; null saves by steps only. Below 0.1 training would do nothing but save."""
    keep_last: Count = 2
    """Newest checkpoints kept; older ones are deleted."""
    keep_every_steps: Count | None = None
    """Checkpoints of multiples of this step are never deleted; null keeps none beyond ``keep_last``."""
    async_save: bool | None = None
    """Write while training goes on; null does so where there is a GPU."""
    max_failed_saves: Count = 3
    """Saves that may fail in a row, on a full disk say, before training stops."""


class FaultsConfig(Section):
    """What is done about steps that would harm the model, and about ranks that hang."""

    spike_sigmas: Annotated[float, Field(ge=1.0, le=1e6)] | None = 6.0
    """A step whose loss or gradient norm is this many standard deviations above the mean of the last steps is skipped;
    null skips only what is NaN or infinite. Below 1 ordinary steps are skipped."""
    spike_window_steps: Annotated[int, Field(ge=2, le=10**6)] = 128
    """Steps that mean and deviation are taken of; none is a spike before there are as many."""
    max_skipped_in_a_row: Count = 8
    """Skipped steps in a row after which training stops."""
    max_steps_without_targets: Count = 8
    """Steps in a row of whose rows no token has a loss, after which training stops. Such a step is skipped. One may
    happen where few rows make a step; in a stage of fewer steps all of them are too many."""
    hang_seconds: Annotated[float, Field(ge=1.0, le=1e7)] | None = None
    """Time without the end of a step, a validation or a save after which a rank ends itself; null follows from the
    longest step. Below 1 an ordinary step would be taken for a hang."""
    planned_step_seconds: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """The longest step, from which the time limits follow until the run has measured its own; null plans it from
    FLOPs."""


class ClusterConfig(Section):
    """Where a stage runs and with what around it: what ``scripts/launch.py`` writes. Training does not read it."""

    partition: SlurmName | None = None
    """Slurm partition; null leaves it to the cluster."""
    account: SlurmName | None = None
    """Slurm account to charge; null leaves it to the cluster."""
    time_limit: Annotated[Text, Field(pattern=r"^(\d+-)?\d{1,3}:\d{2}:\d{2}$")] = "04:00:00"
    """Wall time of one job, HH:MM:SS or D-HH:MM:SS; the stage goes on in the next job."""
    signal_seconds: Annotated[int, Field(gt=0, le=65535)] | None = None
    """How long before the end of a job the stage is asked to save and stop; null follows from the longest step and a
    save. Slurm takes 65535 at most."""
    cpus_per_task: Parts | None = None
    """CPUs of each rank; null shares all CPUs of a node between its ranks."""
    memory_per_node: Annotated[Text, Field(pattern=r"^\d{1,9}[KMGT]?$")] = "0"
    """Memory of each node as Slurm writes it, such as 960G; 0 is all that a node has."""
    sbatch_options: Annotated[list[SbatchOption], AfterValidator(distinct)] = Field(default=[])
    """Further options of the job, such as --qos=high or --reservation=NAME."""
    exclude_after_failures: Annotated[int, Field(gt=0, le=1000)] | None = 2
    """Failures that name a node after which the job is requeued without it; null never excludes one."""
    container_image: Name | None = None
    """Image for pyxis, Docker and Kubernetes; null runs on the host."""
    container_mounts: Annotated[list[MountText], AfterValidator(distinct)] = Field(default=[])
    """What the container sees of the host, each SOURCE:TARGET or SOURCE:TARGET:ro."""
    container_workdir: AbsolutePath | None = None
    """Directory in the container where relative paths of the configuration begin; null takes that of the image."""
    container_checkout: AbsolutePath = "/workspace/nemo_prolong"
    """Where this repository lies in the image."""
    environment: dict[VariableName, Text | None] = Field(
        default={
            # Rows of documents of every length ask for blocks of every size. Without it memory is lost between them.
            # torch's newer name is PYTORCH_ALLOC_CONF. The allocator for CUDA reads this one first, and Megatron 0.15.3
            # looks here alone for what it excludes.
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            # Kernels start in the order in which they are queued, so that an exchange of TP or CP starts before the
            # matrix product that it overlaps. Megatron relies on it before Blackwell.
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            # Where a node has several networks, gloo may take one that other nodes do not reach.
            "GLOO_SOCKET_IFNAME": None,
            # The same for NCCL's first connections and for its sockets.
            "NCCL_SOCKET_IFNAME": None,
        }
    )
    """Variables of every rank; null leaves one as it is where the ranks start."""
    secrets: Annotated[list[VariableName], AfterValidator(distinct)] = Field(default=["HF_TOKEN", "WANDB_API_KEY"])
    """Variables whose values are passed on and never written."""

    @property
    def time_limit_seconds(self) -> int:
        """``time_limit`` in seconds."""
        days, _, clock = self.time_limit.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class ResumeConfig(Section):
    """What may be different when a run goes on; a new run ignores it."""

    allow: list[Name] = Field(default=[])
    """Keys or sections whose new values are taken although the run was started with others: optim.lr, ..."""
    when_complete: Literal["refuse", "succeed"] = "refuse"
    """What a run that is complete already is: a mistake, or done. Jobs of a chain say succeed."""


class RunConfig(Section):
    """One stage of the recipe: the configuration of ``scripts/train.py``."""

    stage: Stage
    """Which stage this is."""
    name: Name
    """Directory of the run below ``runs_dir``."""
    runs_dir: Name = "runs"
    """Directory that holds the runs."""
    parent: Name | None
    """Run directory the stage starts from, or ``hf:DIR`` for a Hugging Face directory. null starts from nothing."""
    transition: Transition
    """What is taken from the parent."""
    seed: Seed = 42
    """Seed of initial weights and data order."""
    seq_length: RowTokens
    """Tokens in one packed row. Set here and nowhere else."""
    advertised_context_length: RowTokens | None = None
    """Context the exported model claims; by default the longest row in the chain of stages."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallelism: ParallelismConfig
    precision: PrecisionConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    resume: ResumeConfig = ResumeConfig()
    faults: FaultsConfig = FaultsConfig()
    tracker: TrackerConfig = TrackerConfig()
    cluster: ClusterConfig = ClusterConfig()
    launch: LaunchConfig = LaunchConfig()

    @property
    def run_dir(self) -> str:
        """Directory of everything this run writes."""
        return f"{self.runs_dir}/{self.name}"

    @property
    def global_batch_tokens(self) -> int:
        """Row tokens per optimizer step, pads included."""
        return self.train.global_batch_size * self.seq_length
