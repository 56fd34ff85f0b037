"""The cases of the quick check, the most valuable first. Needs no torch.

The planned seconds are arithmetic: FLOPs at 40% of the dense bf16 peak of an H200, four runs, and a few seconds to
build. Together they are less than the time of the check, so that one or two cases may take twice as long.
"""

from __future__ import annotations

from benchmarks.hopper.quick.case import Case

_ENGINE = ("pydantic", "nemo", "megatron")
_TE = ("transformer_engine",)
_START = "start"

_MIX = "Optimizer steps of eight layers of Llama-3-8B, or as many as fit, on rows of 64K in stage 1's mix of lengths"
_ALONE = "Forward and backward of attention alone on 64K tokens, with the heads of a rank at TP 1, 4 and 8"
_BACKWARD = "Forward and backward at 32K tokens with the heads of a rank of stage 1, with train.deterministic"

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            name=_START,
            title="Imports and first step",
            shows="Seconds to import the engine, and for the first step of a thin model with everything that is "
            "compiled then, on the Transformer Engine backend if it is there.",
            function="layers.start_rows",
            planned_seconds=60.0,
            needs=_ENGINE,
        ),
        Case(
            name="te",
            title="Transformer Engine, bf16, no recomputation",
            shows=f"{_MIX}: speed, causal MFU, and memory against the arithmetic of what a layer keeps.",
            function="layers.te_rows",
            planned_seconds=35.0,
            needs=_ENGINE,
            needs_on_gpu=_TE,
            after=_START,
        ),
        Case(
            name="te_recompute",
            title="Transformer Engine, bf16, full recomputation",
            shows=f"{_MIX}, with every layer computed again in the backward pass: what recomputation costs.",
            function="layers.te_recompute_rows",
            planned_seconds=40.0,
            needs=_ENGINE,
            needs_on_gpu=_TE,
            after=_START,
        ),
        Case(
            name="deterministic_cudnn",
            title="Deterministic attention, cuDNN through Transformer Engine",
            shows=f"{_BACKWARD}: whether it runs, in which memory, and whether it repeats its bits.",
            function="deterministic.cudnn_rows",
            planned_seconds=8.0,
            needs=_ENGINE,
            needs_on_gpu=_TE,
            after=_START,
        ),
        Case(
            name="deterministic_flash",
            title="Deterministic attention, flash-attn through Transformer Engine",
            shows=f"{_BACKWARD}, with cuDNN's kernels switched off.",
            function="deterministic.flash_rows",
            planned_seconds=4.0,
            needs=_ENGINE,
            needs_on_gpu=_TE,
            after=_START,
        ),
        Case(
            name="deterministic_torch",
            title="Deterministic attention, torch backend",
            shows=f"{_BACKWARD}, by the kernel that torch brings.",
            function="deterministic.torch_rows",
            planned_seconds=4.0,
            needs=("pydantic",),
        ),
        Case(
            name="attention_te",
            title="Attention alone, Transformer Engine (thd)",
            shows=f"{_ALONE}: one document, 8 equal ones, 300 short ones and 700 short ones.",
            function="attention.te_rows",
            planned_seconds=20.0,
            needs=_ENGINE,
            needs_on_gpu=_TE,
            after=_START,
        ),
        Case(
            name="attention_torch",
            title="Attention alone, torch's flash kernel",
            shows=f"{_ALONE}: the same rows by the attention of the torch backend.",
            function="attention.torch_rows",
            planned_seconds=10.0,
            needs=("pydantic",),
        ),
        Case(
            name="attention_cudnn",
            title="Attention alone, cuDNN through torch",
            shows=f"{_ALONE}: cuDNN's kernel called for each document, where there are few.",
            function="attention.cudnn_rows",
            planned_seconds=10.0,
            needs=("pydantic",),
        ),
        Case(
            name="te_fp8",
            title="Transformer Engine, fp8, no recomputation",
            shows=f"{_MIX}, with FP8 matrix products by per-tensor current scaling.",
            function="layers.te_fp8_rows",
            planned_seconds=30.0,
            needs=_ENGINE,
            needs_on_gpu=_TE,
            after=_START,
        ),
        Case(
            name="tp8_layer",
            title="One layer as a rank at TP 8 has it",
            shows="Forward and backward of a layer with the heads and MLP of one of 8 tensor-parallel ranks on 64K "
            "tokens, from models of 6 and 2 layers: milliseconds, TFLOPS, and bytes that it keeps per token.",
            function="tp8.layer_rows",
            planned_seconds=20.0,
            needs=_ENGINE,
            needs_on_gpu=_TE,
            after=_START,
        ),
        Case(
            name="tp8_memory_512k",
            title="Memory of a row of 512K",
            shows="One step of one such layer, with a rank's share of the LM head, on one document of 512K tokens.",
            function="tp8.memory_rows",
            planned_seconds=30.0,
            needs=_ENGINE,
            needs_on_gpu=_TE,
            after=_START,
        ),
        Case(
            name="torch",
            title="Torch backend, bf16, full recomputation",
            shows=f"{_MIX}, on the torch backend, with one timed step of each kind: what a run costs without "
            "Transformer Engine.",
            function="layers.torch_rows",
            planned_seconds=30.0,
            needs=_ENGINE,
            after=_START,
        ),
        Case(
            name="loss_head",
            title="Loss head",
            shows="Memory and time of the LM head with its cross-entropy at 64K tokens, against checkpointed blocks.",
            function="head.rows",
            planned_seconds=8.0,
        ),
    )
}
