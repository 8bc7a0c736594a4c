"""What a reader of `pytest bench` needs: medians beside each other, the fastest first, and the reasons of skips."""

import pytest

COLUMNS = ["median", "iqr"]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    option = config.option
    if not hasattr(option, "benchmark_columns"):  # without pytest-benchmark
        return
    option.benchmark_columns = option.benchmark_columns or COLUMNS
    if option.benchmark_sort == "min":  # the plugin's default
        option.benchmark_sort = "median"
    if "s" not in option.reportchars:
        option.reportchars += "s"
