"""Command line of `python -m pdrunet_jax.train`. Started again, a run resumes exactly.

Heavy imports are deferred so that signals are handled even while they load.
"""

import sys

from pdrunet_jax.runtime import cli
from pdrunet_jax.runtime.processes import join
from pdrunet_jax.runtime.stop import StopFlag


def main() -> int:
    """Run the command and return its exit code."""
    with StopFlag(last=True) as stop:
        from pdrunet_jax.runtime.run_folder import RunFolder
        from pdrunet_jax.train import options

        arguments = options.parse(sys.argv[1:])
        if arguments.verify is not None:
            from pdrunet_jax.train.verify import verify

            return verify(arguments.verify)
        output = cli.guard_output(stop)
        distributed = arguments.distributed.wanted(arguments.detect)
        if not distributed:  # before JAX is loaded: a quick answer for a folder that is in use
            RunFolder(arguments.run_folder).require_free()
        from pdrunet_jax.runtime.devices import configure_jax
        from pdrunet_jax.train.folds import train_folds
        from pdrunet_jax.train.run import run

        # Before the processes meet, which starts the devices.
        configure_jax(arguments.settings.train.precision, arguments.settings.train.deterministic)
        with join(arguments.distributed, arguments.detect, stop) as group:
            code = (train_folds if arguments.fold_numbers[1] else run)(arguments, group, stop)
        return output.require_complete(code, f"training is done and everything is saved in {arguments.run_folder}")


if __name__ == "__main__":
    cli.run(main)
