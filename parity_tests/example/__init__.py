"""A network that is none of this project's, ported with the parity harness: the example of docs/prove_your_port.md."""
