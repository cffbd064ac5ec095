"""`ddps-seg …` and `python -m ddps_seg …`."""

from segcore.cli.main import main as run


def main() -> None:
    """Run the command line of this package."""
    run("ddps_seg")


if __name__ == "__main__":
    main()
