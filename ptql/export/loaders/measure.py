"""`python -P measure.py LOADER FOLDER WINDOWS RESULT`: what a runtime makes of an export, in a process of its own.

LOADER is a file beside this one; WINDOWS has token ids [windows, tokens] and how many of the last window's last logits
are wanted; RESULT gets these, and the summed losses of each window. ptql is not imported.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
from safetensors.numpy import load_file, save_file


def main(loader: str, folder: str, windows: str, result: str) -> None:
    spec = importlib.util.spec_from_file_location("loader", loader)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = load_file(windows)
    ids, last = given["ids"], int(given["last"][0])
    logits, facts = module.load(folder)
    losses, scores = [], np.zeros((0, 0), np.float32)
    for window in ids:
        scores = np.asarray(logits(window), np.float32)
        wide = scores[:-1].astype(np.float64)
        top = wide.max(1)
        logsumexp = top + np.log(np.exp(wide - top[:, None]).sum(1))
        losses.append((logsumexp - wide[np.arange(len(wide)), window[1:]]).sum())
    save_file({"losses": np.array(losses), "logits": np.ascontiguousarray(scores[-last:])}, result)
    print(json.dumps(facts))


main(*sys.argv[1:])
