"""Models as declarations and pure functions on top of `ops`."""

from .bert import BERTConfig as BERTConfig
from .bert import bert as bert
from .bert import encode as encode
from .generate import generate as generate
from .gpt2 import GPT2Config as GPT2Config
from .gpt2 import gpt2 as gpt2
from .huggingface import load as load
from .huggingface import save as save
from .llama import LlamaConfig as LlamaConfig
from .llama import llama as llama
from .model import Model as Model
from .opt import OPTConfig as OPTConfig
from .opt import opt as opt
from .palm import PaLMConfig as PaLMConfig
from .palm import palm as palm
from .vit import ViTConfig as ViTConfig
from .vit import vit as vit
