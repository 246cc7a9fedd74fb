"""Where the numbers are: layouts, ShardedTensor, the conversion table, reshard."""

from .convert import convert as convert
from .place import pad_to_multiple as pad_to_multiple
