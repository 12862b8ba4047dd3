"""`python -m relora` is `relora`, and so `torchrun -m relora train ...` works."""

from relora.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
