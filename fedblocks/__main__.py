"""``python -m fedblocks`` is the command line."""

from fedblocks.cli import main

main()
