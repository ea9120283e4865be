"""`rho1 X` in a clone: `python -m tools.prepare_data`."""

from rho1_jax.prepare import main

if __name__ == "__main__":
    main()
