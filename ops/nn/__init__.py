"""Functional layers, only where sharding needs thought, and the declaration of parameters."""

from .layers import attention as attention
from .layers import cross_entropy as cross_entropy
from .layers import dense as dense
from .layers import dropout as dropout
from .layers import embedding as embedding
from .layers import layer_norm as layer_norm
from .layers import log_prob as log_prob
from .layers import rms_norm as rms_norm
from .layers import rope as rope
from .param import Init as Init
from .param import Param as Param
from .param import constant as constant
from .param import fan_in as fan_in
from .param import init as init
from .param import normal as normal
from .param import stack as stack
