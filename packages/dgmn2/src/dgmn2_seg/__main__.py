"""`dgmn2-seg …` and `python -m dgmn2_seg …`."""

from segcore.cli.main import main as run


def main() -> None:
    """Run the command line of this package."""
    run("dgmn2_seg")


if __name__ == "__main__":
    main()
