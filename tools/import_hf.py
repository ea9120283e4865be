"""In a clone: `python -m tools.import_hf` is `rho1 import`."""

from rho1_jax.import_hf import main

if __name__ == "__main__":
    main()
