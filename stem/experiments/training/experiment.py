"""The experiment of notebook 05: one small model trained under several kinds of attention, as rows and figures.

    python -m stem.experiments.training.experiment --profile full

trains every arm with every seed (a process each, several side by side on one GPU), lets every model read at and beyond
its training length with its own and with other attention, fine-tunes SmolLM2 with Stem on (stem.experiments.training.adapt), and measures
speed and memory in a pass of its own before. Each finished part is kept under `--folder`; the same command again goes
on from there. Rows go to results/training/.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from stem.config import StemConfig
from stem.experiments import records
from stem.experiments.training import adapt, probe, report
from stem.experiments.training.config import TrainConfig
from stem.experiments.training.distributed import join_processes
from stem.experiments.training.model import LanguageModel, ModelSize
from stem.experiments.training.train import make_optimizer, take_step, train

# Arm -> pattern and what it changes in the plan's StemConfig; all but "dense" at the same density.
ARMS = {
    "dense": ("dense", {}),
    "stem": ("stem", {}),
    "stem_softmax": ("stem", dict(reduction="softmax", allocation="uniform")),
    "uniform_topk": ("uniform_topk", {}),
    "longformer": ("longformer", {}),
    "bigbird": ("bigbird", {}),
}
CONTROL = "sliding_window"  # dense models also read through it: a measure of memory must see the difference


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one profile trains and reads."""

    config: TrainConfig
    """Of every arm, but for attention, seed and folder."""
    seeds: tuple[int, ...]
    arms: tuple[str, ...] = tuple(ARMS)
    lengths: tuple[int, ...] = (1, 2, 4)
    """Lengths to read, in training lengths."""
    num_rows: int = 4
    """Rows of each task at the longest length."""
    speed_steps: int = 8
    """Timed steps of each arm."""
    workers: int = 1
    """Processes at a time."""
    adaptation: adapt.Plan | None = None

    @property
    def seq_lens(self) -> list[int]:
        return [self.config.seq_len * times for times in self.lengths]


PLANS = {
    "smoke": Plan(
        TrainConfig(
            seq_len=512, batch_size=4, steps=180, warmup=20, lr=3e-3, tasks="text,recall",
            size=ModelSize(layers=2, width=192, heads=6, kv_heads=2, hidden=512),
            stem_config=StemConfig(block_size=32, score_stride=8, density=0.4, sink_blocks=1, local_blocks=1),
        ),
        seeds=(0,), arms=("dense", "stem"), speed_steps=3,
    ),
    "full": Plan(
        TrainConfig(
            seq_len=8192, batch_size=4, steps=240, warmup=20, lr=1.5e-3, tasks="text,recall", bf16=True,
            start_len=512, grow_steps=140,
            size=ModelSize(layers=8, width=512, heads=8, kv_heads=2, hidden=1408),
            stem_config=StemConfig(block_size=64, density=0.25, sink_blocks=1, local_blocks=2),
        ),
        seeds=(0, 1, 2), workers=8, adaptation=adapt.Plan(),
    ),
}  # fmt: skip


def arm_config(plan: Plan, arm: str, seed: int = 0, out: str | Path = "") -> TrainConfig:
    """The training run of an arm; `arm` is a key of ARMS or any name of stem.patterns."""
    attention, changes = ARMS.get(arm, (arm, {}))
    return dataclasses.replace(
        plan.config, attention=attention, stem_config=plan.config.stem_config.replace(**changes), seed=seed,
        out=str(out),
    )  # fmt: skip


def use(model: LanguageModel, plan: Plan, arm: str) -> None:
    """Give a model the attention of an arm."""
    config = arm_config(plan, arm)
    model.attention, model.stem_config = config.attention, config.stem_config


def readings(plan: Plan, arm: str) -> list[str]:
    """The attentions that a model of this arm reads with: dense models with all, others with their own and dense."""
    return [*plan.arms, CONTROL] if arm == "dense" else [arm, "dense"]


def run_arm(plan: Plan, arm: str, seed: int, out: Path, say=print) -> list[dict]:
    """Train one arm with one seed (or go on from its checkpoint) and let it read.

    Args:
        plan, arm, seed: What to run.
        out: Folder of its log and checkpoint.
        say: Takes progress lines.
    Returns:
        Rows of stem.experiments.training.probe with trained, inferred (arms) and seed.
    """
    config = arm_config(plan, arm, seed, out)
    start = time.perf_counter()

    def report(done: int, model: LanguageModel) -> None:
        if done % max(1, config.steps // 4) == 0:
            say(f"{arm} seed {seed}: step {done}/{config.steps}, {time.perf_counter() - start:.0f} s")

    model = train(config, on_step=report)
    rows = [dict(trained=arm, inferred=arm, seed=seed) | row for row in probe.curve_rows(config)]
    for inferred in readings(plan, arm):
        use(model, plan, inferred)
        found = probe.evaluation_rows(
            model, plan.seq_lens, plan.num_rows, tasks=config.tasks.split(","), seed=seed, bf16=config.bf16
        )
        rows += [dict(trained=arm, inferred=inferred, seed=seed) | row for row in found]
    use(model, plan, arm)
    say(f"{arm} seed {seed}: done in {time.perf_counter() - start:.0f} s")
    return rows


def speed_rows(plan: Plan, say=print) -> list[dict]:
    """Tokens per second of whole training steps at the training length, and on CUDA peak memory, for every arm.

    Run it alone on the machine: medians over `plan.speed_steps` steps after three steps of warm-up.
    """
    rows = []
    for arm in plan.arms:
        config = dataclasses.replace(arm_config(plan, arm), start_len=0, grow_steps=0)
        names = config.tasks.split(",")
        with join_processes(config.device) as processes:
            torch.manual_seed(0)
            model = LanguageModel(config.size, config.attention, config.stem_config, config.impl).to(processes.device)
            optimizer = make_optimizer(model, config)
            for step in range(3):
                take_step(step, config, names, model, optimizer, processes)
            if cuda := processes.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            steps = range(3, 3 + plan.speed_steps)
            log = pd.DataFrame([take_step(step, config, names, model, optimizer, processes) for step in steps])
        about = dict(trained=arm, inferred=arm, seed=0, seq_len=config.seq_len, task=config.tasks, place="step")
        about |= dict(start=3, stop=3 + plan.speed_steps, count=plan.speed_steps)
        rows.append(about | dict(measure="tokens_per_second", value=log.tokens_per_second.median()))
        if cuda:
            rows.append(about | dict(measure="peak_memory_mib", value=log.peak_memory_mib.max()))
            del model, optimizer
            torch.cuda.empty_cache()
        say(f"{arm}: " + ", ".join(f"{row['value']:.0f} {row['measure']}" for row in rows if row["trained"] == arm))
    return rows


def parts(plan: Plan, only: Sequence[str] = ()) -> list[str]:
    """The run cut up, a process each: "speed" alone first, then "<arm>-<seed>" and "adapt_<arm>-<seed>", by seed."""
    arms = [*plan.arms, *(f"adapt_{arm}" for arm in adapt.ARMS if plan.adaptation)]
    if unknown := sorted(set(only) - set(arms)):
        raise ValueError(f"only={list(only)}: unknown {unknown}; accepted: {', '.join(arms)}")
    return ["speed", *(f"{arm}-{seed}" for seed in plan.seeds for arm in arms if not only or arm in only)]


def run_part(plan: Plan, part: str, folder: Path) -> Path:
    """Do one part unless its rows are there; returns the path of its rows (CSV, moved into place when complete)."""
    path = folder / f"{part}.csv"
    if path.exists():
        return path
    name, _, seed = part.partition("-")
    if part == "speed":
        rows = speed_rows(plan, say=_say)
    elif name.startswith("adapt_"):
        rows = adapt.run_arm(plan.adaptation, name.removeprefix("adapt_"), int(seed), say=_say)
    else:
        rows = run_arm(plan, name, int(seed), folder / part, say=_say)
        (folder / part / "checkpoint.safetensors").unlink(missing_ok=True)  # its rows are all that is read from here on
    partial = path.with_suffix(".partial")
    pd.DataFrame(rows).to_csv(partial, index=False)
    partial.replace(path)
    return path


def run(profile: str, folder: str | Path, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> Path:
    """The whole experiment in processes of its own, resumed where it was stopped; writes its rows.

    Args:
        profile: A key of PLANS.
        folder: Where parts are kept, under a name made from the plan.
        only, seeds: Arms and seeds to run and to write; empty takes all arms, the plan's seeds.
    Returns:
        The CSV in results/training/.
    Raises:
        RuntimeError: If a part failed, after the others have ended and their rows have been written.
    """
    plan = PLANS[profile]
    folder = part_folder(plan, folder)
    wanted = parts(dataclasses.replace(plan, seeds=tuple(seeds) or plan.seeds), only)
    _in_processes(profile, folder, wanted[:1], 1)  # speed is measured alone on the machine
    _in_processes(profile, folder, wanted[1:], plan.workers)
    path = collect(profile, folder, wanted)
    if missing := [part for part in wanted if not (folder / f"{part}.csv").exists()]:
        raise RuntimeError(f"parts failed: {', '.join(missing)}; the same command again goes on from the others")
    if profile == "full":  # kept beside the rows they were drawn from, as these are
        _say(f"drawn: {', '.join(report.save_figures(pd.read_csv(path)))}")
    return path


def collect(profile: str, folder: Path, names: Sequence[str]) -> Path:
    """Write the rows of those of the named parts that are finished to results/training/; returns the CSV."""
    done = [folder / f"{part}.csv" for part in names if (folder / f"{part}.csv").exists()]
    if not done:
        raise RuntimeError(f"no part of {folder} was finished")
    path = records.write_rows("training", pd.concat(map(pd.read_csv, done)), profile)
    _say(f"{len(done)} of {len(names)} parts written to {path}")
    return path


def part_folder(plan: Plan, folder: str | Path) -> Path:
    """`folder`/<digest of the plan>, made: a plan that differs in more than arms and seeds has other parts."""
    settings = {name: value for name, value in dataclasses.asdict(plan).items() if name not in ("arms", "seeds")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    path = Path(folder) / digest
    path.mkdir(parents=True, exist_ok=True)
    return path


def _in_processes(profile: str, folder: Path, names: Sequence[str], workers: int) -> None:
    """Run parts in processes, at most `workers` at a time, in order; stop them if this process is interrupted."""
    waiting, running = [name for name in names if not (folder / f"{name}.csv").exists()], []
    try:
        while waiting or running:
            running = [process for process in running if process.poll() is None]
            while waiting and len(running) < workers:
                running.append(_start(profile, folder, waiting.pop(0)))
            time.sleep(0.05)
    finally:
        for process in running:
            process.terminate()
            process.wait()


def _start(profile: str, folder: Path, part: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "stem.experiments.training.experiment",
        "--profile",
        profile,
        "--folder",
        str(folder),
        "--part",
        part,
    ]
    few = {"OMP_NUM_THREADS": "1"} if torch.cuda.is_available() else {}  # many processes share the cores
    return subprocess.Popen(command, env={**os.environ, **few})


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    """Run a profile, or as a process of one, some of its parts."""
    parser = argparse.ArgumentParser(
        prog="python -m stem.experiments.training.experiment", description="The experiment of notebook 05."
    )
    parser.add_argument("--profile", choices=PLANS, default="smoke")
    parser.add_argument("--folder", default="runs/training", help="where finished parts are kept")
    parser.add_argument("--only", nargs="*", default=[], help="arms to run, or adapt_dense, adapt_stem")
    parser.add_argument("--seeds", nargs="*", type=int, default=[], help="seeds to run in place of the plan's")
    parser.add_argument("--part", help="run this part alone, kept in --folder itself")
    options = parser.parse_args()
    if options.part:
        run_part(PLANS[options.profile], options.part, Path(options.folder))
    else:
        run(options.profile, options.folder, options.only, options.seeds)


if __name__ == "__main__":
    main()
