"""What happens around the loop over blocks."""

from ptql.callbacks.block import BlockCallback
from ptql.callbacks.checkpoint import BlockCheckpoint
from ptql.callbacks.plots import BlockPlots
from ptql.callbacks.progress import BlockProgress
from ptql.callbacks.restore_lora import LoRARestoration
from ptql.callbacks.tta import TestTimeAdaptation

__all__ = ["BlockCallback", "BlockCheckpoint", "BlockPlots", "BlockProgress", "LoRARestoration", "TestTimeAdaptation"]
