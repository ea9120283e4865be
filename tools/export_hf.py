"""`rho1 X` in a clone: `python -m tools.export_hf`."""

from rho1_jax.export_hf import main

if __name__ == "__main__":
    main()
