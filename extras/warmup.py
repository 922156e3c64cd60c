"""Compile kernels while train.py reads the text: two processes fill Numba's cache in half of the time of one."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import bpe
import tinygpt
from extras.check import scaled_down


def compile_ahead(cfg, kernels):
    """Start processes that compile the kernels which train `cfg` -> those to wait for; none where nothing is gained."""
    if kernels != "fast":
        return []
    import fast

    if fast.is_compiled() or tinygpt.count_cores() == 1:
        return []
    bpe.note("compiling kernels, once on this machine ...")
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import fast, tinygpt; "
    code += "fast.compile_half(tinygpt.Config(**json.loads(sys.argv[2])), int(sys.argv[3]))"
    words = [sys.executable, "-c", code, str(Path(tinygpt.__file__).parent), json.dumps(asdict(scaled_down(cfg)))]
    return [subprocess.Popen([*words, half], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for half in "01"]
