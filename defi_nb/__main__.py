"""`python -m defi_nb` is the command `defi-nb`"""
from defi_nb.run.cli import main

if __name__ == "__main__": raise SystemExit(main())
