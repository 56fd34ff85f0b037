"""The typed configuration: what every YAML file under ``conf/`` may contain, and what each field means.

Owns names, types, units and single-field rules. Rules between fields are in ``checks.py``. Unknown keys are refused
everywhere, sizes may be written ``64K``, ``512K``, ``20B``. Field names are Megatron's own wherever it has one.
Needs no torch, so that a configuration can be checked on a login node in a second.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt

from nemo_prolong.units import parse_size

Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
"""A positive count that may be written with K, M, B or T."""

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
"""A share that leaves something over."""

CpCommType = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]
"""How context-parallel ranks exchange keys and values, in Megatron's words."""


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, attribute docstrings are the help texts."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )


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


class KernelBackend(StrEnum):
    """Which implementation of the layers runs: ours in plain torch, or Transformer Engine."""

    AUTO = "auto"
    TORCH = "torch"
    TE = "te"


class RopeScaling(Section):
    """Llama-3.1's change of the RoPE frequencies (Hugging Face: ``rope_type: llama3``); the slow ones are divided."""

    factor: Annotated[float, Field(ge=1.0)]
    """Divides the frequencies whose wavelength is longer than the original context / ``low_freq_factor``."""
    low_freq_factor: Annotated[float, Field(gt=0.0)]
    """See ``factor``."""
    high_freq_factor: Annotated[float, Field(gt=0.0)]
    """Wavelengths shorter than the original context / this stay as they are; between the two it is interpolated."""
    original_max_position_embeddings: PositiveInt
    """The original context, in tokens."""


class ModelConfig(Section):
    """A Llama model, in the words of NeMo's ``LlamaConfig``."""

    name: str
    """What the model is called in manifests, reports and the model card."""
    nemo_config: str
    """Class in ``nemo.collections.llm`` that supplies everything not set here: LlamaConfig, Llama3Config8B, ..."""
    num_layers: PositiveInt
    """Transformer layers."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt
    """Width of the SwiGLU block."""
    num_attention_heads: PositiveInt
    """Query heads."""
    num_query_groups: PositiveInt
    """Key and value heads (grouped-query attention)."""
    kv_channels: PositiveInt
    """Dimensions of one head."""
    vocab_size: PositiveInt
    """Real vocabulary, as in the exported ``config.json``; must be the tokenizer's."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The embedding is padded to a multiple of this times TP; the padding is dropped at export."""
    rotary_base: Annotated[float, Field(gt=1.0)]
    """RoPE base (Hugging Face: ``rope_theta``)."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the RoPE frequencies as in Llama-3.1 and 3.2; null for none, as in Llama-3 and ProLong."""
    layernorm_epsilon: Annotated[float, Field(gt=0.0)] = 1e-5
    """Epsilon of RMSNorm."""
    init_method_std: Annotated[float, Field(gt=0.0)] = 0.02
    """Standard deviation of the initial weights when trained from scratch."""
    share_embeddings_and_output_weights: bool = False
    """Tie the LM head to the embedding."""
    license: str = ""
    """Licence of the base model, for the model card."""

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Return the rows of the embedding as Megatron pads it for this TP."""
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return math.ceil(self.vocab_size / multiple) * multiple


class MixtureEntry(Section):
    """One directory of packed rows and its share of the training rows."""

    path: str
    """MDS directory, relative to ``data.root``."""
    proportion: Annotated[float, Field(gt=0.0, le=1.0)]
    """Share of the rows drawn from it, which is its share of the tokens because rows have one length."""


class DataConfig(Section):
    """What is trained on."""

    root: str
    """Directory or ``s3://`` address that holds the packed directories and the tokenizer."""
    tokenizer: str
    """Tokenizer directory (``transformers`` format), relative to ``data.root`` or absolute."""
    mixture: list[MixtureEntry] = Field(min_length=1)
    """Training directories; proportions sum to 1."""
    validation: list[str] = []
    """Directories of packed rows for the validation loss, relative to ``data.root``."""
    apply_instruct_masks: bool = False
    """Train only on tokens whose ``mask`` column is 1."""
    num_workers: Annotated[int, Field(ge=0)] = 1
    """Loader processes per rank."""
    cache: str | None = None
    """Local directory for copies of remote and compressed shards; null takes ``~/.cache/nemo_prolong/shards``."""


class TrainConfig(Section):
    """Length and batch of the stage, and its rhythm."""

    train_iters: PositiveInt
    """Optimizer steps."""
    global_batch_size: PositiveInt
    """Packed rows per optimizer step, over all data-parallel ranks."""
    micro_batch_size: PositiveInt = 1
    """Packed rows per rank and forward pass; packing wants 1."""
    val_check_interval: Annotated[int, Field(ge=0)] = 0
    """Steps between validations; 0 never validates."""
    limit_val_batches: PositiveInt = 1
    """Global batches per validation."""
    log_every_n_steps: PositiveInt = 1
    """Steps between progress lines; every step is in ``metrics.jsonl`` regardless."""
    deterministic: bool = True
    """Ask torch for deterministic kernels where there is a choice."""
    loss_average: Literal["global", "per_device"] = "global"
    """global is the mean over the target tokens of the global batch; per_device is ProLong's mean of the means of the
    devices, for ablation."""


class ParallelismConfig(Section):
    """How a model is laid out over ranks; data parallel takes what is left of the world size."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Ranks that share the layers (PP)."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each row's tokens (CP)."""
    sequence_parallel: bool = False
    """Split norm and dropout activations over the TP ranks; needs TP > 1."""
    cp_comm_type: CpCommType = "p2p"
    """Exchange between CP ranks. Transformer Engine 2.9 masks documents with p2p only."""
    hierarchical_context_parallel_sizes: list[PositiveInt] | None = None
    """With a2a+p2p: ranks that exchange heads, and ranks of the ring around them; their product is CP."""
    num_nodes: PositiveInt = 1
    """Machines the stage is planned for."""
    ranks_per_node: PositiveInt = 1
    """GPUs (or CPU processes) per machine it is planned for."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def planned_world_size(self) -> int:
        """Ranks the stage is planned for."""
        return self.num_nodes * self.ranks_per_node


class RecomputeConfig(Section):
    """What is computed again in the backward pass instead of kept."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """full computes whole layers again, selective the modules of recompute_modules."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: every block of layers, or only the first ones of each pipeline stage."""
    recompute_num_layers: PositiveInt | None = None
    """With full: layers per block."""
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp"]] | None = None
    """With selective: parts of every layer to compute again. Only mlp saves something here."""
    distribute_saved_activations: bool = False
    """With full: keep the input of a block split over the TP ranks; sequence parallel already does."""


class OffloadConfig(Section):
    """What is moved to the host's memory between forward and backward pass; needs Transformer Engine."""

    cpu_offloading: bool = False
    """Move the activations that the first layers keep; not with recomputation, nor with PP > 1."""
    cpu_offloading_num_layers: Annotated[int, Field(ge=0)] = 0
    """Layers whose activations are moved: at least 1, and fewer than the model has."""


class PrecisionConfig(Section):
    """Number formats and kernels."""

    compute: Literal["fp32", "bf16", "fp8", "fp8_attention"]
    """Number format; fp8 is FP8 matrix products and BF16 attention."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] = "tensorwise"
    """Scaling of FP8 matrix products; mxfp8 is not here because it needs Blackwell."""
    backend: KernelBackend = KernelBackend.AUTO
    """auto takes Transformer Engine on a GPU where it is installed, else torch."""
    recompute: RecomputeConfig = RecomputeConfig()
    offload: OffloadConfig = OffloadConfig()


class OptimConfig(Section):
    """AdamW with linear warmup and cosine decay."""

    lr: Annotated[float, Field(gt=0.0)]
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0.0)]
    """Learning rate at the last step."""
    lr_warmup_iters: Annotated[int, Field(ge=0)]
    """Steps of linear warmup."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decay of matrices; norms and biases have none."""
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_eps: Annotated[float, Field(gt=0.0)] = 1e-8
    clip_grad: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest global gradient norm; 0 never clips."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over the DP x CP ranks."""


class CheckpointConfig(Section):
    """When state is saved and how much is kept."""

    save_interval_steps: PositiveInt
    """Steps between checkpoints; the last step is always saved."""
    save_interval_minutes: PositiveFloat | None = None
    """Most minutes between checkpoints; null saves by steps only."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept; older ones are deleted."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints of multiples of this step are never deleted; null keeps none beyond ``keep_last``."""
    async_save: bool | None = None
    """Write while training goes on; null does so where there is a GPU."""
    max_failed_saves: PositiveInt = 3
    """Saves that may fail in a row, on a full disk say, before training stops."""


class FaultsConfig(Section):
    """What is done about steps that would harm the model, and about ranks that hang."""

    spike_sigmas: Annotated[float, Field(gt=0.0)] | None = 6.0
    """A step whose loss or gradient norm is this many standard deviations above the mean of the last steps is skipped;
    null skips only what is NaN or infinite."""
    spike_window_steps: Annotated[int, Field(ge=2)] = 128
    """Steps that mean and deviation are taken of; none is a spike before there are as many."""
    max_skipped_in_a_row: PositiveInt = 8
    """Skipped steps in a row after which training stops."""
    hang_seconds: Annotated[float, Field(gt=0.0)] | None = 1800.0
    """Time without the end of a step, a validation or a save after which a rank ends itself; null never does."""


class WandbConfig(Section):
    """Weights & Biases. The key comes from ``WANDB_API_KEY`` or ``wandb login``."""

    project: str = "nemo_prolong"
    """Project the runs belong to."""
    entity: str | None = None
    """User or team; null is the default one of the key."""
    mode: Literal["online", "offline"] = "online"
    """offline writes under ``<run>/wandb``, for ``wandb sync`` later."""


class MlflowConfig(Section):
    """MLflow. Credentials come from ``MLFLOW_TRACKING_TOKEN``, or user name and password likewise."""

    tracking_uri: str
    """Address of a server, a database or a directory: ``http://HOST:5000``, ``sqlite:///runs.db``, ``file:mlruns``."""
    experiment: str = "nemo_prolong"
    """Experiment the runs belong to."""


class TrackerConfig(Section):
    """Where metrics go besides ``metrics.jsonl``."""

    tensorboard: bool = False
    """Write TensorBoard events under ``<run>/tensorboard``."""
    wandb: WandbConfig | None = None
    """Send them to Weights & Biases; needs the package wandb."""
    mlflow: MlflowConfig | None = None
    """Send them to MLflow; needs the package mlflow."""


class ClusterConfig(Section):
    """Where a stage is submitted: what ``scripts/launch.py`` writes into the job file. Training does not read it."""

    partition: str | None = None
    """Slurm partition; null leaves it to the cluster."""
    account: str | None = None
    """Slurm account to charge; null leaves it to the cluster."""
    time_limit: Annotated[str, Field(pattern=r"^(\d+-)?\d{1,3}:\d{2}:\d{2}$")] = "04:00:00"
    """Wall time of one job, HH:MM:SS or D-HH:MM:SS; the stage goes on in the next job."""
    signal_seconds: PositiveInt = 120
    """How long before the end of a job the stage is asked to save and stop."""
    container_image: str | None = None
    """Image for pyxis; null runs on the host."""


class ResumeConfig(Section):
    """What may be different when a run goes on; a new run ignores it."""

    allow: list[str] = []
    """Keys or sections whose new values are taken although the run was started with others: optim.lr, ..."""


class RunConfig(Section):
    """One stage of the recipe: the configuration of ``scripts/train.py``."""

    stage: Stage
    """Which stage this is."""
    name: str
    """Directory of the run below ``runs_dir``."""
    runs_dir: str = "runs"
    """Directory that holds the runs."""
    parent: str | None = None
    """Run directory the stage starts from, or ``hf:DIR`` for a Hugging Face directory."""
    transition: Transition
    """What is taken from the parent."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of initial weights and data order."""
    seq_length: Size
    """Tokens in one packed row. Set here and nowhere else."""
    advertised_context_length: Size | None = None
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

    @property
    def run_dir(self) -> str:
        """Directory of everything this run writes."""
        return f"{self.runs_dir}/{self.name}"

    @property
    def global_batch_tokens(self) -> int:
        """Row tokens per optimizer step, pads included."""
        return self.train.global_batch_size * self.seq_length


class EvaluateConfig(Section):
    """The configuration of ``scripts/evaluate.py``."""

    models: list[str] = Field(min_length=1)
    """Run directories (through Megatron) or ``hf:DIR`` directories (through ``transformers``)."""
    output: str | None = None
    """Directory for the results; by default ``<run>/eval``, and ``<DIR>_eval`` beside the directory of ``hf:DIR``."""
    rows: str
    """Directory of packed rows to score, one document per row as a rule."""
    position_buckets: list[Size] = Field(min_length=1)
    """Upper ends of the position buckets for perplexity, ascending."""
    max_documents: PositiveInt
    """Documents scored for perplexity."""
    recall_lengths: list[Size] = Field(min_length=1)
    """Prompt lengths of the key-value recall task, in tokens."""
    recall_samples: PositiveInt
    """Prompts per length."""
    seed: Annotated[int, Field(ge=0)] = 42


class ExportTargetConfig(Section):
    """What an exported model is prepared for, and where it is published."""

    format: Literal["hf", "trtllm", "vllm", "trtllm_engine_checkpoint"] = "hf"
    """A Hugging Face directory alone, with what a server needs to start, or the files of TensorRT-LLM <= 1.2."""
    quantization: Literal["fp8"] | None = None
    """FP8 weights and KV cache by ModelOpt, calibrated on rows of the run's own data; null keeps bf16."""
    calibration_rows: PositiveInt = 64
    """Packed training rows that calibration runs over."""
    calibration_length: Size = 32768
    """Tokens of a document that calibration sees; longer documents are cut."""
    gpu: str = "h100_80gb"
    """Device that serves; its memory sizes the server's settings."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that share every layer of one server."""
    pipeline_parallel_size: PositiveInt = 1
    """GPUs that share the layers in order; of trtllm_engine_checkpoint only."""
    max_batch_size: PositiveInt = 1
    """Requests of the whole advertised length that are in memory at a time."""
    max_num_tokens: Size = 8192
    """Prompt tokens computed in one step; longer prompts are cut into such chunks."""
    push_to_hub: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Repository ORG/NAME on the Hugging Face Hub that receives the verified directory."""
    hub_private: bool = True
    """Make a repository that does not exist yet private."""
    hub_dry_run: bool = False
    """Print what would be sent to the Hub, and send nothing."""


class ExportConfig(Section):
    """The configuration of ``scripts/export.py``."""

    run: str
    """Run directory to export."""
    output: str
    """Hugging Face directory to write; must not exist unless ``overwrite``."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of the exported weights."""
    overwrite: bool = False
    """Replace ``output`` if it is an earlier export."""
    verify: bool = True
    """Compare every tensor and the logits with the Megatron model; a difference refuses the export."""
    max_shard_bytes: Size = 5 * 2**30
    """Largest safetensors file."""
    export: ExportTargetConfig = ExportTargetConfig()
    """What the directory is prepared for, and where it is published."""


class ReportConfig(Section):
    """The configuration of ``scripts/report.py``."""

    runs: list[str] = Field(min_length=1)
    """Run directories in the order of the stages."""
    exported: str | None = None
    """Exported directory to report on."""
    output: str
    """HTML file to write; ``summary.json`` goes beside it."""
