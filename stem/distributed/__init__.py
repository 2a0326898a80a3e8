"""Prompts larger than one GPU: sparse prefill whose tokens several ranks share (context parallelism).

from torch.distributed.device_mesh import init_device_mesh
import stem, stem.distributed

mesh = init_device_mesh("cuda", (2,))
layout = stem.distributed.Layout.for_config(config, num_tokens, mesh.size())
q, k, v = (layout.shard(x, mesh.get_local_rank()) for x in (q, k, v))  # or computed there
out = stem.distributed.stem_attention(q, k, v, config, mesh=mesh, layout=layout)
"""

from stem.distributed.attention import RowSelection, stem_attention
from stem.distributed.exchange import PeerError
from stem.distributed.layout import Layout

__all__ = ["Layout", "PeerError", "RowSelection", "stem_attention"]
