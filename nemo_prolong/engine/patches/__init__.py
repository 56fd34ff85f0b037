"""Every change of foreign code. ``prepare`` applies them once, before the libraries are used."""
