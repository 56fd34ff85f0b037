"""What ``prepare`` does beside what each patch is for: ``prepare_program.py CHECK``, one of ``CHECKS``."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import sys

import torch

from nemo_prolong.engine.patches import prepare


def twice() -> None:
    """A second call changes nothing."""
    prepare()
    from megatron.core import parallel_state

    changed = parallel_state.initialize_model_parallel, torch.cuda.current_device, torch.Tensor.type
    prepare()
    assert changed == (parallel_state.initialize_model_parallel, torch.cuda.current_device, torch.Tensor.type)


def collected() -> None:
    """What the libraries leave is looked through by no collection."""
    gc.unfreeze()
    prepare()
    assert len(gc.get_objects()) < 10_000 < gc.get_freeze_count()


def plain_model() -> None:
    """A configuration of NeMo that is not ours gets Megatron's own model."""
    prepare()
    from megatron.core.models.gpt.gpt_model import GPTModel
    from nemo.collections import llm

    from nemo_prolong.engine.inference import start_single_process
    from nemo_prolong.engine.model.torch_layers import torch_layer_spec

    start_single_process()
    config = llm.LlamaConfig(
        num_layers=1,
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=2,
        seq_length=8,
        vocab_size=16,
        use_cpu_initialization=True,
        transformer_layer_spec=torch_layer_spec,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    assert type(config.configure_model(None)) is GPTModel


def other_version() -> None:
    """Another version of Megatron is told in the log, which is the output."""
    logging.basicConfig(stream=sys.stdout, force=True)
    version = importlib.metadata.version
    importlib.metadata.version = lambda package: "0.16.0" if package == "megatron-core" else version(package)
    prepare()


def gpu_without_a_fused_adam() -> None:
    """Where there is a GPU, CUDA is left alone; Megatron found torch's Adam, which goes."""
    prepare_for_a_gpu()
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from nemo_prolong.ops.adam import GroupStepAdam

    assert optimizer.Adam is distrib_optimizer.Adam is GroupStepAdam and distrib_optimizer.HAVE_APEX_OR_TE


def gpu_with_a_fused_adam() -> None:
    """Megatron found a fused Adam, which stays."""
    from megatron.core import optimizer

    optimizer.Adam = fused = type("FusedAdam", (), {})
    optimizer.USING_PYTORCH_OPTIMIZER = False
    prepare_for_a_gpu()
    assert optimizer.Adam is fused


def prepare_for_a_gpu() -> None:
    """Apply what is applied on a machine with a GPU."""
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    before = torch.Tensor.type, torch.cuda.current_device, torch.cuda.Stream
    prepare()
    assert (torch.Tensor.type, torch.cuda.current_device, torch.cuda.Stream) == before


CHECKS = (twice, collected, plain_model, other_version, gpu_without_a_fused_adam, gpu_with_a_fused_adam)

if __name__ == "__main__":
    {check.__name__: check for check in CHECKS}[sys.argv[1]]()
