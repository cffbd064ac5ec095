"""`ddp-seg …` and `python -m ddp_seg …`."""

from segcore.cli.main import main as run


def main() -> None:
    """Run the command line of this package."""
    run("ddp_seg")


if __name__ == "__main__":
    main()
