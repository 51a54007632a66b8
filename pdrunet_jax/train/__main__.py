"""python -m pdrunet_jax.train --config NAME: train, validate, save; started again, resume exactly."""

import sys

from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.processes import join
from pdrunet_jax.runtime.stop import StopFlag


def main() -> int:
    """The command; returns its exit code."""
    with StopFlag(last=True) as stop:
        from pdrunet_jax.runtime.run_folder import RunFolder
        from pdrunet_jax.train import options

        arguments = options.parse(sys.argv[1:])
        if arguments.verify is not None:
            from pdrunet_jax.train.verify import verify

            return verify(arguments.verify)
        distributed = arguments.distributed.wanted(arguments.detect)
        if not distributed:  # before JAX is loaded, which takes longer than this answer may
            RunFolder(arguments.run_folder).require_free()
        from pdrunet_jax.train.run import _run

        with join(arguments.distributed, arguments.detect, stop) as group:
            return _run(arguments, group, stop)


if __name__ == "__main__":
    cli.run(main)
