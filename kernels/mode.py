"""How Triton runs in this process: compiled on CUDA, interpreted elsewhere."""

import os
import sys

IMPORT_ORDER = (
    "triton was imported before TRITON_INTERPRET=1 was set (torch optimizers, torch.compile and transformers models "
    "import it). Restart Python and run `import stem` first."
)


def ensure_triton_mode() -> str:
    """Choose Triton's mode before triton is imported; returns "compile" or "interpret".

    Without CUDA, `TRITON_INTERPRET=1` is set unless the environment sets it. Triton reads it at its own import; if
    that was before `import stem`, Triton compiles, and only impl="triton" on CPU tensors fails (`check_triton_on_cpu`).

    Raises RuntimeError if TRITON_INTERPRET=1 was set after triton was imported.
    """
    import torch

    interpret = os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "yes", "on", "y"}
    if "triton.language" in sys.modules:
        if interpret and not _interprets():
            raise RuntimeError(IMPORT_ORDER)
    elif "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        interpret = True
    return "interpret" if interpret else "compile"


def check_triton_on_cpu() -> None:
    """Raise RuntimeError unless Triton interprets its kernels, as CPU tensors need it."""
    import triton.language  # noqa: F401

    if not _interprets():
        raise RuntimeError(f"impl='triton' on CPU tensors needs Triton's interpreter, but {IMPORT_ORDER}")


def _interprets() -> bool:
    return type(sys.modules["triton.language"].sum).__name__ != "JITFunction"
