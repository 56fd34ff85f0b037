"""The class of the model: that of the configuration, where NeMo names Megatron's own."""

from __future__ import annotations

from typing import Any

from nemo_prolong.engine.patches.patch import NEMO, Patch, replace


class _ClassOfConfig(type):
    """Metaclass of a stand-in for Megatron's GPT model: a call builds the class that the configuration names."""

    def __call__(cls, config: Any, *args: Any, **kwargs: Any) -> Any:
        """Return a model.

        Args:
            config: NeMo's configuration; with ``model_class``, a subclass of Megatron's GPT model.
            *args: Megatron's, in its order.
            **kwargs: Megatron's.
        """
        from megatron.core.models.gpt.gpt_model import GPTModel

        return getattr(config, "model_class", GPTModel)(config, *args, **kwargs)


def _ask_the_config() -> None:
    """Put the stand-in where NeMo's ``configure_model`` builds the model.

    NeMo also reads the signature of its ``__init__``, which is Megatron's. It compares types with it in one place,
    ``get_inference_wrapper``, which nothing here calls.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel
    from nemo.collections.llm.gpt.model import base

    replace(base, "MCoreGPTModel", _ClassOfConfig("ModelOfConfig", (GPTModel,), {}))()


PATCH = Patch(
    "model_class",
    "NeMo builds Megatron's GPTModel whatever the configuration is; ours may name a subclass of it",
    _ask_the_config,
    NEMO,
    after_import=True,
    with_gpu=True,
)
