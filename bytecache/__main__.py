"""`python -m bytecache` and the console script; launchers start workers with it."""

import signal


def main() -> None:
    """Load the command line and run it."""
    # Loading takes a while, and a Ctrl-C in it is no fault of an import: it ends the process, as it ends any other.
    # Whoever started us with the signal ignored (nohup) has it ignored.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from bytecache.pipeline.cli import main as command

    command()


if __name__ == "__main__":
    main()
