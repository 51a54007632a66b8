"""Command line of `python -m pdrunet_jax.compare`: plan, measure, train, then write the results.

Heavy imports are deferred so that signals are handled even while they load.
"""

import sys

from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.stop import StopFlag


def main() -> int:
    """Run the command and return its exit code."""
    with StopFlag(last=True) as stop:
        from pdrunet_jax.compare import options

        arguments = options.parse(sys.argv[1:])
        output = cli.guard_output(stop)
        from pdrunet_jax.compare.run import run
        from pdrunet_jax.runtime.devices import configure_jax

        configure_jax(arguments.settings.train.precision, arguments.settings.train.deterministic)
        return output.require_complete(run(arguments, stop), f"everything is done and saved in {arguments.folder}")


if __name__ == "__main__":
    cli.run(main)
