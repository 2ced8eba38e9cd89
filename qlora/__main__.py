"""``python -m qlora`` is the same front door as the ``qlora`` command."""

from qlora.cli import main

if __name__ == "__main__":
    main()
