"""The typed configuration: what every YAML file under ``conf/`` may contain, what each key means, and its default.

Names, types, units, defaults and the rules of a single field are here. Rules between fields are in ``config.rules``.
Unknown keys are refused everywhere. Field names are Megatron's own wherever it has one. Needs no torch, so that a
configuration can be checked on a login node in a second.
"""

from nemo_prolong.config.schema.base import Fraction, Section, Size
from nemo_prolong.config.schema.data import DataConfig, MixtureEntry
from nemo_prolong.config.schema.evaluate import EvaluateConfig
from nemo_prolong.config.schema.export import ExportConfig, ExportTargetConfig
from nemo_prolong.config.schema.launch import KubernetesConfig, LaunchConfig, LaunchTarget
from nemo_prolong.config.schema.layout import (
    AttentionKernels,
    CpCommType,
    KernelBackend,
    OffloadConfig,
    ParallelismConfig,
    PrecisionConfig,
    RecomputeConfig,
)
from nemo_prolong.config.schema.model import ModelConfig, RopeScaling
from nemo_prolong.config.schema.report import ReportConfig
from nemo_prolong.config.schema.run import (
    CheckpointConfig,
    ClusterConfig,
    FaultsConfig,
    OptimConfig,
    ResumeConfig,
    RunConfig,
    Stage,
    TrainConfig,
    Transition,
)
from nemo_prolong.config.schema.tracker import MlflowConfig, TrackerConfig, WandbConfig

__all__ = [
    "AttentionKernels",
    "CheckpointConfig",
    "ClusterConfig",
    "CpCommType",
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ExportTargetConfig",
    "FaultsConfig",
    "Fraction",
    "KernelBackend",
    "KubernetesConfig",
    "LaunchConfig",
    "LaunchTarget",
    "MixtureEntry",
    "MlflowConfig",
    "ModelConfig",
    "OffloadConfig",
    "OptimConfig",
    "ParallelismConfig",
    "PrecisionConfig",
    "RecomputeConfig",
    "ReportConfig",
    "ResumeConfig",
    "RopeScaling",
    "RunConfig",
    "Section",
    "Size",
    "Stage",
    "TrackerConfig",
    "TrainConfig",
    "Transition",
    "WandbConfig",
]
