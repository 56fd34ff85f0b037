"""The only room that imports nemo, megatron, lightning, transformer_engine and modelopt.

``cpu.py`` holds every change to foreign code. Importing this package imports none of them: each module does, so that a
process can prepare the CPU (``cpu.prepare``) first.
"""
