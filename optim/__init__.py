"""How parameters move: gradient transformations and schedules."""

from . import schedules as schedules
from .adamw import adamw as adamw
from .base import Transform as Transform
from .base import apply_updates as apply_updates
from .base import chain as chain
from .base import get as get
from .base import global_norm as global_norm
from .clip import clip_by_global_norm as clip_by_global_norm
from .clip import clip_by_value as clip_by_value
