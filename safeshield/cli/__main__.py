"""Run the command line: ``python -m safeshield.cli`` does the same as ``safeshield``."""

from safeshield.cli.main import main

if __name__ == "__main__":
    main()
