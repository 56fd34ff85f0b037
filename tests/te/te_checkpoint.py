"""A checkpoint of the torch backend, written on a CPU, in a Transformer Engine model and back, bit by bit."""

from __future__ import annotations

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from nemo_prolong.config.schema import ParallelismConfig
from tests.support.te_layouts import TINY, build, enter, plain, te

ONE_RANK = ParallelismConfig()


def bits(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter by its key in a checkpoint; layers are stacked there and keep their number here."""
    parts = {part.key: part for part in module.sharded_state_dict().values()}
    assert all(key.startswith(("embedding.", "decoder.", "output_layer.")) for key in parts), parts.keys()
    found = {}
    for name, value in module.named_parameters():
        name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        found[name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")] = value.detach().clone()
    return found


def fill(module: torch.nn.Module) -> None:
    """Give every parameter values of its own."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def save(module: torch.nn.Module, directory) -> None:
    directory.mkdir()
    dist_checkpointing.save(module.sharded_state_dict(), str(directory))


def load(module: torch.nn.Module, directory) -> None:
    """Load as training does: what is asked for must be there."""
    state = dist_checkpointing.load(
        module.sharded_state_dict(), str(directory), strict=StrictHandling.ASSUME_OK_UNEXPECTED
    )
    module.load_state_dict(state)


@pytest.mark.parametrize(
    "precision", [te(), te("fp8"), te("fp8", "delayed"), te("fp8_attention", "delayed")], ids=lambda p: p.compute
)
def test_a_checkpoint_of_torch_loads_in_te_and_back(tmp_path, precision):
    enter(ONE_RANK, 0, 1)
    written = build(TINY, 128, ONE_RANK, plain(), device="cpu")
    fill(written)
    save(written, tmp_path / "torch")
    middle = build(TINY, 128, ONE_RANK, precision, device="cpu")
    load(middle, tmp_path / "torch")
    save(middle, tmp_path / "te")
    back = build(TINY, 128, ONE_RANK, plain(), device="cpu")
    load(back, tmp_path / "te")
    expected = bits(written)
    assert len(expected) == 2 * 6 + 3
    for module in (middle, back):
        found = bits(module)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
