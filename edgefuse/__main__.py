"""`python -m edgefuse`, which `torchrun` starts once per process: `torchrun --nproc-per-node 2 -m edgefuse train ...`."""

import os

from edgefuse.cli import main

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before PyTorch is imported: its reducer warns of what is meant to be so

if __name__ == "__main__":
    main()
