"""Whether this software does on a Hopper GPU what it does on a CPU, and how fast: ``make gpu-check``.

One module per stage, named by what it looks at; ``stages`` lists them. Every stage runs in a process of its own
(``stage_program``), so that an error of the device or a lack of memory in one leaves the others alone. With
``--device cpu`` the same code runs at small sizes.
"""
