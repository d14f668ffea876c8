"""Networks that know no probability: the causal transformer with its KV cache, and the projectors."""

from flowback.nn.projector import ConvProjector, Projector
from flowback.nn.transformer import Cache, CausalTransformer, KVCache

__all__ = ["Cache", "CausalTransformer", "ConvProjector", "KVCache", "Projector"]
