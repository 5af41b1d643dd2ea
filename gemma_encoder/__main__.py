"""Entry point of the command `gemma-encoder` and of `python -m gemma_encoder`."""

from gemma_encoder import stopping

stopping.start()  # before other imports, so that Ctrl-C ends them in one line, too


def main() -> int:
    """Runs the command of this process and returns its exit code."""
    return stopping.run(_main)


def _main() -> int:
    from gemma_encoder import cli, runtime

    runtime.collect_garbage_rarely()
    return cli.main()


if __name__ == "__main__":
    import sys

    sys.exit(main())
