"""Reuse of an anchor layer's selection by the layers after it (Kascade, arXiv 2512.16391), for stem.hf."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from stem.selection import BlockSelection
from stem.validation import check_integer

Select = Callable[[Tensor, Tensor, Tensor], BlockSelection]


def reuse(
    select: Select, anchors: Collection[int], num_layers: int, head_maps: Mapping[int, Sequence[int]] | None = None
) -> list[Select]:
    """Return a selector for each layer: an anchor selects, the layers up to the next anchor take its selection.

    `stem.hf.enable(model, reuse(...))` uses them. Kascade chooses the anchors by dynamic programming over the
    similarity of layers; here they are given.

    Args:
        select: Selector of the anchors, for example functools.partial(stem.patterns.select, "oracle_mass").
        anchors: Layers that select, among them 0.
        num_layers: Attention layers of the model.
        head_maps: Layer -> the anchor's head that each of the layer's heads takes. Default: the same head.
    Raises:
        ValueError, TypeError: If 0 is no anchor, or a layer does not exist.
    """
    check_integer("num_layers", num_layers, 1)
    head_maps = head_maps or {}
    for name, layers in (("anchors", anchors), ("head_maps", head_maps)):
        if wrong := [layer for layer in layers if layer not in range(num_layers)]:
            raise ValueError(f"{name} must name layers in 0..{num_layers - 1}, got {wrong}")
    if 0 not in anchors:
        raise ValueError(f"anchors must hold layer 0, got {sorted(anchors)}")
    if wrong := sorted(set(anchors) & set(head_maps)):
        raise ValueError(f"head_maps must name layers that reuse a selection, got the anchors {wrong}")
    selectors: list[Select] = []
    anchor = _Anchor(select)
    for layer in range(num_layers):
        if layer not in anchors:
            selectors.append(_Follower(anchor, head_maps.get(layer)))
        elif layer + 1 in anchors or layer + 1 == num_layers:
            selectors.append(select)
        else:
            anchor = _Anchor(select)
            selectors.append(anchor)
    return selectors


class _Anchor:
    """Selector that keeps the selections of a forward pass, one for each call: padded batches make several."""

    def __init__(self, select: Select) -> None:
        self.select, self.selections, self.are_read = select, [], False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> BlockSelection:
        if self.are_read:  # the next forward pass has begun
            self.selections, self.are_read = [], False
        self.selections.append(self.select(q, k, v))
        return self.selections[-1]


class _Follower:
    """Selector that returns the anchor's selections of a forward pass in the order of their calls."""

    def __init__(self, anchor: _Anchor, heads: Sequence[int] | None) -> None:
        self.anchor, self.heads, self.selections, self.calls = anchor, heads, None, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> BlockSelection:
        if self.selections is not self.anchor.selections:
            self.selections, self.calls = self.anchor.selections, 0
        found = self.selections[self.calls % len(self.selections)]  # activation checkpointing calls again
        self.calls += 1
        self.anchor.are_read = True
        lists = (x if self.heads is None else x[:, list(self.heads)] for x in (found.kv_indices, found.kv_num_blocks))
        kv_indices, kv_num_blocks = (x.to(q.device) for x in lists)
        return replace(found, kv_indices=kv_indices, kv_num_blocks=kv_num_blocks)
