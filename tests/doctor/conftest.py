"""Data, runs and stages on disk, as the tests of stages have them."""

from tests.stages.conftest import data_root, make_child, make_config, make_run

__all__ = ["data_root", "make_child", "make_config", "make_run"]
