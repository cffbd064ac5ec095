"""`ddrnet-seg …` and `python -m ddrnet_seg …`."""

from segcore.cli.main import main as run


def main() -> None:
    """Run the command line of this package."""
    run("ddrnet_seg")


if __name__ == "__main__":
    main()
