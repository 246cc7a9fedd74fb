"""Models as declarations and pure functions on top of `ops`."""

from .gpt2 import GPT2Config as GPT2Config
from .gpt2 import gpt2 as gpt2
from .model import Model as Model
