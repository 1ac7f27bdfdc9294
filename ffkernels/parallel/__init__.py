"""Several processes on `torch.distributed`: rows divided among them, or layers. Launched by `torchrun`."""

from .data import DataParallel
from .pipeline import Pipeline
from .processes import ProcessLost

__all__ = ["DataParallel", "Pipeline", "ProcessLost"]
