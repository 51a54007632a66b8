import subprocess
import sys


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_package_loads_no_optional_library_and_starts_no_device() -> None:
    code = """
import sys, pdrunet_jax
pdrunet_jax.PDRUNet, pdrunet_jax.load_model, pdrunet_jax.segment
import jax._src.xla_bridge as bridge
print(sorted({"torch", "wandb", "pydicom", "grain", "orbax"} & set(sys.modules)), bridge.backends_are_initialized())
"""
    assert python(code) == "[] False"


def test_the_public_names_are_there_in_any_order_of_imports() -> None:
    code = "import pdrunet_jax.predict, pdrunet_jax; print(all(hasattr(pdrunet_jax, n) for n in pdrunet_jax.__all__))"
    assert python(code) == "True"
    assert python("from pdrunet_jax import segment; print(segment.__module__)") == "pdrunet_jax.predict.inference"


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert python("import pdrunet_jax; print(getattr(pdrunet_jax, 'nothing', None))") == "None"
