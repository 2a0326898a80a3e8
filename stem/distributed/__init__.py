"""Prompts larger than one GPU: sparse prefill whose tokens several ranks share (context parallelism).

    from torch.distributed.device_mesh import init_device_mesh
    import stem, stem.distributed

    mesh = init_device_mesh("cuda", (2,))
    layout = stem.distributed.Layout.for_config(config, num_tokens, mesh.size())
    q, k, v = (layout.shard(x, mesh.get_local_rank()) for x in (q, k, v))  # or computed there
    out = stem.distributed.stem_attention(q, k, v, config, mesh=mesh, layout=layout)

A whole model shares its prompts by `stem.hf.enable(model, config, mesh=mesh)`.

Ranks exchange summaries of key blocks, the names of the blocks that each one needs, and the keys and values of these
(of all blocks, where most are named, or where dropped blocks stand in by means). Where budgets tell before the choice
that nearly all blocks will be named, all keys and values travel while the blocks are chosen: by copy engines on the
GPUs of one host, for prompts of medium length. Calls that come again replay their launches between the exchanges. With
`exact_last_blocks`, which "adaptive" has, the ranks of the last blocks get all keys. Every rank scores its own query
blocks; impl="torch" takes the time of scoring those of the whole prompt.

The tests run 2 and 3 gloo processes on a CPU, and NCCL where there are two GPUs. `stem.experiments.speed.shared`
measures the time; results/README.md has its table.
"""

from stem.distributed.attention import RowSelection, stem_attention
from stem.distributed.exchange import PeerError
from stem.distributed.layout import Layout

__all__ = ["Layout", "PeerError", "RowSelection", "stem_attention"]
