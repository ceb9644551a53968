"""`python -m bytecache` is the console script; launchers start workers with it."""

from bytecache.pipeline.cli import main

if __name__ == "__main__":
    main()
