"""WaveCore: a small recurrent control model with a hierarchical memory.

    from xuramamba.wavecore import CoreModelConfig, make_core_model
"""

from xuramamba.wavecore.batch_utils import BatchDimensionError
from xuramamba.wavecore.config import CoreModelConfig
from xuramamba.wavecore.model import CoreModel, CoreState, inference_variables, make_core_model

__all__ = ["BatchDimensionError", "CoreModel", "CoreModelConfig", "CoreState", "inference_variables",
           "make_core_model"]
