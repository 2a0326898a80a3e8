"""How Triton runs in this process: compiled on CUDA, interpreted elsewhere."""

import os
import sys


def ensure_triton_mode() -> str:
    """Choose Triton's mode before triton is imported; returns "compile" or "interpret".

    Without CUDA, `TRITON_INTERPRET=1` is set unless the environment already says otherwise. Triton reads the variable
    while it is imported, so `import stem` must come before whatever imports triton.

    Raises:
        RuntimeError: If triton was imported in compile mode although it has to interpret.
    """
    if "TRITON_INTERPRET" not in os.environ:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"
    interpret = os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "yes", "on", "y"}
    language = sys.modules.get("triton.language")
    if interpret and language is not None and type(language.sum).__name__ == "JITFunction":
        raise RuntimeError(
            "triton was imported before TRITON_INTERPRET=1 was set (torch optimizers, torch.compile and transformers "
            "models import it). Restart Python and run `import stem` first."
        )
    return "interpret" if interpret else "compile"
