"""Functional layers, only where sharding needs thought, and the declaration of parameters."""

from .attention import alibi as alibi
from .attention import attention as attention
from .dense import dense as dense
from .layers import dropout as dropout
from .layers import embedding as embedding
from .layers import layer_norm as layer_norm
from .layers import rms_norm as rms_norm
from .loss import cross_entropy as cross_entropy
from .loss import linear_cross_entropy as linear_cross_entropy
from .loss import log_prob as log_prob
from .param import Init as Init
from .param import Param as Param
from .param import constant as constant
from .param import fan_in as fan_in
from .param import init as init
from .param import normal as normal
from .param import stack as stack
from .patches import patch_embedding as patch_embedding
from .rope import rope as rope
