"""``python -m gpuload`` is the command line."""

from gpuload.tools.cli import main

main()
