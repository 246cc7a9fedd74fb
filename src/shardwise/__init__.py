"""shardwise: sharded tensors with explicit layouts over named device meshes, for PyTorch.

mesh = sw.make_mesh({"data": 2, "tensor": 4})
x = sw.shard(torch.randn(64, 512), mesh, "batch/data embed")
"""

from . import checkpoint as checkpoint
from . import interop as interop
from . import kernels as kernels
from . import layouts as layouts
from . import meshlib as meshlib
from . import models as models
from . import ops as ops
from . import optim as optim
from .layouts import tree as tree
from .layouts.layout import Layout as Layout
from .layouts.place import from_callback as from_callback
from .layouts.place import from_local as from_local
from .layouts.place import full as full
from .layouts.place import shard as shard
from .layouts.place import zeros as zeros
from .layouts.reshard import reshard as reshard
from .layouts.sharded import ShardedTensor as ShardedTensor
from .layouts.show import show as show
from .layouts.strategy import Precision as Precision
from .layouts.strategy import Strategy as Strategy
from .meshlib.errors import LayoutError as LayoutError
from .meshlib.errors import MeshError as MeshError
from .meshlib.mesh import Mesh as Mesh
from .meshlib.mesh import make_mesh as make_mesh
from .meshlib.record import Collective as Collective
from .ops import nn as nn
from .ops import random as random
from .ops.define import op as op
from .ops.nn import strategies as strategies
from .ops.plan import Plan as Plan
from .ops.plan import plan as plan
from .ops.plan import record as record
from .ops.planner import cheapest as cheapest
from .ops.transforms.accumulate import accumulate as accumulate
from .ops.transforms.forward import hvp as hvp
from .ops.transforms.forward import jvp as jvp
from .ops.transforms.grad import grad as grad
from .ops.transforms.grad import value_and_grad as value_and_grad
from .ops.transforms.grad import vjp as vjp
from .ops.transforms.jit import jit as jit
from .ops.transforms.local import shard_map as shard_map
from .ops.transforms.remat import remat as remat
from .ops.transforms.scan import scan as scan
from .ops.transforms.shapes import check_stable as check_stable
from .ops.transforms.shapes import eval_shape as eval_shape
from .ops.transforms.vmap import vmap as vmap

__version__ = "0.1.0"
