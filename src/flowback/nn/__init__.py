"""Networks that know no probability: the causal transformer with its KV cache, and the projector."""

from flowback.nn.projector import Projector
from flowback.nn.transformer import Cache, CausalTransformer, KVCache

__all__ = ["Cache", "CausalTransformer", "KVCache", "Projector"]
