"""How fast a step was, and how much of the devices it used."""

from __future__ import annotations

import logging
import resource

import torch

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.plan.devices import dense_peak_flops_per_second
from nemo_prolong.plan.flops import training_flops_of_sums
from nemo_prolong.telemetry.step_sums import StepTotals

log = logging.getLogger(__name__)


class Performance:
    """Turns the totals of a step into rates.

    Args:
        cfg: The stage.
        device_name: Name of the device as its driver reports it. None where there is none, because a CPU has no MFU.
        world_size: Ranks.
    """

    def __init__(self, cfg: RunConfig, device_name: str | None, world_size: int) -> None:
        self._model = cfg.model
        self._row_tokens = cfg.global_batch_tokens
        self._world_size = world_size
        self._peaks: dict[str, float] = {}
        if device_name is not None:
            self._peaks = _peaks(device_name, cfg.precision.compute)

    def figures(self, totals: StepTotals, seconds: float) -> dict[str, float | int]:
        """Return the rates of a step by their keys in ``metrics.jsonl``.

        Args:
            totals: Of all ranks.
            seconds: Duration of the step.
        """
        flops = training_flops_of_sums(self._model, totals.real_tokens, totals.squared_tokens)
        per_rank = flops / seconds / self._world_size
        figures: dict[str, float | int] = {
            "tokens_per_second": round(totals.real_tokens / seconds, 1),
            "tokens_per_second_per_rank": round(totals.real_tokens / seconds / self._world_size, 1),
            "row_tokens_per_second": round(self._row_tokens / seconds, 1),
            "model_flops": flops,
            "model_flops_per_second": round(flops / seconds),
            "model_flops_per_second_per_rank": round(per_rank),
        }
        return figures | {key: round(per_rank / peak, 5) for key, peak in self._peaks.items()}


def _peaks(device_name: str, compute: str) -> dict[str, float]:
    """Return what a rate is compared with, by the key of the share: BF16's peak always, and under FP8 that of FP8."""
    bf16 = dense_peak_flops_per_second(device_name, "bf16")
    if bf16 is None:
        log.warning("MFU is not reported: the dense bf16 peak of %s is not known", device_name)
        return {}
    fp8 = dense_peak_flops_per_second(device_name, "fp8") if compute.startswith("fp8") else None
    return {"mfu": bf16} | ({} if fp8 is None else {"fp8_peak_share": fp8})


def device_name() -> str | None:
    """Return the name of this rank's accelerator, or None where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_memory_bytes() -> int:
    """Return the peak of the device's memory, or of this process on a machine without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
