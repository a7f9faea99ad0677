"""`deepspeed --module selfgen_ds ...` and `python -m selfgen_ds ...`."""

from selfgen_ds.cli import main

if __name__ == "__main__":
    main()
