"""`python -m segcore …`."""

from segcore.cli.main import main

if __name__ == "__main__":
    main()
