"""What happens around the loop over blocks."""

from ptql.callbacks.block import BlockCallback
from ptql.callbacks.progress import BlockProgress

__all__ = ["BlockCallback", "BlockProgress"]
