"""``python -m probllm`` is the command line."""

from probllm.app.cli import main

main()
