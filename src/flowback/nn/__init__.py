"""Networks that know no probability: the causal transformer with its KV cache, and the projectors."""

from flowback.nn.projector import ConvProjector, Projector
from flowback.nn.transformer import Cache, CausalTransformer, KVCache, Places, StaticCache

__all__ = ["Cache", "CausalTransformer", "ConvProjector", "KVCache", "Places", "Projector", "StaticCache"]
