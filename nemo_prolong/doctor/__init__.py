"""Whether a machine can run a stage: what is there, what is missing, and how to mend it.

``probing`` reads without ever waiting long. ``machine``, ``nvidia`` and ``software`` read a machine into ``facts``.
``checks`` turns facts into findings. ``meeting`` brings the nodes of a job together. Torch is never imported here.
"""
