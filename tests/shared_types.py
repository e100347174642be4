"""Types of the fixtures that all tests share."""

from collections.abc import Callable

from mae_dist.data.index import ShardIndex

Tars = Callable[..., ShardIndex]
"""The fixture `tars`."""
