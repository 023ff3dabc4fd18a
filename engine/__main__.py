"""`python -m engine` is `recall`."""

from engine.cli import main

if __name__ == "__main__":
    main()
