"""``python -m safeshield.cli`` is ``safeshield``."""

from safeshield.cli.main import main

if __name__ == "__main__":
    main()
