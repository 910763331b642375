"""`python -m edgefuse`, which `torchrun` starts once per process: `torchrun --nproc-per-node 2 -m edgefuse train ...`."""

from edgefuse.cli import main

if __name__ == "__main__":
    main()
