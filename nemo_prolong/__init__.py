"""nemo_prolong: the ProLong recipe on NVIDIA NeMo, Megatron-core and Transformer Engine.

Importing this package imports none of them, and no torch: the rooms below say what they need (docs/architecture.md).
"""

__version__ = "0.1.0"
