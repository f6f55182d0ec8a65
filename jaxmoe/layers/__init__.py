"""The layers of a Mixture-of-Experts Transformer, usable one by one in any Flax NNX module."""

from jaxmoe.layers.attention import Attention as Attention
from jaxmoe.layers.attention import KeyValueCache as KeyValueCache
from jaxmoe.layers.embedding import Embedding as Embedding
from jaxmoe.layers.mlp import DenseMLP as DenseMLP
from jaxmoe.layers.moe import MoE as MoE
from jaxmoe.layers.norm import RMSNorm as RMSNorm
from jaxmoe.layers.rope import apply_rope as apply_rope
from jaxmoe.layers.rope import rope_angles as rope_angles
from jaxmoe.layers.router import Router as Router
from jaxmoe.layers.router import Routing as Routing
from jaxmoe.layers.statistics import RouterStatistics as RouterStatistics
from jaxmoe.layers.statistics import auxiliary_losses as auxiliary_losses
from jaxmoe.layers.statistics import load_balance_loss as load_balance_loss
from jaxmoe.layers.statistics import load_metrics as load_metrics
from jaxmoe.layers.statistics import router_z_loss as router_z_loss
