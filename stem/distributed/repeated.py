"""Parts of a call that only launch kernels: where calls of one kind come again, their launches are replayed.

Of a prompt that several ranks share, each rank's kernels take so little time that its host could not keep up.
"""

from collections.abc import Callable, Hashable
from functools import lru_cache

from torch import Tensor


@lru_cache(maxsize=1024)
def recordings_of(*what: Hashable) -> dict:
    """Recordings of one kind of call, by stream."""
    return {}


def repeated(call: Callable[[], tuple], *inputs: Tensor, of: tuple[Hashable, ...]) -> tuple:
    """Results of call(), tensors that it allocates; on CUDA its launches are replayed if it does nothing else.

    `inputs` are all tensors that differ from call to call. They and `of` decide what `call` does.
    """
    if not inputs[0].is_cuda:
        return call()
    from stem.kernels.replay import replay

    layouts = ((x.shape, x.stride(), x.dtype) for x in inputs)
    return replay(recordings_of(*of, *layouts), inputs, call)
