"""The stages, in the order in which they run."""

from __future__ import annotations

from benchmarks.hopper import (
    attention,
    data_loader,
    engine,
    fp8_export,
    layers,
    loss_head,
    resume,
    transformer_engine,
)
from benchmarks.hopper.bench import Stage

STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE
    for module in (attention, loss_head, engine, layers, transformer_engine, data_loader, resume, fp8_export)
}
