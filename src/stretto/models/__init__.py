"""What a model is: its shapes and operations (without torch), its files, its tokenizer, and what runs it."""

from stretto.models.load import Model, ModelFiles, load_model, open_model
from stretto.models.passes import PassShape
from stretto.models.spec import ModelSpec, RopeScaling

__all__ = ["Model", "ModelFiles", "ModelSpec", "PassShape", "RopeScaling", "load_model", "open_model"]
