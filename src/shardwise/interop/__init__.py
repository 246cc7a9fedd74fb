"""Beside the rest of torch: DTensor, DeviceMesh and torch's checkpoints; modules as pure functions.

    to_dtensor  from_dtensor  to_device_mesh  from_device_mesh     a job of torch.distributed
    module_params  functional_call  load_module                    any nn.Module, on any mesh

`torch.distributed.tensor` is imported by the first call that needs it, not with the library.
"""

from .dtensors import from_dtensor, to_dtensor
from .meshes import from_device_mesh, to_device_mesh
from .modules import functional_call, load_module, module_params

__all__ = [
    "from_device_mesh",
    "from_dtensor",
    "functional_call",
    "load_module",
    "module_params",
    "to_device_mesh",
    "to_dtensor",
]
