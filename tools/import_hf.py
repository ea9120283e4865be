"""`rho1 X` in a clone: `python -m tools.import_hf`."""

from rho1_jax.import_hf import main

if __name__ == "__main__":
    main()
