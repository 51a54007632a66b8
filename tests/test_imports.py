import os
import subprocess
import sys


def python(code: str, **environment: str) -> str:
    command, env = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.strip()


def test_importing_the_package_loads_no_optional_library_and_starts_no_device() -> None:
    code = """
import sys, pdrunet_jax
pdrunet_jax.PDRUNet, pdrunet_jax.load_model, pdrunet_jax.segment
print(sorted({"torch", "wandb", "pydicom", "grain", "orbax"} & set(sys.modules)))
try:
    sys.modules["jax"].devices()
except RuntimeError:
    print("first use of a device")
"""
    # Had a device been started before, JAX would have failed there.
    assert python(code, JAX_PLATFORMS="no-such-platform").splitlines() == ["[]", "first use of a device"]


def test_the_public_names_are_there_in_any_order_of_imports() -> None:
    code = "import pdrunet_jax.predict, pdrunet_jax; print(all(hasattr(pdrunet_jax, n) for n in pdrunet_jax.__all__))"
    assert python(code) == "True"
    assert python("from pdrunet_jax import segment; print(segment.__module__)") == "pdrunet_jax.predict.inference"


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert python("import pdrunet_jax; print(getattr(pdrunet_jax, 'nothing', None))") == "None"
