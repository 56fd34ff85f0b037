"""The figures that matter most, in one short visit to a GPU: ``make gpu-check GPU_CHECK_ARGS=--quick``.

``cases`` lists what is measured, the most valuable first. ``supervisor`` has one process (``worker``) run case after
case, and starts another one where that ends or takes too long. Every row is in the card before the next one is
measured. The supervisor needs neither torch nor pydantic.
"""
