"""`python -m edgefuse.cli`."""

from edgefuse.cli import main

if __name__ == "__main__":
    main()
