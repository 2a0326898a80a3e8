"""The experiment of notebook 05: one small model trained with several kinds of attention, as rows and figures.

Speed and memory are measured first, alone on the machine. Then every arm is trained with every seed, each in a process
of its own. Every model reads rows at and beyond its training length, with its own and with other attention. The full
profile also fine-tunes SmolLM2 (see adapt.py). Finished parts are kept, and the next run goes on from there.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from stem.config import StemConfig
from stem.experiments import records
from stem.experiments.processes import run_in_processes
from stem.experiments.training import adapt, probe, report
from stem.experiments.training.checkpoints import CHECKPOINT
from stem.experiments.training.config import TrainConfig
from stem.experiments.training.distributed import join_processes
from stem.experiments.training.model import LanguageModel, ModelSize
from stem.experiments.training.train import make_optimizer, take_step, train

# Arm -> (pattern, fields of the study's StemConfig that it changes); all but "dense" have the same density.
ARMS = {
    "dense": ("dense", {}),
    "stem": ("stem", {}),
    "stem_softmax": ("stem", dict(reduction="softmax", allocation="uniform")),
    "uniform_topk": ("uniform_topk", {}),
    "longformer": ("longformer", {}),
    "bigbird": ("bigbird", {}),
}
CONTROL = "sliding_window"  # the dense model also reads through a window: a measure of memory must show the difference


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms, seeds and lengths that one profile trains and reads."""

    config: TrainConfig  # run of every arm, except its attention, seed and folder
    seeds: tuple[int, ...]  # seeds of the weights and of the data
    arms: tuple[str, ...] = tuple(ARMS)  # keys of ARMS, "dense" first
    lengths: tuple[int, ...] = (1, 2, 4)  # lengths to read [training lengths]
    num_rows: int = 4  # rows of each task at the longest length
    speed_steps: int = 8  # timed steps of each arm
    workers: int = 1  # processes that train at the same time
    adaptation: adapt.AdaptConfig | None = None  # fine-tuning of a pretrained model; None leaves it out


STUDIES = {
    "smoke": Study(
        TrainConfig(
            seq_len=512, batch_size=4, steps=180, warmup=20, lr=3e-3, tasks="text,recall",
            size=ModelSize(layers=2, width=192, heads=6, kv_heads=2, hidden=512),
            stem_config=StemConfig(block_size=32, score_stride=8, density=0.4, sink_blocks=1, local_blocks=1),
        ),
        seeds=(0,), arms=("dense", "stem"), speed_steps=3,
    ),
    "full": Study(
        TrainConfig(
            seq_len=8192, batch_size=4, steps=240, warmup=20, lr=1.5e-3, tasks="text,recall", bf16=True,
            start_len=512, grow_steps=140,
            size=ModelSize(layers=8, width=512, heads=8, kv_heads=2, hidden=1408),
            stem_config=StemConfig(block_size=64, density=0.25, sink_blocks=1, local_blocks=2),
        ),
        seeds=(0, 1, 2), workers=8, adaptation=adapt.AdaptConfig(),
    ),
}  # fmt: skip


def arm_config(study: Study, arm: str, seed: int = 0, out: str | Path = "") -> TrainConfig:
    """Training run of an arm, which is a key of ARMS or any name of stem.patterns."""
    attention, changes = ARMS.get(arm, (arm, {}))
    stem_config = study.config.stem_config.replace(**changes)
    return dataclasses.replace(study.config, attention=attention, stem_config=stem_config, seed=seed, out=str(out))


def readings(study: Study, arm: str) -> list[str]:
    """Arms whose attention a model reads with: a dense model with all and CONTROL, others with their own and dense."""
    return [*study.arms, CONTROL] if arm == "dense" else [arm, "dense"]


def run_arm(study: Study, arm: str, seed: int, out: Path) -> list[dict]:
    """Train an arm with a seed, or resume it in `out`, and return rows of `probe` with trained, inferred and seed."""
    config = arm_config(study, arm, seed, out)
    start = time.perf_counter()

    def tell(done: int, model: LanguageModel) -> None:
        if done % max(1, config.steps // 4) == 0:
            print(f"{arm} seed {seed}: step {done}/{config.steps}, {time.perf_counter() - start:.0f} s", flush=True)

    model = train(config, on_step=tell)
    rows = [dict(trained=arm, inferred=arm, seed=seed) | row for row in probe.curve_rows(config)]
    seq_lens = [config.seq_len * times for times in study.lengths]
    for inferred in readings(study, arm):
        reading = arm_config(study, inferred)
        model.attention, model.stem_config = reading.attention, reading.stem_config
        found = probe.evaluation_rows(model, config, seq_lens, study.num_rows)
        rows += [dict(trained=arm, inferred=inferred, seed=seed) | row for row in found]
    print(f"{arm} seed {seed}: done in {time.perf_counter() - start:.0f} s", flush=True)
    return rows


def speed_rows(study: Study) -> list[dict]:
    """Tokens per second of whole training steps at the training length, and on CUDA the peak memory, for every arm.

    Values are medians over `study.speed_steps` steps after three steps of warm-up. Nothing else should run meanwhile.
    """
    rows = []
    for arm in study.arms:
        config = dataclasses.replace(arm_config(study, arm), start_len=0, grow_steps=0)
        with join_processes(config.device) as processes:
            torch.manual_seed(0)
            model = LanguageModel(config.size, config.attention, config.stem_config, config.impl).to(processes.device)
            optimizer = make_optimizer(model, config)
            for step in range(3):
                take_step(step, config, model, optimizer, processes)
            if cuda := processes.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            steps = range(3, 3 + study.speed_steps)
            log = pd.DataFrame([take_step(step, config, model, optimizer, processes) for step in steps])
        about = dict(trained=arm, inferred=arm, seed=0, seq_len=config.seq_len, task=config.tasks, place="step")
        about |= dict(start=3, stop=3 + study.speed_steps, count=study.speed_steps)
        found = {"tokens_per_second": log.tokens_per_second.median()}
        if cuda:
            found["peak_memory_mib"] = log.peak_memory_mib.max()
            del model, optimizer
            torch.cuda.empty_cache()
        rows += [about | dict(measure=measure, value=value) for measure, value in found.items()]
        print(f"{arm}:", ", ".join(f"{value:.0f} {measure}" for measure, value in found.items()), flush=True)
    return rows


def part_names(study: Study) -> list[str]:
    """Names of the parts that run in a process each: "speed", then "<arm>-<seed>" and "adapt_<arm>-<seed>" by seed."""
    arms = [*study.arms, *(f"adapt_{arm}" for arm in adapt.ARMS if study.adaptation)]
    return ["speed", *(f"{arm}-{seed}" for seed in study.seeds for arm in arms)]


def run_part(study: Study, part: str, folder: Path) -> None:
    """Do one part and write its rows to `folder`/<part>.csv, which appears whole or not at all."""
    if torch.cuda.is_available():
        torch.set_num_threads(1)  # many processes share the cores
    name, _, seed = part.partition("-")
    if part == "speed":
        rows = speed_rows(study)
    elif name.startswith("adapt_"):
        rows = adapt.run_arm(study.adaptation, name.removeprefix("adapt_"), int(seed))
    else:
        rows = run_arm(study, name, int(seed), folder / part)
    partial_path = folder / f"{part}.partial"
    pd.DataFrame(rows).to_csv(partial_path, index=False)
    partial_path.replace(folder / f"{part}.csv")
    (folder / part / CHECKPOINT).unlink(missing_ok=True)  # from here on only the rows are read


def run(profile: str, folder: str | Path) -> Path:
    """Run a study, each part in a process of its own, and return the path of its CSV in results/training/.

    Args:
        folder: Where finished parts are kept, in a subfolder named after the study. They are not run again.
    Raises:
        OSError: If `folder` or results/training/ cannot be made.
        RuntimeError: If a part failed. All others have ended by then, and their rows have been written.
    """
    study = STUDIES[profile]
    names = part_names(study)
    records.results_dir("training")  # made before the training, to fail early
    folder = part_folder(study, folder)
    for together, workers in ((names[:1], 1), (names[1:], study.workers)):  # speed is measured alone
        run_in_processes([partial(run_part, study, part, folder) for part in _unfinished(folder, together)], workers)
    missing = _unfinished(folder, names)
    if done := [pd.read_csv(folder / f"{part}.csv") for part in names if part not in missing]:
        path = records.write_rows("training", pd.concat(done), profile)
        print(f"{len(done)} of {len(names)} parts written to {path}", flush=True)
    if missing:
        raise RuntimeError(f"parts failed: {', '.join(missing)}; the same command again goes on from the others")
    if profile == "full":  # figures are kept beside the rows that they show
        print(f"drawn: {', '.join(report.save_figures(pd.read_csv(path)))}", flush=True)
    return path


def part_folder(study: Study, folder: str | Path) -> Path:
    """Make and return `folder`/<digest>, which differs between studies that differ in more than arms and seeds."""
    settings = {name: value for name, value in dataclasses.asdict(study).items() if name not in ("arms", "seeds")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    path = Path(folder) / digest
    path.mkdir(parents=True, exist_ok=True)
    return path


def _unfinished(folder: Path, names: Sequence[str]) -> list[str]:
    return [part for part in names if not (folder / f"{part}.csv").exists()]
