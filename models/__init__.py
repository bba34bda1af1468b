"""The model repository: one folder per model, and the code that obtains the default ones.

``python -m models`` downloads the weights of each default model, checks them against a pinned checksum, and
writes ``models/<name>/1/model.onnx`` with the labels or the tokenizer beside it. Nothing here is needed to
serve a model: a folder with an ``.onnx`` file in it is complete without any of this code.
"""

from models.catalog import RECIPES, Recipe
from models.errors import ModelBuildError
from models.store import build

__all__ = ["RECIPES", "ModelBuildError", "Recipe", "build"]
