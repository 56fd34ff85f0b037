"""Builds the image without a container engine, as far as that goes. See ``__main__``."""
