"""What NeMo is told for Transformer Engine; ``settings_program.py`` writes JSON, without Transformer Engine."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from megatron.core import parallel_state
from nemo import lightning as nl
from torch.overrides import TorchFunctionMode

from nemo_prolong.config.schema import KernelBackend, ModelConfig, ParallelismConfig, PrecisionConfig, RecomputeConfig
from nemo_prolong.data.batch import PackedBatch
from nemo_prolong.engine.inference import start_single_process
from nemo_prolong.engine.model import nemo_model
from nemo_prolong.engine.patches import prepare
from nemo_prolong.engine.patches.process_groups import PATCH
from nemo_prolong.engine.te import data_step, fp8
from nemo_prolong.engine.training.packed_step import ExactLossReduction, packed_data_step, packed_forward_step
from nemo_prolong.engine.training.trainer import StageStrategy

TINY = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2}
PRECISIONS = [
    PrecisionConfig(compute="bf16"),
    PrecisionConfig(compute="fp8", fp8_recipe="tensorwise"),
    PrecisionConfig(compute="fp8", fp8_recipe="blockwise"),
    PrecisionConfig(compute="fp8_attention", fp8_recipe="delayed"),
]


def architecture() -> ModelConfig:
    """Return a model of two thin layers."""
    return ModelConfig(name="tiny", nemo_config="LlamaConfig", kv_channels=16, vocab_size=512, rotary_base=1e4, **TINY)


def settings(precision: PrecisionConfig) -> dict[str, object]:
    """Return the FP8 fields of model and plugin, and the functions that the model is built with."""
    config = nemo_model.build_nemo_config(architecture(), 64, ParallelismConfig(), precision)
    plugin = dataclasses.asdict(fp8.mixed_precision(precision).dtype_config)
    names = [name for name in plugin if name.startswith("fp8") and hasattr(config, name)]
    return {
        "model": {name: getattr(config, name) for name in names},
        "plugin": {name: plugin[name] for name in names},
        "gathers_fp8_weights": plugin["fp8_param_gather"],
        "tp_only_amax_red": config.tp_only_amax_red,
        "layers": config.transformer_layer_spec.__name__,
        "data_step": config.data_step_fn.__name__,
        "bf16": config.bf16 and config.params_dtype is torch.bfloat16,
    }


def strategy_arguments() -> dict[str, object]:
    """Return what the strategy adds where NeMo forms the process groups."""
    seen = {}
    parallel_state.initialize_model_parallel = seen.update
    PATCH.apply()

    def setup_distributed(self: StageStrategy) -> None:
        parallel_state.initialize_model_parallel()

    nl.MegatronStrategy.setup_distributed = setup_distributed
    strategy = StageStrategy(context_parallel_size=4)
    strategy.hierarchical_context_parallel_sizes = [2, 2]
    strategy.setup_distributed()
    return seen


def padded_lengths(precision: PrecisionConfig) -> tuple[list[list[int | None]], list[int]]:
    """Return the tokens that 2 x 2 ranks of TP and CP make of rows with odd documents, and how many documents."""
    parallel_state.get_context_parallel_world_size = lambda: 2
    parallel_state.get_context_parallel_rank = lambda: 1
    parallel_state.get_tensor_model_parallel_world_size = lambda: 2
    step = data_step.data_step_of(precision)
    lengths, documents = [], []
    for row in ([1, 700, 3], [1024]):
        bounds = torch.tensor([0, *row]).cumsum(0).to(torch.int32)
        per_token = torch.zeros(1, int(bounds[-1]), dtype=torch.int64)
        whole = PackedBatch(
            tokens=per_token,
            labels=per_token,
            loss_mask=per_token,
            position_ids=per_token,
            cu_seqlens=bounds,
            max_seqlen=max(row),
            domain="",
            real_tokens=sum(row),
        )
        batch = step(iter([whole]))
        lengths.append([int(batch.cu_seqlens[-1]), batch.tokens.size(1), batch.equal_documents])
        documents.append(len(batch.cu_seqlens) - 1)
    return lengths, documents


class Cosines(TorchFunctionMode):
    """Counts how often cosines are taken."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.cos, torch.Tensor.cos)
        return func(*args, **(kwargs or {}))


def losses() -> list[dict[str, object]]:
    """Return loss and gradients of a row as it is, and of the row with empty documents, in the torch backend."""
    start_single_process()
    torch.manual_seed(0)
    recompute = RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    precision = PrecisionConfig(compute="fp32", backend=KernelBackend.TORCH, recompute=recompute)
    config = nemo_model.build_nemo_config(architecture(), 64, ParallelismConfig(), precision)
    model = config.configure_model(tokenizer=None).train()
    found = []
    row = random_row([1, 30, 17, 9, 7])
    for few_shapes in (False, True):
        batch = packed_data_step(iter([row]), few_shapes=few_shapes)
        model.zero_grad()
        with Cosines() as cosines:
            loss, _, _ = ExactLossReduction().forward(batch, packed_forward_step(model, batch))
            loss.backward()
        gradients = [str(parameter.grad.double().sum().item()) for parameter in model.parameters()]
        found.append(
            {
                "documents": len(batch.cu_seqlens) - 1,
                "loss": float(loss),
                "gradients": gradients,
                "cosines": cosines.count,
            }
        )
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return found


def random_row(lengths: list[int]) -> PackedBatch:
    """Return a row of random tokens, each of which but the last of a document predicts the next."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens = torch.randint(0, 500, (1, sum(lengths)))
    loss_mask = torch.ones(1, sum(lengths))
    loss_mask[0, bounds[1:].long() - 1] = 0
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return PackedBatch(
        tokens=tokens,
        labels=tokens.roll(-1),
        loss_mask=loss_mask,
        position_ids=positions,
        cu_seqlens=bounds,
        max_seqlen=max(lengths),
        domain="",
        real_tokens=sum(lengths),
    )


if __name__ == "__main__":
    prepare()
    first = losses()
    # Transformer Engine itself is not needed to say what the model would be built with.
    nemo_model.resolve_backend = lambda precision, platform: KernelBackend.TE
    found = {"settings": [settings(precision) for precision in PRECISIONS], "strategy": strategy_arguments()}
    found["attention_backends"] = {
        name: nemo_model.build_nemo_config(
            architecture(), 64, ParallelismConfig(), PrecisionConfig(compute="bf16", attention=name)
        ).attention_backend.name
        for name in ("auto", "cudnn", "flash")
    }
    found |= {"losses": first, "padded": [], "documents": []}
    for precision in PRECISIONS:
        lengths, documents = padded_lengths(precision)
        found["padded"].append(lengths)
        found["documents"].append(documents)
    print(json.dumps(found, default=str))
