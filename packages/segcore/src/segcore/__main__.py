"""`python -m segcore …`."""

from segcore.cli import main

if __name__ == "__main__":
    main()
