"""Environment of every test and of every kernel that nbval starts; set before torch or triton is imported."""

import os
import shutil
import tempfile

import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_configure(config):
    """Send the rows that tests and notebooks write to a temporary folder, so that the tree stays clean."""
    config.stem_results = tempfile.mkdtemp(prefix="stem-results-")
    os.environ["STEM_RESULTS"] = config.stem_results


def pytest_unconfigure(config):
    """Remove that folder."""
    shutil.rmtree(config.stem_results, ignore_errors=True)
