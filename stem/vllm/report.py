"""Realised density: counts that worker processes write and any process of the same engine reads.

Each worker maps a small file of int64 pairs into memory, (kept, causal) block pairs of each layer over all heads. The
folder is named by an environment variable, which child processes inherit.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakSet

import numpy as np
from torch import Tensor

FOLDER = "STEM_VLLM_COUNTS"


class Report(list):
    """Realised density of one engine: a row for each attention layer, a dict with these entries.

    layer: Index of the layer in the model.
    attention: "stem", or "vllm: " and why the layer keeps vLLM's own attention.
    density: Kept over causal block pairs in prefill so far, in (0, 1]; None before the first prefill and for "vllm".
    kept, causal: These block pairs, over all heads.
    """

    def density(self) -> float:
        """Mean over the layers that have a density; NaN before the first prefill."""
        known = [row["density"] for row in self if row["density"] is not None]
        return sum(known) / len(known) if known else float("nan")


def density(llm=None) -> Report:
    """Realised density of each layer since an engine started.

    Args:
        llm: A `vllm.LLM`; None takes the engine that was started last by this process or a child of it.
    Raises:
        ValueError: If there is no such engine, or it does not use Stem.
    """
    for counts in list(LIVE):
        counts.flush()
    engines = described()
    if llm is not None:
        wanted = llm.llm_engine.vllm_config.instance_id
        engines = [(about, counts) for about, counts in engines if about["engine"] == wanted]
    if not engines:
        raise ValueError("no engine of vLLM uses Stem here: give one additional_config={'stem': {...}}")
    newest = engines[-1][0]["engine"]
    parts = [(about, counts) for about, counts in engines if about["engine"] == newest]
    rows = {}
    for about, counts in parts:  # one for each worker process
        for (index, attention), (kept, causal) in zip(about["layers"], counts.tolist(), strict=True):
            row = rows.setdefault(index, dict(layer=index, attention=attention, density=None, kept=0, causal=0))
            row["kept"] += kept
            row["causal"] += causal
    for row in rows.values():
        row["density"] = row["kept"] / row["causal"] if row["causal"] else None
    return Report(rows[index] for index in sorted(rows))


class Counts:
    """Block pairs of each layer in this process, which other processes can read."""

    def __init__(self, engine: str, layers: Sequence[tuple[int, str]]) -> None:
        """Counts of a worker of this engine, described by (index, attention) of each layer."""
        path = Path(share_counts()) / f"{engine}-{os.getpid()}"
        shared = np.lib.format.open_memmap(f"{path}.npy", mode="w+", dtype=np.int64, shape=(len(layers), 2))
        self.pairs = np.asarray(shared)  # the same memory, without what a memmap does in each call
        path.with_suffix(".new").write_text(json.dumps(dict(engine=engine, layers=layers)))
        path.with_suffix(".new").rename(path.with_suffix(".json"))  # whole when another process looks
        self.waiting: list[tuple[int, Tensor, int]] = []
        LIVE.add(self)

    def add_kept(self, position: int, kept: Tensor, causal: int) -> None:
        """Add a number that is still being computed, and the causal pairs; both count from the next flush on."""
        self.waiting.append((position, kept, causal))

    def flush(self) -> None:
        """Add the numbers that were still being computed, which waits for the device if there are any."""
        for position, kept, causal in self.waiting:
            self.pairs[position] += int(kept), causal
        self.waiting.clear()


LIVE: WeakSet[Counts] = WeakSet()


def described() -> list[tuple[dict, np.ndarray]]:
    """Descriptions and counts [layers, 2] of all workers, the oldest first."""
    files = sorted(
        Path(os.environ.get(FOLDER, "/nonexistent")).glob("*.json"), key=lambda path: path.stat().st_mtime_ns
    )
    return [(json.loads(path.read_text()), np.load(path.with_suffix(".npy"))) for path in files]


def share_counts() -> str:
    """Name the folder of the counts for this process and its children, and publish them as metrics."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="stem-vllm-")
        atexit.register(_remove, os.environ[FOLDER], os.getpid())
    if not Metrics.is_published:
        from prometheus_client import REGISTRY

        REGISTRY.register(Metrics())
        Metrics.is_published = True
    return os.environ[FOLDER]


class Metrics:
    """Collector of Prometheus that reads the counts when the endpoint is asked."""

    is_published = False

    def collect(self):
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        labels = ["engine", "layer"]
        share = GaugeMetricFamily("stem:prefill_density", "Kept over causal block pairs in prefill.", labels=labels)
        kept = CounterMetricFamily("stem:kept_block_pairs", "Kept block pairs of all heads in prefill.", labels=labels)
        causal = CounterMetricFamily("stem:causal_block_pairs", "Block pairs of dense prefill.", labels=labels)
        for about, counts in described():
            for (index, attention), pairs in zip(about["layers"], counts.tolist(), strict=True):
                where = [about["engine"], str(index)]
                if attention == "stem":
                    kept.add_metric(where, pairs[0])
                    causal.add_metric(where, pairs[1])
                if pairs[1]:
                    share.add_metric(where, pairs[0] / pairs[1])
        return [share, kept, causal]


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child leaves it alone
        shutil.rmtree(folder, ignore_errors=True)
