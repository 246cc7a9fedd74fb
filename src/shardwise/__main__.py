"""`python -m shardwise` is the console script `shardwise`."""

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
