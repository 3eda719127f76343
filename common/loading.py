"""What loading a transformers model raises where a file or a setting is at fault."""

import pickle

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

# no such file, no JSON, an unknown type, a value of another type
CONFIG_ERRORS = (OSError, ValueError, TypeError, KeyError, StrictDataclassError)
# the same; damaged files, of safetensors or pickled; other shapes than the configuration's
WEIGHTS_ERRORS = (*CONFIG_ERRORS, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)
# of a configuration whose values do not go together, when its model is built
SHAPE_ERRORS = (*CONFIG_ERRORS, RuntimeError, ArithmeticError)
