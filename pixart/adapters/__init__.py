"""LoRA and its kin, whatever trained them: read, fitted to a model, merged."""
from .fit import Fit, Shapes, fit_adapter
from .layer import Layer
from .load import Adapter, build_adapter, load_adapter
from .merge import merge_file, merge_layers, parameter_shapes

__all__ = [
    "Adapter", "Fit", "Layer", "Shapes", "build_adapter", "fit_adapter", "load_adapter", "merge_file", "merge_layers", "parameter_shapes",
]  # fmt: skip
