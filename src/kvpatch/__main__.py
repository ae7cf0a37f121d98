"""`python -m kvpatch` is the command `kvpatch`."""

from kvpatch.cli.main import main

if __name__ == "__main__":
    main()
