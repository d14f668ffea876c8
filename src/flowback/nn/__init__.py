"""Networks that know no probability: the causal transformer with its KV cache, and the projector."""

from flowback.nn.projector import Projector
from flowback.nn.transformer import CausalTransformer, KVCache

__all__ = ["CausalTransformer", "KVCache", "Projector"]
